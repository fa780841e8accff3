"""A user's own models, added to a running stack by one YAML each and no code of the project's."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from headrace import Client
from schemas.errors import InvalidJob

if TYPE_CHECKING:
    from tests.conftest import Stack

pytestmark = pytest.mark.timeout(600)  # the first test brings the stack up and may download models


def save(folder: Path, nodes: list[onnx.NodeProto], inputs: list[onnx.ValueInfoProto],
         weights: dict[str, np.ndarray], classes: int) -> None:  # fmt: skip
    output = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", classes])
    constants = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "own", inputs, [output], constants)
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), folder / "own.onnx")


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """An image classifier: which of three colours a picture has most of."""
    pixels = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["N", 3, 8, 8])
    nodes = [
        helper.make_node("GlobalAveragePool", ["pixels"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["scores"]),
    ]
    save(tmp_path, nodes, [pixels], {"weight": 10 * np.eye(3, dtype=np.float32)}, 3)
    (tmp_path / "model.yaml").write_text(
        """\
name: colours
version: 1
modality: image
engines:
  main: {file: own.onnx}
labels: [red, green, blue]
preprocess:
  - decode_image
  - resize: {size: 8}
  - to_tensor: {input: pixels}
postprocess:
  - softmax: {output: scores}
  - top_k: {k: 2}
"""
    )
    return tmp_path


@pytest.fixture
def moods(tmp_path: Path) -> Path:
    """A text classifier: a word's weight is 1 for the mood that it belongs to."""
    words = ["[UNK]", "good", "great", "bad", "sad"]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "words.json"))
    ids, mask = (
        helper.make_tensor_value_info(name, TensorProto.INT64, ["N", "S"])
        for name in ("input_ids", "attention_mask")
    )
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["each"]),
        helper.make_node("Cast", ["attention_mask"], ["is_word"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["is_word", "last"], ["is_word_1"]),
        helper.make_node("Mul", ["each", "is_word_1"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "words"], ["scores"], keepdims=0),
    ]
    table = np.array([[0, 0], [1, 0], [1, 0], [0, 1], [0, 1]], np.float32)
    weights = {"table": table, "last": np.array([2]), "words": np.array([1])}
    save(tmp_path, nodes, [ids, mask], weights, 2)
    (tmp_path / "model.yaml").write_text(
        """\
name: moods
version: 1
modality: text
engines:
  main: {file: own.onnx}
labels: [happy, unhappy]
tokenizer: words.json
preprocess:
  - decode_text
  - tokenize: {max_tokens: 64}
postprocess:
  - softmax: {output: scores}
  - top_k
"""
    )
    return tmp_path


def picture(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (50, 30), colour).save(file, "PNG")
    return file.getvalue()


def test_an_image_classifier_of_ones_own(stack: Stack, client: Client, colours: Path) -> None:
    added = stack.json("models", "add", colours)
    assert (added["name"], added["version"], added["new"]) == ("colours", 1, True)
    jobs = client.submit_many("colours", [picture(c) for c in ("#f00", "#0f0", "#00f", "#fa0")])
    assert [job.result().label for job in jobs] == ["red", "green", "blue", "red"]
    answer = jobs[3].result().answer
    assert [entry["label"] for entry in answer["top"]] == ["red", "green"]
    again = stack.json("models", "add", colours)
    assert again["new"] is False


def test_a_text_classifier_of_ones_own(stack: Stack, client: Client, moods: Path) -> None:
    stack.headrace("models", "add", moods)
    texts = ["a good and great day", "sad", "what a bad sad thing it is to be", "great"]
    jobs = client.submit_many("moods", texts)
    assert [job.result().label for job in jobs] == ["happy", "unhappy", "unhappy", "happy"]


def test_a_step_of_ones_own_comes_by_an_entry_point(client: Client) -> None:
    job = client.submit("obey", json.dumps({"number": 42}).encode())
    assert job.result().answer == {"type": "tensor", "outputs": {"y": [42.0]}}


def test_a_model_that_was_removed_is_unknown(stack: Stack, client: Client, colours: Path) -> None:
    text = (colours / "model.yaml").read_text().replace("name: colours", "name: passing")
    (colours / "model.yaml").write_text(text)
    stack.headrace("models", "add", colours)
    assert client.submit("passing", picture("#00f")).result().label == "blue"
    stack.headrace("models", "remove", "passing", "--yes", code=2)  # its last version
    stack.headrace("models", "remove", "passing", "--yes", "--force")
    with Client(data_dir=stack.data) as another, pytest.raises(InvalidJob) as unknown:
        another.submit("passing", picture("#0f0"))
    assert unknown.value.code == "model_unknown"
