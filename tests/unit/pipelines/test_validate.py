from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.bundle import Bundle
from pipelines.model import LoadedModel
from pipelines.validate import check
from schemas.errors import InvalidModel

MakeBundle = Callable[..., Bundle]
MakeEngine = Callable[..., Any]

IMAGE = "[decode_image, {resize: {size: 8}}, {to_tensor: {input: x}}]"
CLASSIFY = "[{softmax: {output: y}}, top_k]"


def refusal(bundle: Bundle, engine: Any) -> InvalidModel:
    with pytest.raises(InvalidModel) as caught:
        check(LoadedModel(bundle, {"main": engine}))
    return caught.value


def three_classes(inputs: Any) -> dict[str, Any]:
    return {"y": np.tile(np.float32([0, 1, 2]), (len(inputs["x"]), 1))}


def test_a_good_model_answers(make_bundle: MakeBundle, make_engine: MakeEngine) -> None:
    bundle = make_bundle(IMAGE, CLASSIFY, "image", "labels: [a, b, c]")
    engine = make_engine(three_classes, x=("float32", (None, 3, 8, 8)))
    assert json.loads(check(LoadedModel(bundle, {"main": engine})))["label"] == "c"


def test_another_input_shape_is_refused_with_both(
    make_bundle: MakeBundle, make_engine: MakeEngine
) -> None:
    bundle = make_bundle(IMAGE, CLASSIFY, "image", "labels: [a, b, c]")
    error = refusal(bundle, make_engine(three_classes, x=("float32", (None, 3, 16, 16))))
    assert error.code == "model_check_failed"
    assert "run fails on the sample" in error.message
    assert "float32[N, 3, 16, 16]" in error.message
    assert "float32[1, 3, 8, 8]" in error.message


@pytest.mark.parametrize(
    ("postprocess", "labels", "words"),
    [
        (CLASSIFY, "[a, b]", "each of 2 labels, came 3"),
        ("[{softmax: {output: logits}}, top_k]", "[a, b, c]", "an output 'logits', came y"),
        ("[top_k]", "[a, b, c]", "an output 'probabilities', came y"),
        ("[{top_k: {output: y}}, softmax: {output: y}]", "[a, b, c]", "an output 'y', came"),
        ("[{embedding: {output: z}}]", "[a, b, c]", "an output 'z', came y"),
    ],
)
def test_postprocessing_that_does_not_fit_is_refused_with_its_line(
    make_bundle: MakeBundle, make_engine: MakeEngine, postprocess: str, labels: str, words: str
) -> None:
    bundle = make_bundle(IMAGE, postprocess, "image", f"labels: {labels}")
    error = refusal(bundle, make_engine(three_classes, x=("float32", (None, 3, 8, 8))))
    assert error.code == "model_check_failed"
    assert error.message.startswith(f"{bundle.folder}/model.yaml:7: postprocess fails")
    assert words in error.message


def test_steps_in_a_wrong_order_are_refused(
    make_bundle: MakeBundle, make_engine: MakeEngine
) -> None:
    bundle = make_bundle("[{to_tensor: {input: x}}, decode_image]", "[tensor]", "image")
    error = refusal(bundle, make_engine(three_classes, x=("float32", (None, 3, 8, 8))))
    assert "model.yaml:6: preprocess fails" in error.message
    assert "right order" in error.message


def test_a_sample_that_the_model_refuses_is_refused(
    make_bundle: MakeBundle, make_engine: MakeEngine, bundle_folder: Path
) -> None:
    (bundle_folder / "sample.jpg").write_bytes(b"no picture")
    bundle = make_bundle(IMAGE, CLASSIFY, "image", "sample: sample.jpg")
    error = refusal(bundle, make_engine(three_classes, x=("float32", (None, 3, 8, 8))))
    assert "preprocess fails on the sample: Expected a whole JPEG" in error.message


def test_a_batch_that_fails_is_found_before_the_first_job(
    make_bundle: MakeBundle, make_engine: MakeEngine
) -> None:
    def one_answer(inputs: Any) -> dict[str, Any]:
        return {"y": np.zeros((1, 3), np.float32)}

    bundle = make_bundle(IMAGE, CLASSIFY, "image", "labels: [a, b, c]")
    error = refusal(bundle, make_engine(one_answer, x=("float32", (None, 3, 8, 8))))
    assert "batch of 2 as its first axis" in error.message


def masked_mean(inputs: Any) -> dict[str, Any]:
    mask = inputs["attention_mask"]
    mean = (inputs["input_ids"] * mask).sum(1, keepdims=True) / mask.sum(1, keepdims=True)
    return {"y": mean.astype(np.float32), "tokens": inputs["input_ids"]}


def blind_mean(inputs: Any) -> dict[str, Any]:
    return {"y": inputs["input_ids"].mean(1, keepdims=True), "tokens": inputs["input_ids"]}


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> str:
    """A preprocess step: one token a word, its length."""

    def lengths(bundle: Bundle) -> Callable[[bytes], dict[str, Any]]:
        def row(data: bytes) -> dict[str, Any]:
            ids = np.array([len(word) for word in data.split()])
            return {"input_ids": ids, "attention_mask": np.ones_like(ids)}

        return row

    import pipelines.modalities as registry

    monkeypatch.setitem(registry._factories, ("preprocess", "lengths"), lengths)
    return "[lengths]"


@pytest.mark.parametrize(
    ("function", "output", "more", "good"),
    [
        (masked_mean, "y", "", True),
        (blind_mean, "y", "", False),
        (blind_mean, "y", "batch: {pad: false}", True),
        (masked_mean, "tokens", "", False),
    ],
)
def test_padding_must_not_change_an_answer(
    make_bundle: MakeBundle,
    make_engine: MakeEngine,
    words: str,
    function: Callable[[Any], dict[str, Any]],
    output: str,
    more: str,
    good: bool,
) -> None:
    bundle = make_bundle(words, f"[{{embedding: {{output: {output}}}}}]", "text", more)
    shape = ("int64", (None, None))
    engine = make_engine(function, input_ids=shape, attention_mask=shape)
    if good:
        assert check(LoadedModel(bundle, {"main": engine}))
    else:
        assert "give the model a mask" in refusal(bundle, engine).message
