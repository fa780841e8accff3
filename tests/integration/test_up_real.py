"""The processes of docker-compose.yml on Kafka, Redis and MinIO: their commands, health checks and drains."""

from __future__ import annotations

import pytest

from bench.bundles import NOOP, noop_payload
from headrace import Client
from infra.embedded.processes import StopSignals
from infra.settings import load_settings
from tests.servers.layout import Check, Layout, layout_on_servers, run_jobs
from tests.servers.minio import patience
from tests.servers.producers import LANGUAGES, produce_with


@patience()
def test_the_services_of_compose_get_ready_answer_jobs_of_anybody_and_drain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[tuple[str, str]] = []
    with layout_on_servers() as layout, StopSignals() as signals:
        kept = {name for name, service in layout.services.items() if service.check}
        assert kept == {"archiver", "builder", "dispatcher", "worker"}
        healthy = {name: Check(layout.services[name]) for name in kept}
        assert not any(check(0) for check in healthy.values()), "nobody listens yet"

        with layout.started(lambda event: said.append((event.child, event.text)), signals):
            assert run_jobs(layout).startswith("20 of 20 jobs succeeded")
            for name, value in layout.services["worker"].environment.items():
                monkeypatch.setenv(name, value)
            answer_foreign_producers(layout)

    assert sorted(name for name, text in said if text == "ready") == sorted(kept)
    stopped = [name for name, text in said if text == "stopped: exit code 0"]
    assert sorted(stopped) == sorted(kept), said
    assert stopped.index("worker") < stopped.index("dispatcher"), "it records what workers finish"


def answer_foreign_producers(layout: Layout) -> None:
    """Programs that know Kafka and the documents, and nothing of headrace."""
    files = [layout.folder / f"foreign-{number}" for number in range(3)]
    for number, file in enumerate(files):
        file.write_bytes(noop_payload(number))
    options = ["--brokers", layout.addresses["kafka:9092"], "--topic", "jobs.tensor.standard"]
    options += ["--model", NOOP, "--content-type", "application/octet-stream"]
    with Client(settings=load_settings()) as client:
        for language in LANGUAGES:
            for mode in ("binary", "structured"):
                ids = produce_with(language, *options, "--mode", mode, *map(str, files))
                outcomes = list(client.outcomes(ids, 60))
                assert [outcome.status for outcome in outcomes] == ["succeeded"] * len(files)
