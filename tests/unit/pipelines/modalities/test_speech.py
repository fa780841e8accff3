"""The decoding loop against a decoder that reads out, at each position, what the encoder "heard":
a row of tokens. So what must come out is known, and a wrong position or a mixed-up row shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models

from pipelines.bundle import Bundle
from pipelines.engines.engine import Arrays, Engine, TensorSpec
from pipelines.modalities import Step, build_steps
from schemas.errors import InvalidModel

VOCABULARY = {
    "[start]": 0,
    "[go]": 1,
    "[end]": 2,
    "[silence]": 3,
    " a": 4,
    " b": 5,
    " c": 6,
    " ": 7,
}
START, GO, END, SILENCE, A, B, C, BLANK = range(8)

LOGIT = 4.0
SURE = LOGIT - np.log(np.exp(LOGIT) + 7)  # log probability of the one token that has this logit


class Reader(Engine):
    """encoder: passes its input on as `heard` int64[N, 6]."""

    def __init__(self) -> None:
        spec = [TensorSpec(name, np.dtype(np.int64), (None, 6)) for name in ("script", "heard")]
        super().__init__(spec[:1], spec[1:], 0)

    def _run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        return {"heard": inputs["script"].copy()}

    def _close(self) -> None: ...


class Reciter(Engine):
    """decoder: at position p, the number of tokens in past_kv, the likely next token is heard[p].

    present_kv keeps the tokens themselves, so that `said` is what the loop fed in last.
    """

    def __init__(self) -> None:
        memory = TensorSpec("past_kv", np.dtype(np.float32), (None, 1, 1, None, 1))
        inputs = [
            TensorSpec("token", np.dtype(np.int64), (None, 1)),
            memory,
            TensorSpec("heard", np.dtype(np.int64), (None, 6)),
        ]
        outputs = [
            TensorSpec("logits", np.dtype(np.float32), (None, len(VOCABULARY))),
            TensorSpec("present_kv", memory.dtype, memory.shape),
        ]
        super().__init__(inputs, outputs, 0)
        self.said: list[list[int]] = []

    def _run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        token = inputs["token"].astype(np.float32)[:, None, None, :, None]
        present = np.concatenate([inputs["past_kv"], token], axis=3)
        self.said = present[:, 0, 0, :, 0].astype(int).tolist()
        position = inputs["past_kv"].shape[3]
        logits = np.zeros((len(token), len(VOCABULARY)), np.float32)
        logits[np.arange(len(token)), inputs["heard"][:, position]] = LOGIT
        return {"logits": logits, "present_kv": present}

    def _close(self) -> None: ...


@pytest.fixture
def bundle_folder(tmp_path: Path) -> Path:
    """With the files of a bundle, and a tokenizer whose words begin with a space, as Whisper's."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token=" "))
    tokenizer.add_special_tokens(["[start]", "[go]", "[end]", "[silence]"])
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "graph.onnx").touch()
    return tmp_path


def opened(folder: Path, **changes: object) -> Bundle:
    engines = {"encoder": {"file": "graph.onnx"}, "decoder": {"file": "graph.onnx"}}
    config = {
        "name": "reader",
        "version": 1,
        "modality": "audio",
        "engines": engines,
        "tokenizer": "tokenizer.json",
        "preprocess": ["decode_audio"],
        "run": {"whisper_greedy": {"start": [START, GO], "end": END}},
        "postprocess": ["detokenize"],
    }
    # JSON is YAML.
    (folder / "model.yaml").write_text(json.dumps({**config, **changes}))
    return Bundle.open(folder, check_graphs=False)


def greedy(folder: Path, **params: object) -> Step:
    parameters = {"start": [START, GO], "end": END, **params}
    return build_steps(opened(folder, run={"whisper_greedy": parameters})).run


def transcribed(step: Step, *scripts: list[int]) -> tuple[list[list[int]], list[float], Reciter]:
    decoder = Reciter()
    outputs = step({"encoder": Reader(), "decoder": decoder}, {"script": np.array(scripts)})
    assert outputs["tokens"].dtype == np.int64
    assert outputs["logprob"].dtype == np.float32
    return outputs["tokens"].tolist(), outputs["logprob"].tolist(), decoder


# A script holds the token after [start], the first of the text, the second, ...
AB = [GO, A, B, END, A, A]
ABC = [GO, A, B, C, END, A]
NOTHING = [GO, END, A, A, A, A]
ENDLESS = [GO, A, B, A, B, A]


def test_says_the_likeliest_tokens_up_to_the_end(bundle_folder: Path) -> None:
    tokens, logprob, decoder = transcribed(greedy(bundle_folder), AB)
    assert tokens == [[A, B, END]]
    assert logprob == pytest.approx([SURE])
    assert decoder.said == [[START, GO, A, B]]


def test_rows_that_ended_are_filled_up_with_the_end(bundle_folder: Path) -> None:
    tokens, logprob, decoder = transcribed(greedy(bundle_folder), AB, ABC, NOTHING)
    assert tokens == [[A, B, END, END], [A, B, C, END], [END, END, END, END]]
    assert logprob == pytest.approx([SURE, SURE, SURE])
    assert decoder.said == [[START, GO, *row[:3]] for row in tokens]


