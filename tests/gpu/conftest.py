"""Tests on a real GPU. Without one they are skipped, and the run's last lines say so."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.engines.cuda import open_cuda
from pipelines.engines.machine_cache import MachineCache
from pipelines.engines.tensorrt import TensorRT
from schemas.errors import PipelineError
from tests.servers.process import NOT_TESTED


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
