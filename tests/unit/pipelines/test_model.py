from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines import modalities
from pipelines.bundle import Bundle
from pipelines.model import LoadedModel, collate
from schemas.errors import InferenceFailed, InvalidJob, InvalidModel

MakeBundle = Callable[..., Bundle]
MakeEngine = Callable[..., Any]

ANY_LENGTH = "[{from_buffer: {input: x, dtype: float32, shape: [null]}}]"


def floats(*values: float) -> bytes:
    return np.array(values, np.float32).tobytes()


def rows(model: LoadedModel, *payloads: bytes) -> list[dict[str, Any]]:
    return [model.decode(payload, "application/octet-stream", {}) for payload in payloads]


def test_a_job_goes_all_the_way(make_bundle: MakeBundle, make_engine: MakeEngine) -> None:
    engine = make_engine(lambda inputs: {"y": inputs["x"] + 1}, x=("float32", (None, 3)))
    model = LoadedModel(make_bundle(), {"main": engine})
    (outputs,) = model.infer(rows(model, floats(1, 2, 3)))
    assert json.loads(model.encode(outputs)) == {"type": "tensor", "outputs": {"y": [2, 3, 4]}}


def test_a_refusal_names_what_the_payload_was_sent_as(
    make_bundle: MakeBundle, make_engine: MakeEngine
) -> None:
    model = LoadedModel(make_bundle(), {"main": make_engine(dict, x=("float32", (None, 3)))})
    with pytest.raises(InvalidJob, match=r"\(Sent as text/html\.\)") as caught:
        model.decode(b"abc", "text/html", {})
    assert caught.value.code == "array_size"


def test_a_mislabelled_payload_is_read_by_its_bytes(
    make_bundle: MakeBundle, make_engine: MakeEngine
) -> None:
    bundle = make_bundle(preprocess="[decode_image, {to_tensor: {input: x}}]", modality="image")
    model = LoadedModel(bundle, {"main": make_engine(dict, x=("float32", (None, 3, 4, 4)))})
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    assert model.decode(file.getvalue(), "image/jpeg", {})["x"].shape == (3, 4, 4)


def test_parameters_are_refused(make_bundle: MakeBundle, make_engine: MakeEngine) -> None:
    model = LoadedModel(make_bundle(), {"main": make_engine(dict, x=("float32", (None, 3)))})
    with pytest.raises(InvalidJob, match="came top_k") as caught:
        model.decode(floats(1, 2, 3), "", {"top_k": 3})
    assert caught.value.code == "params_unknown"


def test_preprocessing_must_end_in_a_row(make_bundle: MakeBundle, make_engine: MakeEngine) -> None:
    model = LoadedModel(make_bundle(preprocess="[decode_text]"), {"main": make_engine(dict)})
    with pytest.raises(InvalidModel, match=r"model\.yaml:6: expected the last step .* came str"):
        model.decode(b"hello", "text/plain", {})


def test_rows_of_one_shape_run_as_one_batch(
    make_bundle: MakeBundle, make_engine: MakeEngine
) -> None:
    engine = make_engine(lambda inputs: {"y": inputs["x"].sum(1)}, x=("float32", (None, 3)))
    model = LoadedModel(make_bundle(), {"main": engine})
    outputs = model.infer(rows(model, *(floats(i, 0, 0) for i in range(5))))
    assert [float(row["y"]) for row in outputs] == [0, 1, 2, 3, 4]
    assert all(isinstance(row["y"], np.ndarray) for row in outputs)
    assert [len(batch["x"]) for batch in engine.batches] == [5]


def test_no_rows_need_no_run(make_bundle: MakeBundle, make_engine: MakeEngine) -> None:
    engine = make_engine(dict, x=("float32", (None, 3)))
    assert LoadedModel(make_bundle(), {"main": engine}).infer([]) == []
    assert engine.batches == []


def test_rows_of_different_length_run_apart_and_come_back_in_order(
    make_bundle: MakeBundle, make_engine: MakeEngine
) -> None:
    engine = make_engine(lambda inputs: {"y": inputs["x"].mean(1)}, x=("float32", (None, None)))
    model = LoadedModel(make_bundle(preprocess=ANY_LENGTH), {"main": engine})
    outputs = model.infer(rows(model, floats(1), floats(2, 2), floats(3), floats(4, 4)))
    assert [float(row["y"]) for row in outputs] == [1, 2, 3, 4]
    assert sorted(batch["x"].shape for batch in engine.batches) == [(2, 1), (2, 2)]