def test_a_row_says_in_a_batch_what_it_says_alone(bundle_folder: Path) -> None:
    step = greedy(bundle_folder)
    together, logprob, _ = transcribed(step, ABC, NOTHING, AB)
    for i, script in enumerate((ABC, NOTHING, AB)):
        (alone,), (logprob_alone,), _ = transcribed(step, script)
        assert together[i] == alone + [END] * (len(together[i]) - len(alone))
        assert logprob[i] == logprob_alone


def test_a_text_without_end_is_cut_at_max_tokens(bundle_folder: Path) -> None:
    tokens, logprob, decoder = transcribed(greedy(bundle_folder, max_tokens=3), ENDLESS, NOTHING)
    assert tokens == [[A, B, A], [END, END, END]]
    assert logprob == pytest.approx([SURE, SURE])
    assert decoder.said[0] == [START, GO, A, B], "the last token needs no successor"


def test_suppressed_tokens_are_never_said(bundle_folder: Path) -> None:
    tokens, logprob, _ = transcribed(greedy(bundle_folder, suppress=[0, 1, 3, B]), AB)
    assert tokens == [[A, END]], "the first of the tokens that are left and equally likely"
    sure, guess = LOGIT - np.log(np.exp(LOGIT) + 3), -np.log(4)
    assert logprob == pytest.approx([(sure + guess) / 2])


def test_some_tokens_are_suppressed_as_the_first_only(bundle_folder: Path) -> None:
    script = [GO, BLANK, BLANK, END, A, A]
    tokens, _, _ = transcribed(greedy(bundle_folder, suppress_first=[0, 1, END, 3, BLANK]), script)
    assert tokens == [[A, BLANK, END]]


def test_silence_has_no_text_and_takes_no_time(bundle_folder: Path) -> None:
    silent = [SILENCE, A, B, C, A, B]
    step = greedy(bundle_folder, no_speech=SILENCE, no_speech_above=0.8)
    tokens, logprob, decoder = transcribed(step, silent)
    assert tokens == [[END]]
    assert logprob == pytest.approx([SURE])
    assert decoder.said == [[START, GO]]


def test_silence_beside_speech_changes_nothing(bundle_folder: Path) -> None:
    silent = [SILENCE, A, B, C, A, B]
    step = greedy(bundle_folder, no_speech=SILENCE, no_speech_above=0.8)
    tokens, logprob, _ = transcribed(step, silent, AB)
    assert tokens == [[END, END, END], [A, B, END]]
    assert logprob == pytest.approx([SURE, SURE])


def test_a_suspicion_of_silence_is_not_enough(bundle_folder: Path) -> None:
    silent = [SILENCE, A, END, C, A, B]
    step = greedy(bundle_folder, no_speech=SILENCE, no_speech_above=0.95)
    assert np.exp(SURE) < 0.95
    tokens, _, _ = transcribed(step, silent)
    assert tokens == [[A, END]]


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ({"start": []}, "start"),
        ({"start": None}, "start"),
        ({"end": -1}, "end"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"no_speech_above": 0}, "no_speech_above"),
        ({"beam": 5}, "beam"),
    ],
)
def test_wrong_parameters_are_refused_by_name(
    bundle_folder: Path, params: dict[str, object], named: str
) -> None:
    with pytest.raises(InvalidModel, match=f"whisper_greedy: .*{named}"):
        greedy(bundle_folder, **params)


def test_a_bundle_without_decoder_is_refused(bundle_folder: Path) -> None:
    bundle = opened(bundle_folder, engines={"encoder": {"file": "graph.onnx"}})
    with pytest.raises(InvalidModel, match="came no decoder"):
        build_steps(bundle)


def detokenized(bundle: Bundle, tokens: list[int], logprob: float) -> dict[str, object]:
    (step,) = build_steps(bundle).postprocess
    answer: dict[str, object] = step(
        {"tokens": np.array(tokens), "logprob": np.array(logprob, np.float32)}
    )
    return answer


def test_detokenize_gives_the_text_without_control_tokens(bundle_folder: Path) -> None:
    answer = detokenized(opened(bundle_folder), [A, BLANK, B, END, END], np.log(0.25))
    assert answer == {"type": "transcription", "text": "a  b", "probability": pytest.approx(0.25)}
    assert json.loads(json.dumps(answer)) == answer


def test_detokenize_of_silence_is_an_empty_text(bundle_folder: Path) -> None:
    assert detokenized(opened(bundle_folder), [END, END], -0.1)["text"] == ""


def test_detokenize_passes_over_tokens_that_the_tokenizer_lacks(bundle_folder: Path) -> None:
    assert detokenized(opened(bundle_folder), [A, 50_400, END], -0.1)["text"] == "a"


def test_detokenize_needs_a_tokenizer(bundle_folder: Path) -> None:
    with pytest.raises(InvalidModel, match=r"tokenizer: tokenizer\.json"):
        build_steps(opened(bundle_folder, tokenizer=None))


def test_a_broken_tokenizer_is_refused_by_its_path(bundle_folder: Path) -> None:
    (bundle_folder / "tokenizer.json").write_text("{")
    with pytest.raises(InvalidModel, match=r"tokenizer\.json: expected a tokenizer\.json"):
        build_steps(opened(bundle_folder))
