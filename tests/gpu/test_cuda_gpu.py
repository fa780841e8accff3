"""CUDA on a GPU, by each library that is here: buffers, streams, graphs, memory that ends, and a device
that fails. Needs no TensorRT."""

from __future__ import annotations

import importlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pipelines.engines.cuda import _LIBRARIES, Buffer, Cuda
from pipelines.engines.engine import DeviceOutOfMemory
from schemas.errors import PipelineError, Transient
from tests.servers.process import NOT_TESTED

ROOT = Path(__file__).parents[2]
TOO_MUCH = 1 << 44
"""16 TiB."""

FLOATS = np.dtype(np.float32)


@pytest.fixture(scope="module", params=_LIBRARIES)
def cuda(request: pytest.FixtureRequest) -> Cuda:
    module, name = _LIBRARIES[request.param]
    try:
        made: Cuda = getattr(importlib.import_module(module), name)()
        made.device()
    except (ImportError, OSError, RuntimeError, PipelineError) as error:
        pytest.skip(f"{NOT_TESTED} a GPU by {request.param}: {error}")
    return made


@pytest.fixture
def stream(cuda: Cuda) -> Iterator[int]:
    """The context is this thread's for the length of the test."""
    with cuda.active():
        made = cuda.new_stream()
        yield made
        cuda.free_stream(made)


class Echo:
    """What is written into `sent` comes back in `back`."""

    def __init__(self, cuda: Cuda, stream: int, shape: tuple[int, ...]) -> None:
        self._cuda, self._stream = cuda, stream
        size = max(int(np.prod(shape)), 1) * FLOATS.itemsize
        self._there, self._back = Buffer(cuda, size), Buffer(cuda, size)
        self.sent, self.back = self._there.shape(shape, FLOATS), self._back.shape(shape, FLOATS)

    def enqueue(self) -> None:
        self._there.copy_in(self._stream)
        if self.back.size:
            host = self.back.reshape(-1).view(np.uint8)
            self._cuda.copy_out(host, self._there.pointer, self._stream)

    def free(self) -> None:
        self._there.free()
        self._back.free()


def test_the_device_is_described(cuda: Cuda) -> None:
    device = cuda.device()
    assert device.name
    assert 50 <= device.compute_capability < 200
    assert device.memory_bytes > 1 << 30
    assert device.driver >= 12000


@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (1024, 1024)])
def test_what_is_sent_comes_back(cuda: Cuda, stream: int, shape: tuple[int, ...]) -> None:
    echo = Echo(cuda, stream, shape)
    echo.sent[...] = np.random.default_rng(0).standard_normal(shape)
    echo.enqueue()
    cuda.wait(stream)
    assert np.array_equal(echo.sent, echo.back)
    echo.free()


def test_a_graph_is_replayed_with_what_lies_in_its_buffers_then(cuda: Cuda, stream: int) -> None:
    echo = Echo(cuda, stream, (1000,))
    graph = cuda.capture(echo.enqueue, stream)
    echo.back[...] = -1
    cuda.wait(stream)
    assert (echo.back == -1).all(), "what is captured does not happen"
    for number in range(50):
        echo.sent[...] = number
        cuda.launch(graph, stream)
        cuda.wait(stream)
        assert (echo.back == number).all()
    cuda.free_graph(graph)
    echo.free()


def test_a_capture_that_fails_leaves_the_stream_as_good_as_before(cuda: Cuda, stream: int) -> None:
    echo = Echo(cuda, stream, (8,))
    with pytest.raises(Transient):
        cuda.capture(lambda: cuda.free(cuda.allocate(1 << 20)), stream)
    with pytest.raises(ZeroDivisionError):
        cuda.capture(lambda: 1 // 0, stream)  # type: ignore[arg-type,return-value]
    echo.sent[...] = 3
    graph = cuda.capture(echo.enqueue, stream)
    cuda.launch(graph, stream)
    cuda.wait(stream)
    assert (echo.back == 3).all()
    cuda.free_graph(graph)
    echo.free()


def test_other_threads_allocate_and_copy_while_one_captures(cuda: Cuda, stream: int) -> None:
    echo = Echo(cuda, stream, (8,))

    def elsewhere() -> None:
        with cuda.active():
            other = cuda.new_stream()
            there = Echo(cuda, other, (1 << 16,))
            there.enqueue()
            cuda.wait(other)
            there.free()
            cuda.free_stream(other)

    def work() -> None:
        echo.enqueue()
        with ThreadPoolExecutor(1) as thread:
            thread.submit(elsewhere).result(30)

    graph = cuda.capture(work, stream)
    echo.sent[...] = 4
    cuda.launch(graph, stream)
    cuda.wait(stream)
    assert (echo.back == 4).all()
    cuda.free_graph(graph)
    echo.free()


def test_many_threads_with_streams_of_their_own(cuda: Cuda) -> None:
    def work(number: int) -> bool:
        with cuda.active():
            stream = cuda.new_stream()
            echo = Echo(cuda, stream, (1 << 18,))
            right = True
            for turn in range(20):
                echo.sent[...] = number + turn
                echo.enqueue()
                cuda.wait(stream)
                right &= bool((echo.back == number + turn).all())
            echo.free()
            cuda.free_stream(stream)
        return right

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(work, range(32)))


def test_memory_that_ends_may_be_asked_for_again(cuda: Cuda, stream: int) -> None:
    for ask in (cuda.allocate, cuda.pinned):
        with pytest.raises(DeviceOutOfMemory):
            ask(TOO_MUCH)
    echo = Echo(cuda, stream, (8,))
    echo.enqueue()
    cuda.wait(stream)
    echo.free()


def test_a_thread_without_the_context_is_refused(cuda: Cuda) -> None:
    refused: list[str] = []

    def work() -> None:
        try:
            cuda.allocate(1)
        except Transient as error:
            refused.append(error.code)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert refused == ["device_failed"]


FAIL = """if True:
    import importlib, sys
    from pipelines.engines.cuda import Buffer
    from schemas.errors import InferenceFailed, Transient
    from tests.gpu.trap import trap
    cuda = getattr(importlib.import_module(sys.argv[1]), sys.argv[2])()
    def blamed():
        with cuda.working():
            raise InferenceFailed("engine_failed", "Expected it to run.")
    with cuda.active():
        stream = cuda.new_stream()
        cuda.check()
        trap(stream)
        codes = []
        for call in (lambda: cuda.wait(stream), cuda.check, lambda: cuda.allocate(8), blamed):
            try:
                call()
            except Transient as error:
                codes.append(error.code)
    assert codes == ["device_failed"] * 4, codes
    print("ended well")
"""


def test_a_device_that_failed_is_said_to_have(cuda: Cuda, request: pytest.FixtureRequest) -> None:
    """In a process of its own, because it stays so."""
    command = [sys.executable, "-c", FAIL, *_LIBRARIES[request.node.callspec.params["cuda"]]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "ended well" in done.stdout, done.stderr