@pytest.mark.parametrize(
    ("modality", "more", "runs"),
    [
        ("text", "", 1),
        ("text", "batch: {pad: false}", 2),
        ("tensor", "", 2),
        ("tensor", "batch: {pad: true}", 1),
    ],
)
def test_rows_of_different_length_are_padded_where_the_model_can_bear_it(
    make_bundle: MakeBundle, make_engine: MakeEngine, modality: str, more: str, runs: int
) -> None:
    engine = make_engine(lambda inputs: {"y": inputs["x"].sum(1)}, x=("float32", (None, None)))
    bundle = make_bundle(preprocess=ANY_LENGTH, modality=modality, more=more)
    model = LoadedModel(bundle, {"main": engine})
    outputs = model.infer(rows(model, floats(1), floats(2, 2)))
    assert [float(row["y"]) for row in outputs] == [1, 4]
    assert len(engine.batches) == runs


def test_collate_pads_on_the_right_in_every_axis() -> None:
    batch = collate([{"x": np.ones((1, 2), np.int64)}, {"x": np.full((2, 1), 2, np.int64)}])
    assert batch["x"].tolist() == [[[1, 1], [0, 0]], [[2, 0], [2, 0]]]
    assert batch["x"].dtype == np.int64


@pytest.mark.parametrize("shape", [(), (1, 3), (3,)])
def test_outputs_without_the_batch_are_a_failure(
    make_bundle: MakeBundle, make_engine: MakeEngine, shape: tuple[int, ...]
) -> None:
    engine = make_engine(lambda inputs: {"y": np.zeros(shape)}, x=("float32", (None, 3)))
    model = LoadedModel(make_bundle(), {"main": engine})
    with pytest.raises(InferenceFailed, match="batch of 2 as its first axis") as caught:
        model.infer(rows(model, floats(1, 2, 3), floats(1, 2, 3)))
    assert caught.value.code == "bad_output"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_answer_with_what_is_no_number_is_a_failure(
    make_bundle: MakeBundle, make_engine: MakeEngine, value: float
) -> None:
    model = LoadedModel(make_bundle(), {"main": make_engine(dict)})
    with pytest.raises(InferenceFailed, match="finite") as caught:
        model.encode({"y": np.array([[1.0, value]])})
    assert caught.value.code == "bad_output"


