"""The fault suite on Apache Kafka, MinIO and Redis in its short form. `make faults` is the long one."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.faults.real import (
    FAULTS,
    Fault,
    RealStack,
    Servers,
    execute,
    real_stack,
    running_servers,
)
from tests.servers.minio import patience

pytestmark = [
    patience(),
    # The Kafka client leaves sockets that it could not connect to the garbage collector.
    pytest.mark.filterwarnings("ignore:.*unclosed <socket:pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
]


class Stacks:
    """Faults share a stack, as long as each leaves it sound."""

    def __init__(self, servers: Servers) -> None:
        self.servers = servers
        self._stack: RealStack | None = None
        self._open = ExitStack()

    def __enter__(self) -> Stacks:
        return self

    def __exit__(self, *_: object) -> None:
        self.drop()

    def for_fault(self, fault: Fault) -> RealStack:
        wanted = (fault.proxied, fault.lease_s)
        if fault.alone or not self._stack or wanted != (self._stack.proxied, self._stack.lease_s):
            self.drop()
            stack = real_stack(self.servers, proxied=fault.proxied, lease_s=fault.lease_s)
            self._stack = self._open.enter_context(stack)
        return self._stack

    def drop(self) -> None:
        self._stack = None
        self._open.close()


@pytest.fixture(scope="module")
def stacks() -> Iterator[Stacks]:
    with running_servers() as servers, Stacks(servers) as stacks:
        yield stacks
    gc.collect()  # here, where the sockets are known


@pytest.mark.parametrize(
    "fault",
    sorted(
        (one for one in FAULTS if one.short), key=lambda one: (one.alone, one.proxied, one.lease_s)
    ),
    ids=lambda one: one.id,
)
def test_promises_are_kept_under(fault: Fault, stacks: Stacks) -> None:
    """How long recovery takes is measured here and judged by `make faults`, on a machine with nothing else to do."""
    assert fault.short is not None
    if why := fault.unable(stacks.servers):
        pytest.skip(f"NOT TESTED: {fault.name}: {why}")
    finding = execute(fault, fault.short, stacks.for_fault(fault))
    if fault.alone or finding.breaches:
        stacks.drop()
    assert finding.breaches == []
    assert (finding.lost, finding.twice) == (0, 0)
    assert finding.jobs >= fault.short.jobs
