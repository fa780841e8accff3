"""Tests on a real GPU. Without one they are skipped, and the run's last lines say so."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.engines.tensorrt import TensorRT, probe
from tests.servers.process import NOT_TESTED


@pytest.fixture(scope="session", params=["tensorrt", "tensorrt-rtx"])
def backend(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TensorRT:
    """Of each library that is here, for the GPU that is here."""
    found = probe(request.param)
    if found.missing:
        pytest.skip(
            f"{NOT_TESTED} a GPU by {request.param}: it is not here. To test it: pip install "
            f"'headrace[{request.param}]' on a machine with an NVIDIA GPU"
        )
    made = TensorRT(request.param, machine_cache=tmp_path_factory.mktemp("machine"))
    if found.device and request.param == "tensorrt-rtx" and found.device.compute_capability == 90:
        pytest.skip(f"{NOT_TESTED} a GPU by tensorrt-rtx: it builds nothing for Hopper")
    return made


@pytest.fixture
def artefact(tmp_path: Path) -> Path:
    folder = tmp_path / "artefact"
    folder.mkdir()
    return folder
