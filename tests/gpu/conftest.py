"""Tests on a real GPU: `make test-gpu`. Without one they are skipped, and the run's last lines say so."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import pytest

from pipelines.engines.cuda import open_cuda
from pipelines.engines.engine import Engine
from pipelines.engines.machine_cache import MachineCache
from pipelines.engines.tensorrt import TensorRT
from schemas.errors import PipelineError
from tests.servers.process import NOT_TESTED

LIBRARIES = re.compile(r"tensorrt.*-bindings|cuda-bindings|pycuda|onnxruntime(-gpu)?|torch")


def pytest_report_header() -> list[str]:
    """Which GPU and which libraries: what a result is worth depends on them."""
    try:
        gpu = str(open_cuda().device())
    except PipelineError as error:
        gpu = f"none: {error.message}"
    found = set()
    for distribution in importlib.metadata.distributions():
        with suppress(TypeError, KeyError):  # left half installed
            name = distribution.metadata["Name"].lower().replace("_", "-")
            if LIBRARIES.fullmatch(name):
                found.add(f"{name} {distribution.version}")
    return [f"GPU: {gpu}", f"libraries: {', '.join(sorted(found))}"]


@pytest.fixture(scope="session", params=["tensorrt", "tensorrt-rtx"])
def backend(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TensorRT:
    """Of each library that is here, for the GPU that is here."""
    try:
        device = open_cuda().device()
        machine_cache = MachineCache(tmp_path_factory.mktemp("machine"))
        made = TensorRT(request.param, machine_cache=machine_cache)
    except PipelineError as error:
        pytest.skip(f"{NOT_TESTED} a GPU by {request.param}: {error.message}")
    if device.compute_capability == 90 and request.param == "tensorrt-rtx":
        pytest.skip(f"{NOT_TESTED} a GPU by tensorrt-rtx: it builds nothing for Hopper")
    return made


@pytest.fixture
def artefact(tmp_path: Path) -> Path:
    folder = tmp_path / "artefact"
    folder.mkdir()
    return folder


@pytest.fixture
def load(backend: TensorRT) -> Iterator[Callable[[Path], Engine]]:
    """`load(artefact)`: an engine, closed when the test ends."""
    with ExitStack() as loaded:
        yield lambda folder: loaded.enter_context(closing(backend.load(folder, threads=1)))
