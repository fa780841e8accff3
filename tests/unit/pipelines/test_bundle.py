from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipelines.bundle import Bundle
from schemas.errors import InvalidModel


def spoil(folder: Path, good: str, bad: str) -> None:
    text = (folder / "model.yaml").read_text()
    assert good in text
    (folder / "model.yaml").write_text(text.replace(good, bad))


def refusal(folder: Path) -> InvalidModel:
    with pytest.raises(InvalidModel) as caught:
        Bundle.open(folder)
    return caught.value


def external(name: str, location: str) -> TensorProto:
    tensor = numpy_helper.from_array(np.zeros(3, np.float32), name)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return tensor


def test_a_good_bundle_opens(bundle_folder: Path) -> None:
    bundle = Bundle.open(bundle_folder)
    assert bundle.config.name == "tiny"
    assert bundle.files() == ["model.onnx", "model.yaml"]
    assert bundle.labels == []
    assert bundle.size_bytes == sum(p.stat().st_size for p in bundle_folder.iterdir())


def test_a_folder_without_a_model_yaml_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path).code == "model_yaml_missing"
    assert refusal(tmp_path / "absent").code == "model_yaml_missing"


@pytest.mark.parametrize(
    "more", ["labels: absent.txt", "tokenizer: absent.json", "sample: absent.png"]
)
def test_a_missing_file_is_named_with_the_line_that_wants_it(
    bundle_folder: Path, more: str
) -> None:
    yaml = bundle_folder / "model.yaml"
    yaml.write_text(yaml.read_text().rstrip() + "\n" + more)
    error = refusal(bundle_folder)
    assert error.code == "model_file_missing"
    assert f"{yaml}:8: '{more.split()[1]}'" in error.message


def test_a_missing_engine_file_is_named_with_its_line(bundle_folder: Path) -> None:
    (bundle_folder / "model.onnx").unlink()
    error = refusal(bundle_folder)
    assert error.code == "model_file_missing"
    assert "model.yaml:5: 'model.onnx'" in error.message


@pytest.mark.parametrize("name", ["../outside.onnx", "sub/../../outside.onnx", "{absolute}"])
def test_a_name_that_leads_outside_is_refused(bundle_folder: Path, name: str) -> None:
    outside = bundle_folder.parent / "outside.onnx"
    (bundle_folder / "model.onnx").rename(outside)
    spoil(bundle_folder, "file: model.onnx", f"file: {name.format(absolute=outside)}")
    assert refusal(bundle_folder).code == "model_file_outside"


def test_an_absolute_name_is_refused_even_inside(bundle_folder: Path) -> None:
    spoil(bundle_folder, "file: model.onnx", f"file: {bundle_folder}/model.onnx")
    assert refusal(bundle_folder).code == "model_file_outside"


def test_a_link_that_leads_outside_is_refused(bundle_folder: Path) -> None:
    outside = bundle_folder.parent / "outside.onnx"
    (bundle_folder / "model.onnx").rename(outside)
    (bundle_folder / "model.onnx").symlink_to(outside)
    assert refusal(bundle_folder).code == "model_file_outside"


def test_a_linked_folder_that_leads_outside_is_refused_when_files_are_listed(
    bundle_folder: Path,
) -> None:
    (bundle_folder / "more").symlink_to(bundle_folder.parent)
    with pytest.raises(InvalidModel) as caught:
        Bundle.open(bundle_folder).files()
    assert caught.value.code == "model_file_outside"


@pytest.mark.parametrize("name", ["loop", "a\0b", "x" * 5000, "sub", "pipe"])
def test_what_is_no_file_is_refused(bundle_folder: Path, name: str) -> None:
    (bundle_folder / "loop").symlink_to("loop")
    (bundle_folder / "sub").mkdir()
    os.mkfifo(bundle_folder / "pipe")
    with pytest.raises(InvalidModel) as caught:
        Bundle.open(bundle_folder).path(name)
    assert caught.value.code == "model_file_missing"


def test_a_bundle_that_is_itself_behind_a_link_opens(bundle_folder: Path) -> None:
    link = bundle_folder.parent / "link"
    link.symlink_to(bundle_folder)
    assert Bundle.open(link).path("model.onnx").is_file()


def test_labels_come_from_a_file_or_from_the_yaml(bundle_folder: Path) -> None:
    yaml = bundle_folder / "model.yaml"
    text = yaml.read_text()
    (bundle_folder / "labels.txt").write_text("\ufeffcat\r\ntabby cat \n\nlast\n\n")
    yaml.write_text(text + "labels: labels.txt\n")
    assert Bundle.open(bundle_folder).labels == ["cat", "tabby cat", "", "last"]
    yaml.write_text(text + "labels: [cat, dog]\n")
    assert Bundle.open(bundle_folder).labels == ["cat", "dog"]


def test_labels_that_are_not_utf8_are_refused(bundle_folder: Path) -> None:
    (bundle_folder / "labels.txt").write_bytes(b"caf\xe9\n")
    spoil(bundle_folder, "version: 1", "version: 1\nlabels: labels.txt")
    with pytest.raises(InvalidModel, match="one label a line"):
        _ = Bundle.open(bundle_folder).labels


