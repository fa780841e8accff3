from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from pipelines.engines import digest as digest_module
from pipelines.engines.digest import model_digest
from schemas.errors import InvalidModel

MakeModel = Callable[..., Path]


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    return tmp_path / "notes"


def test_the_bytes_count_and_not_the_place(classifier: MakeModel, notes: Path) -> None:
    assert model_digest(classifier("a/x.onnx"), notes) == model_digest(
        classifier("b/y.onnx"), notes
    )
    other = classifier("c/x.onnx", seed=1)
    assert model_digest(other, notes) != model_digest(classifier("a/x.onnx"), notes)


def test_external_weights_count(classifier: MakeModel, notes: Path) -> None:
    model = classifier(external=True)
    graph_alone = model.read_bytes()
    before = model_digest(model, notes)
    classifier(external=True, seed=1)
    assert model.read_bytes() == graph_alone, "only the weights differ"
    assert model_digest(model, notes) != before


def test_nothing_is_read_again_until_a_file_changes(
    classifier: MakeModel, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest_module, "_SETTLED_NS", -(10**15))
    model = classifier(external=True)
    before = model_digest(model, notes)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", readable_only_in(notes))
        patched.setattr(digest_module, "sha256_of", lambda path: pytest.fail(f"{path} was hashed"))
        assert model_digest(model, notes) == before

    weights = model.parent / "weights.bin"
    times, content = weights.stat(), bytearray(weights.read_bytes())
    content[5] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert model_digest(model, notes) != before, "same path, size and date, other weights"


def readable_only_in(folder: Path) -> Callable[[Path], bytes]:
    read_bytes = Path.read_bytes

    def read(path: Path) -> bytes:
        assert path.is_relative_to(folder), f"{path} was read"
        return read_bytes(path)

    return read


def test_what_has_just_changed_is_hashed_again(
    classifier: MakeModel, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within one tick of the file system's clock two contents can have the same times."""
    monkeypatch.setattr(digest_module, "_SETTLED_NS", 10**15)
    model_digest(classifier(), notes)
    assert not notes.exists()


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b'{"stamps": {}, "digest": "0"}'])
def test_garbage_in_the_notes_is_ignored(
    classifier: MakeModel, notes: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.setattr(digest_module, "_SETTLED_NS", -(10**15))
    model = classifier()
    expected = model_digest(model, notes)
    [note] = notes.iterdir()
    note.write_bytes(content)
    assert model_digest(model, notes) == expected


def refer_to(model: Path, location: str) -> None:
    proto = onnx.load(model, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    model.write_bytes(proto.SerializeToString())


@pytest.mark.parametrize("where", ["../outside.bin", "{root}/outside.bin", "link.bin"])
def test_weights_outside_the_folder_are_refused(
    classifier: MakeModel, notes: Path, tmp_path: Path, where: str
) -> None:
    model = classifier(external=True)
    shutil.copy(model.parent / "weights.bin", tmp_path / "outside.bin")
    (model.parent / "link.bin").symlink_to(tmp_path / "outside.bin")
    refer_to(model, where.format(root=tmp_path))
    with pytest.raises(InvalidModel, match="inside its folder") as refused:
        model_digest(model, notes)
    assert refused.value.code == "external_data_outside"


def test_missing_files_are_named(classifier: MakeModel, notes: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match=r"none\.onnx"):
        model_digest(tmp_path / "none.onnx", notes)
    model = classifier(external=True)
    (model.parent / "weights.bin").unlink()
    with pytest.raises(InvalidModel, match=r"'weights\.bin'") as refused:
        model_digest(model, notes)
    assert refused.value.code == "missing_external_data"


def test_what_is_no_protobuf_is_refused(notes: Path, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(InvalidModel) as refused:
        model_digest(tmp_path / "model.onnx", notes)
    assert refused.value.code == "unusable_onnx"


def test_weights_deep_inside_the_graph_count(
    save_graph: MakeModel, notes: Path, tmp_path: Path
) -> None:
    def external(name: str) -> onnx.TensorProto:
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1])
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=f"{name}.bin")
        (tmp_path / f"{name}.bin").write_bytes(b"\0\0\0\0")
        return tensor

    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    constant = helper.make_node("Constant", [], ["y"], value=external("in_node"))
    inner = helper.make_graph([constant], "inner", [], [y], [external("in_branch")])
    graph = helper.make_graph(
        [helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)],
        "outer",
        [helper.make_tensor_value_info("c", TensorProto.BOOL, [])],
        [y],
    )
    model = save_graph("model.onnx", graph)
    digests = {model_digest(model, notes)}
    for name in ("in_node", "in_branch"):
        (tmp_path / f"{name}.bin").write_bytes(b"\1\1\1\1")
        digests.add(model_digest(model, notes))
    assert len(digests) == 3


def test_notes_of_models_that_are_gone_do_not_pile_up(
    classifier: MakeModel, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest_module, "_SETTLED_NS", -(10**15))
    monkeypatch.setattr(digest_module, "NOTES_KEPT", 2)
    models = [classifier(f"{number}/model.onnx") for number in range(4)]
    for age_s, model in zip((30, 20, 10, 0), models, strict=True):
        model_digest(model, notes)
        newest = max(notes.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        times = newest.stat()
        os.utime(newest, (times.st_atime - age_s, times.st_mtime - age_s))
    assert len(list(notes.iterdir())) == 2
    monkeypatch.setattr(digest_module, "sha256_of", lambda path: pytest.fail("hashed"))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", readable_only_in(notes))
        assert model_digest(models[-1], notes) == model_digest(models[-2], notes)
