"""A stack that may be harmed, and an independent look at what its log says afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from producers.client import Client
    from tests.conftest import Stack

AUDIT = Path(__file__).with_name("audit.py")


@pytest.fixture(scope="session")
def factor() -> int:
    """How many times longer than in `make test` everything goes on."""
    return 10 if os.environ.get("HEADRACE_FAULTS") == "long" else 1


@pytest.fixture(scope="session")
def new_stack(make_stack: Callable[..., Stack], small_bundles: list[Path]) -> Callable[..., Stack]:
    """`new_stack(data)`: up, with a short lease and short pauses, and the small models alone."""

    def make(data: Path | None = None) -> Stack:
        stack = make_stack(data, DISPATCHER__LEASE_S=2, DISPATCHER__RETRY_BASE_S=0.05)
        stack.headrace("models", "add", *small_bundles)
        stack.up()
        return stack

    return make


@pytest.fixture(scope="session")
def kept(new_stack: Callable[..., Stack]) -> Iterator[list[Stack]]:
    """The stack that one test leaves to the next, if it is still well."""
    stacks: list[Stack] = []
    yield stacks
    for stack in stacks:
        stack.down()


@pytest.fixture
def stack(kept: list[Stack], new_stack: Callable[..., Stack]) -> Iterator[Stack]:
    """A stack to be harmed. One that does not recover is thrown away, so that no other test suffers."""
    if not kept:
        kept.append(new_stack())
    yield kept[0]
    try:
        kept[0].until(lambda: kept[0].healthy and not kept[0].lag(), 5)
    except AssertionError:
        kept.pop().down()


@pytest.fixture
def client(stack: Stack) -> Iterator[Client]:
    from headrace import Client

    with Client(data_dir=stack.data) as client:
        yield client


@pytest.fixture(scope="session")
def audit() -> Callable[..., dict[str, Any]]:
    """`audit(stack, job_ids)`: what the log says of these jobs, read by a process of its own."""

    def read(stack: Stack, job_ids: list[str]) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, AUDIT, stack.settings.log_address],
            input=json.dumps(job_ids).encode(),
            capture_output=True,
            check=True,
            env={**stack.environment, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    return read
