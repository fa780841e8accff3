"""From a folder with a model.yaml to a model that answers. The bundles are a user's own: small
graphs that the project does not ship, described by YAML alone."""

from __future__ import annotations

import io
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from infra.catalogue import Catalogue, card_key, files_folder
from infra.objects import ObjectStore
from infra.objects.files import FileObjects
from pipelines import registry
from pipelines.bundle import Bundle
from pipelines.engines import Engines
from pipelines.engines.cache import EngineCache
from pipelines.model import LoadedModel
from schemas.errors import InvalidJob, InvalidModel, Transient
from schemas.payloads import Ref

BUDGET_BYTES = 1 << 30

COLOURS_YAML = """\
name: colours
version: 1
modality: image
description: The main colour of a picture
engines:
  main: {file: colours.onnx}
labels: labels.txt
preprocess:
  - decode_image: {mode: RGB}
  - resize: {size: 8}
  - to_tensor: {input: pixels, scale: 255}
postprocess:
  - softmax: {output: scores}
  - top_k: {k: 2}
batch: {buckets: [1, 4]}
"""

MOODS_YAML = """\
name: moods
version: 1
modality: text
engines:
  main: {file: moods.onnx}
labels: [sad, glad]
tokenizer: tokenizer.json
preprocess:
  - decode_text
  - tokenize: {max_tokens: 16, inputs: {ids: ids, mask: mask}}
postprocess:
  - softmax: {output: scores}
  - top_k
"""


def save_graph(
    path: Path,
    inputs: dict[str, tuple[int, list[int | str]]],
    nodes: list[onnx.NodeProto],
    weights: dict[str, np.ndarray[Any, Any]],
) -> None:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, *spec) for name, spec in inputs.items()],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", "C"])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), path)


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """scores = 10 times the mean of each channel."""
    folder = tmp_path / "colours"
    folder.mkdir()
    save_graph(
        folder / "colours.onnx",
        {"pixels": (TensorProto.FLOAT, ["N", 3, 8, 8])},
        [
            helper.make_node("ReduceMean", ["pixels"], ["means"], axes=[2, 3], keepdims=0),
            helper.make_node("Mul", ["means", "ten"], ["scores"]),
        ],
        {"ten": np.array(10, np.float32)},
    )
    (folder / "labels.txt").write_text("red\ngreen\nblue\n")
    (folder / "model.yaml").write_text(COLOURS_YAML)
    return folder


@pytest.fixture
def moods(tmp_path: Path) -> Path:
    """scores = the sum of a weight pair of each word; a mask keeps padding out."""
    folder = tmp_path / "moods"
    folder.mkdir()
    words = {"?": 0, "rain": 1, "tears": 2, "sun": 3, "cake": 4}
    weights = np.array([[0, 0], [3, 0], [3, 0], [0, 3], [0, 3]], np.float32)
    rows: list[int | str] = ["N", "S"]
    save_graph(
        folder / "moods.onnx",
        {"ids": (TensorProto.INT64, rows), "mask": (TensorProto.INT64, rows)},
        [
            helper.make_node("Gather", ["weights", "ids"], ["words"]),
            helper.make_node("Cast", ["mask"], ["kept"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["kept", "last"], ["kept_pairs"]),
            helper.make_node("Mul", ["words", "kept_pairs"], ["known"]),
            helper.make_node("ReduceSum", ["known", "middle"], ["scores"], keepdims=0),
        ],
        {"weights": weights, "last": np.array([2]), "middle": np.array([1])},
    )
    tokenizer = Tokenizer(WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "model.yaml").write_text(MOODS_YAML)
    return folder


@pytest.fixture
def objects(tmp_path: Path) -> FileObjects:
    return FileObjects(tmp_path / "objects")


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "engines", 1 << 30)


Add = Callable[..., registry.Added]


@pytest.fixture
def add(objects: FileObjects, cache: EngineCache) -> Add:
    def add(folder: Path, objects: ObjectStore = objects, **options: Any) -> registry.Added:
        return registry.add(
            folder, objects, Engines(cache), **{"budget_bytes": BUDGET_BYTES, **options}
        )

    return add


@pytest.fixture
def answers(objects: FileObjects, cache: EngineCache) -> Callable[[str, list[bytes]], list[Any]]:
    """What the installed model says to a batch: a worker's way, from the catalogue alone."""

    def answers(name: str, payloads: list[bytes]) -> list[Any]:
        catalogue = Catalogue(objects)
        bundle = Bundle.open(catalogue.folder(catalogue.resolve(name)), check_graphs=False)
        config = bundle.config
        engine = (
            Engines(cache)
            .obtain(
                bundle.path(config.engines["main"].file),
                config.engines["main"],
                config.batch.buckets,
            )
            .load()
        )
        model = LoadedModel(bundle, {"main": engine})
        rows = model.infer([model.decode(p, "application/octet-stream", {}) for p in payloads])
        encoded = [model.encode(row) for row in rows]
        engine.close()
        return [msgspec.json.decode(answer) for answer in encoded]

    return answers


def png(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 30), colour).save(file, "PNG")
    return file.getvalue()