@pytest.fixture
def answering(
    make_bundle: MakeBundle, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> Callable[[object], bytes]:
    """Encode what a custom step answers."""

    def encode(answer: object) -> bytes:
        factory = {("postprocess", "custom"): lambda bundle: lambda row: answer}
        monkeypatch.setattr("pipelines.modalities._factories", factory)
        monkeypatch.setattr("pipelines.modalities._MODULES", ())
        factory["run", "forward"] = factory["preprocess", "none"] = lambda bundle: None
        bundle = make_bundle(preprocess="['none']", postprocess="[custom]")
        return LoadedModel(bundle, {"main": make_engine(dict)}).encode({})

    return encode


def test_none_in_an_answer_is_allowed(answering: Callable[[object], bytes]) -> None:
    assert json.loads(answering({"a": None, "b": [1.5, "null"]})) == {"a": None, "b": [1.5, "null"]}


@pytest.mark.parametrize(
    "answer", [{"a": object()}, {"a": np.float32(1)}, {"a": [float("nan"), None]}]
)
def test_what_cannot_be_json_is_a_failure(
    answering: Callable[[object], bytes], answer: object
) -> None:
    with pytest.raises(InferenceFailed) as caught:
        answering(answer)
    assert caught.value.code == "bad_output"


def test_cost_grows_with_length(make_bundle: MakeBundle, make_engine: MakeEngine) -> None:
    model = LoadedModel(make_bundle(preprocess=ANY_LENGTH), {"main": make_engine(dict)})
    short, long = rows(model, floats(1), floats(*range(9)))
    assert (model.cost(short), model.cost(long)) == (1, 9)


def test_warming_runs_every_bucket(make_bundle: MakeBundle, make_engine: MakeEngine) -> None:
    engine = make_engine(lambda inputs: {"y": inputs["x"]}, x=("float32", (None, 3)))
    bundle = make_bundle(more="batch: {buckets: [1, 4, 16]}")
    LoadedModel(bundle, {"main": engine}).warm()
    assert [batch["x"].shape for batch in engine.batches] == [(1, 3), (4, 3), (16, 3)]
    assert not engine.batches[0]["x"].any()


def test_warming_runs_every_engine_and_says_when_a_bucket_is_done(
    make_bundle: MakeBundle, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = {
        name: make_engine(lambda inputs: {"y": inputs["x"]}, x=("float32", (None, 3)))
        for name in ("encoder", "decoder")
    }

    def both(bundle: Bundle) -> Any:
        return lambda engines, inputs: engines["decoder"].run(
            {"x": engines["encoder"].run(inputs)["y"]}
        )

    monkeypatch.setitem(modalities._factories, ("run", "both"), both)
    steps: list[str] = []
    LoadedModel(make_bundle(more="run: both\nbatch: {buckets: [1, 2]}"), engines).warm(steps.append)

    for engine in engines.values():
        assert [len(batch["x"]) for batch in engine.batches] == [1, 2]
    assert steps == ["warm 1", "warm 2"]


def test_the_bundles_own_sample_is_warmed_with(
    make_bundle: MakeBundle, make_engine: MakeEngine, bundle_folder: Path
) -> None:
    (bundle_folder / "sample.bin").write_bytes(floats(7, 8, 9))
    engine = make_engine(lambda inputs: {"y": inputs["x"]}, x=("float32", (None, 3)))
    LoadedModel(make_bundle(more="sample: sample.bin"), {"main": engine}).warm()
    assert engine.batches[0]["x"].tolist() == [[7, 8, 9]]


@pytest.mark.parametrize(
    ("modality", "preprocess", "shape"),
    [
        ("image", "[decode_image, {resize: {size: 8}}, {to_tensor: {input: x}}]", (3, 8, 8)),
        ("audio", "[decode_audio, {pad_audio: {input: x, samples: 32000}}]", (32000,)),
    ],
)
def test_without_a_sample_a_plain_payload_of_the_modality_is_used(
    make_bundle: MakeBundle,
    make_engine: MakeEngine,
    modality: str,
    preprocess: str,
    shape: tuple[int, ...],
) -> None:
    bundle = make_bundle(preprocess=preprocess, modality=modality)
    row = LoadedModel(bundle, {"main": make_engine(dict)}).sample_row()
    assert row["x"].shape == shape


def test_if_the_plain_payload_is_refused_zeros_are_used(
    make_bundle: MakeBundle, make_engine: MakeEngine
) -> None:
    bundle = make_bundle(modality="image")
    engine = make_engine(dict, x=("float32", (None, 3)), mask=("int64", (None, None)))
    row = LoadedModel(bundle, {"main": engine}).sample_row()
    assert {name: (a.shape, str(a.dtype)) for name, a in row.items()} == {
        "x": ((3,), "float32"),
        "mask": ((1,), "int64"),
    }


WORDS = {"cat": [1.0, 0.0, 0.0], "dog": [0.9, 0.1, 0.0], "car": [0.0, 0.0, 2.0]}


@pytest.fixture
def words_engine(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Embeds the three words, given as one number each."""
    numbers = list(WORDS)

    def number(bundle: Bundle) -> Callable[[bytes], dict[str, Any]]:
        return lambda data: {"x": np.array([numbers.index(data.decode())])}

    import pipelines.modalities as registry

    monkeypatch.setitem(registry._factories, ("preprocess", "number"), number)
    vectors = np.array(list(WORDS.values()), np.float32)
    return make_engine(lambda inputs: {"v": vectors[inputs["x"][:, 0]]}, x=("int64", (None, 1)))


def test_nearest_label_embeds_its_phrases_with_the_model_itself(
    make_bundle: MakeBundle, words_engine: Any
) -> None:
    bundle = make_bundle(
        preprocess="[number]",
        postprocess="[{nearest_label: {output: v, labels: {animal: [cat], thing: [car]}}}]",
        modality="text",
    )
    model = LoadedModel(bundle, {"main": words_engine})
    (outputs,) = model.infer([model.decode(b"dog", "text/plain", {})])
    answer = json.loads(model.encode(outputs))
    assert answer["label"] == "animal"
    assert answer["probability"] > 0.99
    assert [top["label"] for top in answer["top"]] == ["animal", "thing"]


def test_nearest_label_that_cannot_embed_is_a_wrong_model(
    make_bundle: MakeBundle, words_engine: Any
) -> None:
    bundle = make_bundle(
        preprocess="[number]",
        postprocess="[{nearest_label: {output: logits, labels: {animal: [cat]}}}]",
        modality="text",
    )
    with pytest.raises(InvalidModel, match=r"model\.yaml:7: Expected an output 'logits', came v"):
        LoadedModel(bundle, {"main": words_engine})
