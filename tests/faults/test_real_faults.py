"""The fault suite on Apache Kafka, MinIO and Redis in its short form. `make faults` is the long one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.real import FAULTS, Fault, Servers, execute, real_stack, running_servers
from tests.servers.minio import patience

pytestmark = patience()


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    with running_servers() as servers:
        yield servers


@pytest.mark.parametrize("fault", [one for one in FAULTS if one.short], ids=lambda one: one.id)
def test_promises_are_kept_under(fault: Fault, servers: Servers) -> None:
    """How long recovery takes is measured here and judged by `make faults`, on a machine with nothing else to do."""
    assert fault.short is not None
    if why := fault.unable(servers):
        pytest.skip(f"NOT TESTED: {fault.name}: {why}")
    with real_stack(servers, proxied=fault.proxied) as stack:
        finding = execute(fault, fault.short, stack)
    assert finding.breaches == []
    assert (finding.lost, finding.twice) == (0, 0)
    assert finding.jobs >= fault.short.jobs