def _rename(folder: Path) -> None:
    (folder / "extra.txt").rename(folder / "other.txt")


def _move_bytes(folder: Path) -> None:
    (folder / "extra.txt").write_text("on")
    (folder / "extra2.txt").write_text("etwo")


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "extra.txt").write_text("2"),
        lambda folder: (folder / "extra3.txt").write_text(""),
        _rename,
        _move_bytes,
    ],
)
def test_every_change_changes_the_digest(
    bundle_folder: Path, change: Callable[[Path], object]
) -> None:
    (bundle_folder / "extra.txt").write_text("one")
    (bundle_folder / "extra2.txt").write_text("two")
    before = Bundle.open(bundle_folder).digest
    assert before == Bundle.open(bundle_folder).digest
    change(bundle_folder)
    assert Bundle.open(bundle_folder).digest != before


def test_the_digest_is_of_the_content_and_not_of_the_place(bundle_folder: Path) -> None:
    before = Bundle.open(bundle_folder).digest
    assert Bundle.open(bundle_folder.rename(bundle_folder.parent / "moved")).digest == before


def test_weights_beside_the_graph_are_found_from_its_own_folder(
    bundle_folder: Path, identity_graph: onnx.ModelProto
) -> None:
    identity_graph.graph.initializer.append(external("w", "w.bin"))
    (bundle_folder / "graphs").mkdir()
    onnx.save_model(identity_graph, bundle_folder / "graphs" / "model.onnx")
    spoil(bundle_folder, "file: model.onnx", "file: graphs/model.onnx")
    assert refusal(bundle_folder).code == "model_file_missing"
    (bundle_folder / "graphs" / "w.bin").write_bytes(bytes(12))
    Bundle.open(bundle_folder)


def _branch(location: str) -> onnx.GraphProto:
    node = helper.make_node("Identity", ["w"], ["b"])
    out = helper.make_tensor_value_info("b", TensorProto.FLOAT, [3])
    return helper.make_graph([node], "branch", [], [out], [external("w", location)])


def _in_initializer(model: onnx.ModelProto, location: str) -> None:
    model.graph.initializer.append(external("w", location))


def _in_sparse_initializer(model: onnx.ModelProto, location: str) -> None:
    model.graph.sparse_initializer.add().values.CopyFrom(external("w", location))


def _in_constant(model: onnx.ModelProto, location: str) -> None:
    model.graph.node.append(helper.make_node("Constant", [], ["w"], value=external("w", location)))


def _in_subgraph(model: onnx.ModelProto, location: str) -> None:
    inner = helper.make_node("If", ["c"], ["o"], then_branch=_branch(location))
    out = helper.make_tensor_value_info("o", TensorProto.FLOAT, [3])
    outer = helper.make_graph([inner], "outer", [], [out])
    model.graph.node.append(helper.make_node("If", ["c"], ["o"], then_branch=outer))


def _in_function(model: onnx.ModelProto, location: str) -> None:
    node = helper.make_node("Constant", [], ["w"], value=external("w", location))
    model.functions.append(
        helper.make_function("own", "F", [], ["w"], [node], [helper.make_opsetid("", 17)])
    )


PLACES = [_in_initializer, _in_sparse_initializer, _in_constant, _in_subgraph, _in_function]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("location", ["../secret.bin", "{absolute}", "link.bin"])
def test_weights_outside_the_bundle_are_refused_wherever_the_graph_names_them(
    bundle_folder: Path,
    identity_graph: onnx.ModelProto,
    place: Callable[[onnx.ModelProto, str], None],
    location: str,
) -> None:
    secret = bundle_folder.parent / "secret.bin"
    secret.write_bytes(bytes(12))
    (bundle_folder / "link.bin").symlink_to(secret)
    place(identity_graph, location.format(absolute=secret))
    onnx.save_model(identity_graph, bundle_folder / "model.onnx")
    error = refusal(bundle_folder)
    assert error.code == "model_file_outside"
    assert "model.yaml:5" in error.message


def test_weights_at_a_memory_address_are_refused(
    bundle_folder: Path, identity_graph: onnx.ModelProto
) -> None:
    address = bundle_folder / "*" / "_ORT_MEM_ADDR_" / "*"
    address.parent.mkdir(parents=True)
    address.write_bytes(b"")
    _in_initializer(identity_graph, "*/_ORT_MEM_ADDR_/*")
    onnx.save_model(identity_graph, bundle_folder / "model.onnx")
    assert refusal(bundle_folder).code == "model_file_outside"


@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"<html>", bytes(range(256)) * 9])
def test_an_engine_file_that_is_no_graph_is_refused(bundle_folder: Path, content: bytes) -> None:
    (bundle_folder / "model.onnx").write_bytes(content)
    assert refusal(bundle_folder).code == "model_onnx_invalid"


def test_a_truncated_graph_is_refused(bundle_folder: Path) -> None:
    graph = bundle_folder / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-20])
    assert refusal(bundle_folder).code == "model_onnx_invalid"


def test_graphs_of_a_bundle_taken_in_before_need_not_be_parsed_again(bundle_folder: Path) -> None:
    (bundle_folder / "model.onnx").write_bytes(b"not looked at")
    assert Bundle.open(bundle_folder, check_graphs=False).config.name == "tiny"
