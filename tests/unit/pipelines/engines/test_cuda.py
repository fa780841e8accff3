"""Buffers, streams and graphs through real bindings, on a driver that is 150 lines of C."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipelines.engines import cuda as cuda_module
from pipelines.engines.cuda import Buffer, Cuda, open_cuda
from pipelines.engines.engine import DeviceOutOfMemory
from schemas.errors import PipelineError
from tests.servers.process import NOT_TESTED
from tests.unit.pipelines.engines.tensorrt_fake import FakeCuda

HERE = Path(__file__).parent
LIBRARIES = {
    "pycuda": """if True:
    import os, sys
    sys.setdlopenflags(os.RTLD_LAZY)  # or each function that pycuda knows would have to be there
    from pipelines.engines.cuda_pycuda import PyCuda as Library
""",
    "cuda": "from pipelines.engines.cuda_bindings import CudaBindings as Library",
}

COMMON = """if True:
    import numpy as np, threading
    from pipelines.engines.cuda import Buffer, Device
    from pipelines.engines.engine import DeviceOutOfMemory
    from schemas.errors import Transient
    cuda = Library()
    floats = np.dtype(np.float32)
"""

ROUND_TRIP = """if True:
    assert cuda.device() == Device("Fake GPU", 89, 1 << 20, 13000)
    with cuda.active():
        stream = cuda.new_stream()
        sent, back = Buffer(cuda, 64), Buffer(cuda, 64)
        sent.shape((2, 3), floats)[...] = [[1, 2, 3], [4, 5, 6]]
        sent.copy_in(stream)
        assert isinstance(sent.pointer, int) and isinstance(stream, int)
        answer = back.shape((6,), floats)
        cuda.copy_out(answer.view(np.uint8), sent.pointer, stream)
        assert not answer.any(), "nothing has happened yet"
        cuda.wait(stream)
        assert answer.tolist() == [1, 2, 3, 4, 5, 6]
        sent.shape((0, 3), floats)
        sent.copy_in(stream)
        sent.free(), back.free(), cuda.free_stream(stream)
