"""The small models that run here: noop gives its input back, obey and hasty do as their payload says."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.conftest import DECODE, STEPS, TENSOR_YAML

OBEY = "[obey]"


def make_bundles(folder: Path) -> list[Path]:
    return [
        _tensor_bundle(folder, "noop", DECODE),
        _tensor_bundle(folder, "obey", OBEY),
    ]


def install_steps(folder: Path) -> Path:
    """A folder for PYTHONPATH with what a wheel of the step `obey` would install."""
    info = folder / "obedient-1.0.dist-info"
    info.mkdir(parents=True)
    shutil.copy(STEPS / "obedient.py", folder)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: obedient\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[headrace.steps]\nobey = obedient:obey\n")
    return folder


def _tensor_bundle(folder: Path, name: str, preprocess: str) -> Path:
    """x float32[N, D] to y, which is x."""
    import onnx
    from onnx import TensorProto, helper

    home = folder / name
    home.mkdir(parents=True)
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", "D"]) for n in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], name, [x], [y])
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), home / "model.onnx")
    text = TENSOR_YAML.format(name=name, version=1, preprocess=preprocess, more="")
    (home / "model.yaml").write_text(text)
    return home
