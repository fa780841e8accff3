"""One stack for all end-to-end tests, with the demo's models and a few small ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from producers.client import Client
    from tests.conftest import Stack

DEMO = ["efficientnet-lite0", "minilm-embed", "minilm-topics", "whisper-tiny-en"]


@pytest.fixture(scope="session")
def stack(
    make_stack: Callable[..., Stack],
    make_tensor_bundle: Callable[..., Path],
    small_bundles: list[Path],
    demo_bundle: Callable[[str], Path],
) -> Iterator[Stack]:
    """A window smaller than the tests' larger runs, so that they go through its edge too."""
    stack = make_stack(DISPATCHER__WINDOW=256, DISPATCHER__RETRY_BASE_S=0.05)
    small = make_tensor_bundle("small", more="limits: {max_bytes: 100000}")
    stack.headrace("models", "add", *map(demo_bundle, DEMO), *small_bundles, small)
    stack.up()
    yield stack
    stack.down()


@pytest.fixture
def client(stack: Stack) -> Iterator[Client]:
    from headrace import Client

    with Client(data_dir=stack.data) as client:
        yield client


@pytest.fixture
def the_stack_lives_on(stack: Stack, client: Client) -> Iterator[None]:
    """After each test the same processes serve the next job, and nothing is left open."""
    assert stack.state is not None
    before = [(child.pid, child.restarts) for child in stack.state.children]
    yield
    assert client.submit("noop", np.zeros(1, np.float32)).result().version == 1
    stack.until(lambda: not stack.lag())
    assert stack.state is not None
    assert [(child.pid, child.restarts) for child in stack.state.children] == before
