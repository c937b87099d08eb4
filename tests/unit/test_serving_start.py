"""What is refused before anything starts: ports, hosts, files and what is no bundle."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import ray

from recray.errors import ArtefactError, ConfigError, InputError
from recray.manifest import write_artefact
from recray.serving import auth, settings
from recray.serving.on_ray import serving

GRAPH = Path(__file__).parents[2] / "deployments" / "serve" / "graph.yaml"


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An artefact of the kind; nothing here opens more of it."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv(auth.TOKEN_ENV, raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda *a, **k: pytest.fail("nothing may start"))
    return write_artefact(tmp_path / "bundle", "bundle", lambda folder: None).place.uri


def refused(kind: type[InputError], match: str, *args: object, **kwargs: object) -> None:
    with pytest.raises(kind, match=match) as error, serving(*args, **kwargs):  # type: ignore[arg-type]
        pass
    assert "\n" not in str(error.value)


def test_a_busy_port(bundle: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        refused(InputError, "cannot listen there", bundle, port=other.getsockname()[1])
    refused(InputError, "cannot listen there", bundle, port=70_000)
    refused(InputError, "cannot listen there", bundle, host="192.0.2.1", token="t")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_an_open_door_without_a_token(bundle: str, host: str) -> None:
    refused(InputError, auth.TOKEN_ENV, bundle, host=host)


def test_what_is_no_bundle(bundle: str, tmp_path: Path) -> None:
    refused(ArtefactError, "is not there", str(tmp_path / "absent"))
    manifest = Path(bundle) / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"bundle"', b'"bandle"', 1))
    refused(ArtefactError, "altered", bundle)


@pytest.mark.parametrize(
    ("was", "now", "match"),
    [
        ("applications:", "aplications:", "aplications"),
        ("num_cpus: 0.1", "num_cpu: 0.1", "num_cpus"),
        ("num_cpus: 0.1", "num_cpus: many", "num_cpus"),
        ("max_replicas: 4", "max_replica: 4", "max_replicas"),
        ("max_replicas: 4", "max_replicas: 0", "max_replicas"),
        ("max_ongoing_requests: 64", "max_ongoing: 64", "max_ongoing"),
        ("- name: Ranker", "- name: Reranker", "Ingress, Retriever, Ranker"),
        ("threads: 1", "thread: 1", "threads"),
        ("threads: 1", "threads: 0", "at least 1"),
        ("layout: split", "layout: torn", "auto, fused, split"),
        ("size: 32", "sizes: 32", "batch"),
        ("size: 32", "size: 0", "at least 1"),
        ("wait_ms: 50", "wait_ms: -1", "at least 0"),
        ("bundle: /srv", "bundel: /srv", "bundle"),
        ("proxy_location", "\tproxy_location", "YAML"),
    ],
)
def test_a_file_with_a_slip(bundle: str, tmp_path: Path, was: str, now: str, match: str) -> None:
    text = GRAPH.read_text()
    assert was in text
    (tmp_path / "slip.yaml").write_text(text.replace(was, now))
    refused(ConfigError, match, bundle, config=str(tmp_path / "slip.yaml"))


def test_a_file_that_is_not_there(bundle: str, tmp_path: Path) -> None:
    refused(ConfigError, "cannot be read", bundle, config=str(tmp_path / "absent.yaml"))
    for text in ("[]", "3", "applications: []", "applications: [{deployments: {a: 1}}]"):
        (tmp_path / "odd.yaml").write_text(text)
        with pytest.raises(ConfigError):
            settings.read_file(str(tmp_path / "odd.yaml"))


def test_the_policy_of_a_file_is_deployed_as_it_is_written(tmp_path: Path) -> None:
    from recray.serving.on_ray.scaling import POLICY, declaration

    scaled = GRAPH.with_name("scaled.yaml")
    policy = settings.policy_of(str(scaled))
    assert policy["policy_kwargs"] == {"calm_s": 60, "drain_s": 10}
    made = declaration({"bundle": "b"}, {}, policy)
    assert made["autoscaling_policy"] == {
        "policy_function": POLICY,
        "policy_kwargs": {"calm_s": 60, "drain_s": 10},
    }
    assert settings.policy_of(str(GRAPH)) == {}
    (tmp_path / "odd.yaml").write_text(scaled.read_text().replace("policy_kwargs", "policy_args"))
    with pytest.raises(ConfigError, match="policy_args"):
        settings.policy_of(str(tmp_path / "odd.yaml"))


def test_a_target_beside_a_fixed_ingress_is_refused(bundle: str, tmp_path: Path) -> None:
    text = GRAPH.read_text().replace(
        "      - name: Ingress\n", "      - name: Ingress\n        num_replicas: 2\n"
    )
    lines = [line for line in text.splitlines() if "autoscaling_config" not in line]
    (tmp_path / "fixed.yaml").write_text("\n".join(lines))
    refused(ConfigError, "nothing would be scaled", bundle, config=str(tmp_path / "fixed.yaml"), p99="50ms")