def change(folder: Path, old: str, new: str) -> None:
    path = folder / "model.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_an_image_classifier_of_ones_own_is_added_by_yaml_and_answers(
    colours: Path, add: Add, answers: Callable[[str, list[bytes]], list[Any]]
) -> None:
    added = add(colours)
    assert added.new
    found = answers("colours", [png("blue"), png("red"), png("#00ff00")])
    assert [answer["label"] for answer in found] == ["blue", "red", "green"]
    assert found[0]["type"] == "classification"
    assert found[0]["probability"] == pytest.approx(1 / (1 + 2 * np.exp(-10)))
    assert len(found[0]["top"]) == 2


def test_a_text_classifier_of_ones_own_is_added_by_yaml_and_answers(
    moods: Path, add: Add, answers: Callable[[str, list[bytes]], list[Any]]
) -> None:
    add(moods)
    found = answers("moods", [b"tears and rain", b"cake", b"so much sun and cake"])
    assert [answer["label"] for answer in found] == ["sad", "glad", "glad"]
    assert found[1]["probability"] == pytest.approx(1 / (1 + np.exp(-3)))


def test_the_card_says_what_model_yaml_says(colours: Path, add: Add, objects: FileObjects) -> None:
    card = add(colours).card
    assert (card.name, card.version, card.modality, card.tier) == (
        "colours",
        1,
        "image",
        "standard",
    )
    assert card.description == "The main colour of a picture"
    assert card.batch.buckets == (1, 4)
    assert card.digest == Bundle.open(colours).digest
    assert card.size_bytes == sum(path.stat().st_size for path in colours.iterdir())
    assert card.memory_bytes > 0, "as its engines were loaded"
    assert Catalogue(objects).resolve("colours") == card


def test_the_installed_copy_is_the_whole_bundle(
    colours: Path, add: Add, objects: FileObjects
) -> None:
    (colours / "more").mkdir()
    (colours / "more" / "about.txt").write_text("whatever")
    card = add(colours).card
    copy = Catalogue(objects).folder(card)
    assert (copy / "more" / "about.txt").read_text() == "whatever"
    assert Bundle.open(copy).digest == card.digest


def test_weights_beside_the_graph_are_installed_with_it(
    moods: Path, add: Add, answers: Callable[[str, list[bytes]], list[Any]]
) -> None:
    model = onnx.load(moods / "moods.onnx")
    onnx.save(
        model,
        moods / "moods.onnx",
        save_as_external_data=True,
        location="moods.weights",
        size_threshold=64,
    )
    assert (moods / "moods.weights").exists()
    add(moods)
    assert answers("moods", [b"rain"])[0]["label"] == "sad"


def test_stages_are_told_in_order(colours: Path, add: Add) -> None:
    stages: list[str] = []
    add(colours, on_stage=stages.append)
    assert stages == ["validate", "build", "check", "install"]
    stages.clear()
    add(colours, on_stage=stages.append)
    assert stages == ["validate"]


def test_the_same_content_again_changes_nothing(
    colours: Path, add: Add, objects: FileObjects
) -> None:
    first = add(colours)
    before = list(objects.list())
    again = add(colours)
    assert (again.card, again.new) == (first.card, False)
    assert list(objects.list()) == before


def test_other_content_needs_another_version(colours: Path, add: Add, objects: FileObjects) -> None:
    first = add(colours).card
    change(colours, "k: 2", "k: 3")
    with pytest.raises(InvalidModel, match=r"model.yaml:2: .* raise `version`") as caught:
        add(colours)
    assert caught.value.code == "version_exists"
    change(colours, "version: 1", "version: 2")
    second = add(colours).card
    assert Catalogue(objects).cards() == [first, second]


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("file: colours.onnx", "file: none.onnx", "model_file_missing"),
        ("labels: labels.txt", "labels: [one]", "model_check_failed"),
        ("output: scores", "output: none", "model_check_failed"),
        ("size: 8", "size: 9", "model_check_failed"),
        ("modality: image", "modality: smell", "model_yaml_invalid"),
    ],
)
def test_a_model_that_does_not_answer_is_not_installed(
    colours: Path, add: Add, objects: FileObjects, old: str, new: str, code: str
) -> None:
    change(colours, old, new)
    with pytest.raises(InvalidModel) as caught:
        add(colours)
    assert caught.value.code == code
    assert list(objects.list()) == []


def test_a_file_that_no_object_can_be_called_after_is_refused(
    colours: Path, add: Add, objects: FileObjects
) -> None:
    (colours / "50%.txt").write_text("")
    with pytest.raises(InvalidModel, match=r"'50%\.txt' .* rename it") as caught:
        add(colours)
    assert caught.value.code == "model_file_name"
    assert list(objects.list()) == []


def test_a_model_larger_than_a_workers_memory_is_refused_with_the_numbers(
    colours: Path, add: Add, objects: FileObjects
) -> None:
    with pytest.raises(InvalidModel, match=r"at most 100 bytes.*came \d{3,};") as caught:
        add(colours, budget_bytes=100)
    assert caught.value.code == "model_too_large"
    assert list(objects.list()) == []


