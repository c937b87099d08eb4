"""Frozen configuration that refuses what it does not know, and the units users write.

A configuration is a `@dataclass(frozen=True, kw_only=True)`; `build` makes one from a mapping,
`override` changes one by `a.b=value` words, `as_dict` gives plain JSON back.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, Union, get_args, get_origin

from recray.errors import ConfigError

T = TypeVar("T")


def build(cls: type[T], values: Mapping[str, Any], *, where: str = "") -> T:
    """Make the dataclass `cls` from `values`; unknown keys and wrong types raise ConfigError."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    known: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{where}.{key}" if where else key
        if key not in fields:
            raise ConfigError(f"unknown setting {path!r}", fix=_did_you_mean(key, fields))
        known[key] = _coerce(hints[key], value, path)
    try:
        return cls(**known)
    except TypeError as error:
        raise ConfigError(f"incomplete settings {where or cls.__name__}: {error}") from None


def override(config: T, words: Iterable[str]) -> T:
    """Apply `a.b=value` words in order; the value is parsed by the field's type."""
    for word in words:
        path, equals, text = word.partition("=")
        if not equals or not path:
            raise ConfigError(f"cannot read {word!r}", fix="write KEY=VALUE")
        config = _set(config, path.split("."), text, path)
    return config


def as_dict(config: Any) -> dict[str, Any]:
    """Plain nested dicts, lists and scalars, ready for JSON."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise TypeError(f"not a configuration: {config!r}")
    return dataclasses.asdict(config)


def _set(config: T, path: list[str], text: str, full: str) -> T:
    if isinstance(config, Mapping):
        new = dict(config)
        if len(path) > 1 and not isinstance(new.get(path[0], {}), Mapping):
            raise ConfigError(f"unknown setting {full!r}", fix=f"{path[0]!r} has no parts")
        new[path[0]] = guess(text) if len(path) == 1 else _set(new.get(path[0], {}), path[1:], text, full)
        return typing.cast(T, new)
    names = {f.name for f in dataclasses.fields(config)}  # type: ignore[arg-type]
    if path[0] not in names:
        before = full[: len(full) - len(".".join(path))]
        raise ConfigError(
            f"unknown setting {full!r}", fix=_did_you_mean(before + path[0], [before + n for n in names])
        )
    value = getattr(config, path[0])
    if len(path) > 1:
        if not (dataclasses.is_dataclass(value) or isinstance(value, Mapping)):
            raise ConfigError(f"unknown setting {full!r}", fix=f"{path[0]!r} has no parts")
        new_value: Any = _set(value, path[1:], text, full)
    else:
        new_value = _coerce(typing.get_type_hints(type(config))[path[0]], text, full)
    return dataclasses.replace(config, **{path[0]: new_value})  # type: ignore[type-var]


def guess(text: str) -> Any:
    """The value that a bare word means: none, true, 3, 0.5, [1, 2], or the word itself; '3' is a word."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    low = text.strip().lower()
    if low in ("none", "null"):
        return None
    if low in ("true", "false"):
        return low == "true"
    if text.startswith("[") and text.endswith("]"):
        return [guess(part.strip()) for part in text[1:-1].split(",") if part.strip()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _coerce(hint: Any, value: Any, path: str) -> Any:
    """The value as the type that `hint` names, else ConfigError."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _one_of(args, value, path)
    if origin is typing.Literal:
        for choice in args:
            if value == choice or str(value) == str(choice):
                return choice
        raise ConfigError(f"{path} is {value!r}", fix=f"choose one of {', '.join(map(str, args))}")
    if origin in (tuple, list):
        parts = guess(value) if isinstance(value, str) else value
        if isinstance(parts, str) or not isinstance(parts, Iterable):
            parts = [p for p in str(parts).split(",") if p]
        made = [_coerce(args[0] if args else Any, part, path) for part in parts]
        return tuple(made) if origin is tuple else made
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path} must be a mapping, not {value!r}")
        return dict(value)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path} must be a group of settings, not {value!r}")
        return build(hint, value, where=path)
    return _scalar(hint, value, path)


def _one_of(kinds: tuple[Any, ...], value: Any, path: str) -> Any:
    empty = value is None or (isinstance(value, str) and value.lower() in ("none", "null"))
    if empty and type(None) in kinds:
        return None
    errors = []
    for kind in (k for k in kinds if k is not type(None)):
        try:
            return _coerce(kind, value, path)
        except ConfigError as error:
            errors.append(error)
    raise errors[0]


def _scalar(hint: Any, value: Any, path: str) -> Any:
    if hint is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "false", "yes", "no", "1", "0", "on", "off"):
            return value.lower() in ("true", "yes", "1", "on")
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        number = _number(value)
        if math.isfinite(number) and number == int(number):
            return int(value) if isinstance(value, str) and value.lstrip("+-").isdigit() else int(number)
    elif hint is float:
        number = _number(value)
        if math.isfinite(number):  # JSON, and so a manifest, holds no other
            return number
    elif isinstance(hint, type) and isinstance(value, hint):
        return value
    name = getattr(hint, "__name__", str(hint))
    raise ConfigError(f"{path} is {value!r}", fix=f"it must be of type {name}")


def _number(value: Any) -> float:
    """A number, or a text that says one; NaN for anything else."""
    try:
        return float("nan") if isinstance(value, bool) else float(value)
    except (ValueError, TypeError, OverflowError):
        return float("nan")


def _did_you_mean(key: str, known: Iterable[str]) -> str:
    names = sorted(known)
    close = difflib.get_close_matches(key, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"


def unknown_name(what: str, name: str, known: Iterable[str]) -> ConfigError:
    """The error for a name that no registry has, with the nearest one."""
    return ConfigError(f"unknown {what} {name!r}", fix=_did_you_mean(name, known))


_DURATION = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_BYTES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_duration(text: str, *, what: str = "duration") -> float:
    """'10ms' -> 0.01 seconds. A number without a unit, zero and less raise ConfigError."""
    return _parse_unit(text, _DURATION, what, "10ms")


def parse_bytes(text: str, *, what: str = "size") -> int:
    """'64MB' -> 64_000_000 bytes; KiB, MiB, GiB are powers of two."""
    return max(1, int(_parse_unit(text, _BYTES, what, "64MB")))


def parse_share(text: str, *, what: str = "share") -> float:
    """'5%' or '0.05' -> 0.05, inside (0, 1]."""
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        share = float("nan")
    if not 0 < share <= 1:
        raise ConfigError(f"{what} {text!r} is not a share", fix="write for example 5%")
    return share


def _parse_unit(text: str, units: Mapping[str, float], what: str, example: str) -> float:
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*([A-Za-z]*)\s*", str(text))
    if not match or match[2].lower() not in units:
        raise ConfigError(f"{what} {text!r} has no unit we know", fix=f"write for example {example}")
    value = float(match[1]) * units[match[2].lower()]
    if not 0 < value < math.inf:
        raise ConfigError(f"{what} {text!r} must be above zero", fix=f"write for example {example}")
    return value
