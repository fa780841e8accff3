"""The processes of docker-compose.yml on Kafka, Redis and MinIO: their commands, health checks and drains."""

from __future__ import annotations

from infra.embedded.processes import StopSignals
from tests.servers.layout import Check, layout_on_servers, run_jobs
from tests.servers.minio import patience


@patience()
def test_the_services_of_compose_get_ready_answer_jobs_and_drain() -> None:
    said: list[tuple[str, str]] = []
    with layout_on_servers() as layout, StopSignals() as signals:
        kept = {name for name, service in layout.services.items() if service.check}
        assert kept == {"archiver", "dispatcher", "worker"}
        healthy = {name: Check(layout.services[name]) for name in kept}
        assert not any(check(0) for check in healthy.values()), "nobody listens yet"

        with layout.started(lambda event: said.append((event.child, event.text)), signals):
            assert run_jobs(layout).startswith("20 of 20 jobs succeeded")

    assert sorted(name for name, text in said if text == "ready") == sorted(kept)
    stopped = [name for name, text in said if text == "stopped: exit code 0"]
    assert sorted(stopped) == sorted(kept), said
    assert stopped.index("worker") < stopped.index("dispatcher"), "it records what workers finish"