class FailingObjects(FileObjects):
    """Its disk is full after so many puts."""

    def __init__(self, root: Path, puts: int) -> None:
        super().__init__(root)
        self.puts = puts

    def put(self, key: str, data: bytes | BinaryIO | Path, *, if_absent: bool = False) -> Ref:
        self.puts -= 1
        if self.puts < 0:
            raise Transient("storage_full", "no room")
        return super().put(key, data, if_absent=if_absent)


@pytest.mark.parametrize("puts", range(4))
def test_a_store_that_fills_up_is_left_as_it_was_and_a_second_try_works(
    colours: Path, add: Add, tmp_path: Path, puts: int
) -> None:
    objects = FailingObjects(tmp_path / "objects", puts)
    with pytest.raises(Transient):
        add(colours, objects)
    assert list(objects.list()) == []
    objects.puts = 4
    assert add(colours, objects).new


class DeafObjects(FileObjects):
    """Stores a card, and the answer gets lost."""

    def put(self, key: str, data: bytes | BinaryIO | Path, *, if_absent: bool = False) -> Ref:
        ref = super().put(key, data, if_absent=if_absent)
        if if_absent:
            raise Transient("storage_unavailable", "answer lost")
        return ref


def test_an_installation_whose_answer_was_lost_is_whole(
    colours: Path, add: Add, objects: FileObjects, tmp_path: Path
) -> None:
    with pytest.raises(Transient):
        add(colours, DeafObjects(tmp_path / "objects"))
    assert not add(colours).new
    card = Catalogue(objects).resolve("colours")
    assert Bundle.open(Catalogue(objects).folder(card)).digest == card.digest


def test_a_bundle_that_changes_meanwhile_is_refused(
    colours: Path, add: Add, objects: FileObjects
) -> None:
    def edit(stage: str) -> None:
        if stage == "install":
            (colours / "labels.txt").write_text("rot\ngruen\nblau\n")

    with pytest.raises(InvalidModel, match="changed while it was being added"):
        add(colours, on_stage=edit)
    assert list(objects.list()) == []


def at_once(first: Callable[[], Any], second: Callable[[], Any]) -> list[Any]:
    """Results or InvalidModel of both."""

    def outcome(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except InvalidModel as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(outcome, (first, second)))


@pytest.mark.parametrize("same_content", [True, False])
def test_of_two_who_add_one_version_at_once_one_wins(
    colours: Path, add: Add, objects: FileObjects, tmp_path: Path, same_content: bool
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in colours.iterdir():
        os.link(path, other / path.name)
    if not same_content:
        (other / "notes.txt").write_text("other content")
    both_checked = threading.Barrier(2)

    def meet(stage: str) -> None:
        if stage == "install":
            both_checked.wait()

    outcomes = at_once(lambda: add(colours, on_stage=meet), lambda: add(other, on_stage=meet))
    winners = [o for o in outcomes if isinstance(o, registry.Added) and o.new]
    assert len(winners) == 1
    (loser,) = (o for o in outcomes if o is not winners[0])
    if same_content:
        assert loser == registry.Added(winners[0].card, new=False)
    else:
        assert isinstance(loser, InvalidModel)
        assert loser.code == "version_exists"
    card = Catalogue(objects).resolve("colours")
    assert card == winners[0].card
    assert Bundle.open(Catalogue(objects).folder(card)).digest == card.digest
    folder = files_folder("colours", 1, card.digest)
    assert {info.key for info in objects.list()} == {
        card_key("colours", 1),
        *(info.key for info in objects.list(folder)),
    }


def test_a_removed_version_leaves_nothing_and_the_others(
    colours: Path, add: Add, objects: FileObjects
) -> None:
    first = add(colours).card
    change(colours, "version: 1", "version: 12")
    second = add(colours).card
    registry.remove(registry.removable("colours", 1, objects), objects)
    assert Catalogue(objects).cards() == [second]
    assert all(info.key.startswith("models/colours/12/") for info in objects.list())
    with pytest.raises(InvalidJob, match="no version 1 is installed; there are 12"):
        Catalogue(objects).resolve("colours", first.version)


def test_a_removed_version_can_be_added_again_with_other_content(
    colours: Path, add: Add, objects: FileObjects
) -> None:
    add(colours)
    registry.remove(registry.removable("colours", 1, objects, force=True), objects)
    assert list(objects.list()) == []
    change(colours, "k: 2", "k: 1")
    assert add(colours).new


def test_the_last_version_and_one_of_several_are_not_removable_by_mistake(
    colours: Path, add: Add, objects: FileObjects
) -> None:
    add(colours)
    with pytest.raises(InvalidModel, match="last of model colours") as caught:
        registry.removable("colours", None, objects)
    assert caught.value.code == "version_last"
    change(colours, "version: 1", "version: 2")
    add(colours)
    with pytest.raises(InvalidModel, match=re.escape("versions [1, 2]")) as caught:
        registry.removable("colours", None, objects, force=True)
    assert caught.value.code == "version_missing"
    with pytest.raises(InvalidJob):
        registry.removable("colors", None, objects)
