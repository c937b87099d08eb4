"""The newest events of each user in Redis: two keys a user, changed together by one script.

`recray:{user}:order`  sorted set: time -> arrival number, hash of the event's id, item and weight
`recray:{user}:ids`    hash: the hashes of the ids, and under "n" the last arrival number
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

import orjson

from recray.errors import ConfigError
from recray.feedback.events import KEEP, REMEMBER, Event, Kept
from recray.feedback.store import StoreError

ANSWER_S = 0.25  # what Redis may take for one step of a conversation
PASSWORD = "RECRAY_REDIS_PASSWORD"  # in the environment of the replicas, where the URL has none

_HEAD = 48  # letters of a member before what it tells: 16 of the arrival number, 32 of the id
_APPEND = """
local new = {}
for at = 2, #ARGV, 3 do
  local id, known = ARGV[at], redis.call('HEXISTS', KEYS[1], ARGV[at])
  if known == 0 then
    local turn = string.format('%016x', redis.call('HINCRBY', KEYS[1], 'n', 1))
    redis.call('HSET', KEYS[1], id, '')
    redis.call('ZADD', KEYS[2], ARGV[at + 1], turn .. id .. ARGV[at + 2])
  end
  new[#new + 1] = 1 - known
end
local over = redis.call('ZCARD', KEYS[2]) - tonumber(ARGV[1])
if over > 0 then
  for _, member in ipairs(redis.call('ZRANGE', KEYS[2], 0, over - 1)) do
    redis.call('HDEL', KEYS[1], string.sub(member, 17, 48))
    redis.call('ZREM', KEYS[2], member)
  end
end
return new
"""


class RedisStore:
    """See `Store`. It need not be there when this is made, and may come back."""

    def __init__(self, url: str, *, keep: int = KEEP) -> None:
        """Raises ConfigError for a URL that is none, or without the package."""
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError:
            raise ConfigError(
                "the state in Redis needs a package", fix='pip install "recray[redis]"'
            ) from None
        try:
            if "@" in "".join(urlsplit(url)[2:]):
                raise ValueError  # the host ended at a / of the password
            self._redis = redis.Redis.from_url(
                url,
                password=os.environ.get(PASSWORD) or None,
                socket_timeout=ANSWER_S,
                socket_connect_timeout=ANSWER_S,
                retry=Retry(NoBackoff(), 1),  # a connection that a restart cut
            )
        except ValueError:  # its words, and what looks like the host, may be of the password
            raise ConfigError(
                "the URL cannot be read",
                where=url.partition("://")[0],
                fix=f"write redis://HOST:PORT/0, a password's / ? # @ as %2F %3F %23 %40, or set ${PASSWORD}",
            ) from None
        self._errors = (redis.RedisError, OSError)
        self._host, self._keep = host_of(url), keep
        self._append = self._redis.register_script(_APPEND)

    def histories(self, users: Sequence[str]) -> list[list[Kept]]:
        """See `Store`."""
        with self._told(), self._redis.pipeline(transaction=False) as ask:
            for user in users:
                ask.zrange(_keys(user)[1], -self._keep, -1, withscores=True)
            return [[_kept(member, score) for member, score in line] for line in ask.execute()]

    def append(self, events: Sequence[Event]) -> list[bool]:
        """See `Store`; all or none of each user's."""
        by_user: dict[str, list[int]] = {}
        for place, event in enumerate(events):
            by_user.setdefault(event.user, []).append(place)
        new = [False] * len(events)
        with self._told(), self._redis.pipeline(transaction=False) as ask:
            for user, places in by_user.items():
                words: list[str | bytes | int] = [REMEMBER * self._keep]
                for place in places:
                    event = events[place]
                    id_ = hashlib.sha256(event.id.encode()).hexdigest()[:32]
                    words += [id_, repr(event.time), orjson.dumps([event.item, event.weight])]
                self._append(keys=_keys(user), args=words, client=ask)
            for places, line in zip(by_user.values(), ask.execute(), strict=True):
                for place, was_new in zip(places, line, strict=True):
                    new[place] = bool(was_new)
        return new

    def close(self) -> None:
        """Hang up."""
        self._redis.close()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except self._errors as error:
            words = f"Redis cannot be used now ({type(error).__name__})"
            raise StoreError(words, where=self._host) from None


def host_of(url: str) -> str:
    """Host and port of a URL, without the password it may hold."""
    return urlsplit(url).netloc.rpartition("@")[2]


def _keys(user: str) -> list[str]:
    return [f"recray:{{{user}}}:ids", f"recray:{{{user}}}:order"]  # braces: one slot of a cluster


def _kept(member: bytes, score: float) -> Kept:
    item, weight = orjson.loads(member[_HEAD:])
    return Kept(item, score, float(weight))