"""

THREADS = """if True:
    # The context is retained once, however many threads want it first.
    fresh, first = Library(), threading.Barrier(2)
    retained = []
    if hasattr(fresh._device, "retain_primary_context"):
        class Device:
            def retain_primary_context(self, real=fresh._device):
                retained.append(1)
                try:
                    first.wait(0.2)
                except threading.BrokenBarrierError:
                    pass
                return real.retain_primary_context()
        fresh._device = Device()
    def enter():
        with fresh.active():
            pass
    threads = [threading.Thread(target=enter) for _ in range(2)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert len(retained) <= 1, retained
    def work():
        with cuda.active():
            stream = cuda.new_stream()
            buffer = Buffer(cuda, 1000)
            buffer.copy_in(stream)
            cuda.wait(stream)
            buffer.free(), cuda.free_stream(stream)
        done.append(1)
    done = []
    threads = [threading.Thread(target=work) for _ in range(8)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert len(done) == 8
    try:
        cuda.allocate(1)
    except Transient as error:
        assert error.code == "device_failed", error
    else:
        raise AssertionError("a thread without the context")
"""

OUT_OF_MEMORY = """if True:
    with cuda.active():
        for _ in range(3):
            try:
                Buffer(cuda, 2 << 20)
            except DeviceOutOfMemory as error:
                assert "cuMemAlloc says CUDA_ERROR_OUT_OF_MEMORY" in error.message, error
            else:
                raise AssertionError
        Buffer(cuda, 1 << 20).free()
        Buffer(cuda, 1 << 20).free()
"""

GRAPH = """if True:
    with cuda.active():
        stream = cuda.new_stream()
        sent, back = Buffer(cuda, 8), Buffer(cuda, 8)
        numbers, answer = sent.shape((2,), floats), back.shape((2,), floats)
        def work():
            sent.copy_in(stream)
            cuda.copy_out(answer.view(np.uint8), sent.pointer, stream)
        graph = cuda.capture(work, stream)
        cuda.wait(stream)
        for n in range(3):
            numbers[:] = n, n + 1
            cuda.launch(graph, stream)
            cuda.wait(stream)
            assert answer.tolist() == [n, n + 1]
        def broken():
            raise ZeroDivisionError
        try:
            cuda.capture(broken, stream)
        except ZeroDivisionError:
            pass
        again = cuda.capture(work, stream)
        cuda.free_graph(graph), cuda.free_graph(again)
        sent.free(), back.free(), cuda.free_stream(stream)
"""


FAILED = """if True:
    import ctypes
    driver = ctypes.CDLL("libcuda.so.1")
    with cuda.active():
        stream = cuda.new_stream()
        driver.fake_fail()
        for call in (lambda: cuda.wait(stream), cuda.check):
            try:
                call()
            except Transient as error:
                assert error.code == "device_failed", error
            else:
                raise AssertionError("a device that failed")
"""

SCRIPTS = [COMMON, ROUND_TRIP, THREADS, OUT_OF_MEMORY, GRAPH, FAILED]
"""In one process, for the time that it takes to start."""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip(f"{NOT_TESTED} the bindings of CUDA: that takes Linux and a C compiler")
    folder = tmp_path_factory.mktemp("driver")
    library = folder / "libcuda.so.1"
    options = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-ldl"]
    subprocess.run([compiler, HERE / "cuda_fake.c", "-o", library, *options], check=True)
    return folder


@pytest.mark.parametrize("library", LIBRARIES)
def test_what_the_executor_needs_of_cuda(driver: Path, library: str) -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{NOT_TESTED} {library}: it is not installed")
    toolkit = os.environ.get("LD_LIBRARY_PATH", "/nowhere")  # pycuda wants its cuRAND
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([LIBRARIES[library], *SCRIPTS])],
        env=os.environ | {"LD_LIBRARY_PATH": f"{driver}:{toolkit}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


# ── which library, and what is missing ──────────────────────────────────────────────────────────


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """By module what it gives when it is imported: a class, or an error to raise."""
    given: dict[str, object] = {}

    class Module:
        def __init__(self, name: str) -> None:
            self._given = given[name.rpartition("_")[2]]
            if isinstance(self._given, ImportError):
                raise self._given

        def __getattr__(self, name: str) -> object:
            return self._given

    monkeypatch.setattr(cuda_module.importlib, "import_module", Module)
    open_cuda.cache_clear()
    return given


def without_a_driver() -> Cuda:
    raise RuntimeError("libcuda.so.1 is not there")


def test_pycuda_is_taken_before_cuda_bindings(libraries: dict[str, object]) -> None:
    bindings = FakeCuda()
    libraries.update(pycuda=FakeCuda, bindings=lambda: bindings)
    assert open_cuda() is not bindings
    open_cuda.cache_clear()
    libraries.update(pycuda=ImportError("No module named 'pycuda'"))
    assert open_cuda() is bindings
    assert open_cuda() is bindings, "one for the process"


def test_what_is_missing_is_said_for_each_library(libraries: dict[str, object]) -> None:
    libraries.update(pycuda=ImportError("libcuda.so.1"), bindings=without_a_driver)
    for _ in range(2):  # it is not remembered: a driver may come
        with pytest.raises(
            PipelineError, match=r"pycuda: libcuda\.so\.1; cuda-bindings: libcuda"
        ) as e:
            open_cuda()
        assert e.value.code == "device_missing"


# ── buffers ─────────────────────────────────────────────────────────────────────────────────────


def test_a_buffer_that_gets_no_pinned_memory_gives_its_device_memory_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = FakeCuda()

    def none_left(size_bytes: int) -> None:
        raise DeviceOutOfMemory("Expected room")

    monkeypatch.setattr(cuda, "pinned", none_left)
    with cuda.active(), pytest.raises(DeviceOutOfMemory):
        Buffer(cuda, 100)
    assert cuda.holds_nothing


def test_only_what_a_tensor_takes_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    with cuda.active():
        stream = cuda.new_stream()
        buffer = Buffer(cuda, 64)
        assert not buffer.array.any(), "begins with zeros, which are good values of any type"
        buffer.shape((3,), np.dtype(np.float16))[...] = 1
        buffer.copy_in(stream)
        cuda.wait(stream)
        assert (cuda.memory[buffer.pointer][6:] == 0xFF).all()
