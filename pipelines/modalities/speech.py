"""Speech to text: the steps of a model with two engines, one that hears and one that says tokens.

On a job's path `whisper_greedy` stands where a forward pass does for other models, and
`detokenize` turns its tokens into the answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from pipelines.bundle import Bundle
from pipelines.engines.engine import Array, Engine
from pipelines.modalities import postprocess_step, run_step
from pipelines.modalities.text import load_tokenizer
from schemas.errors import InvalidModel

Row = dict[str, Array]
Batch = dict[str, Array]
Token = Annotated[int, Meta(ge=0)]
Tokens = NDArray[np.int64]
Floats = NDArray[np.float32]


@run_step("whisper_greedy")
class WhisperGreedy:
    """Takes the most probable token, again and again, until each row of the batch has ended.

    `encoder` runs once, on the preprocessed inputs. `decoder` runs once a token: its inputs are
    all outputs of the encoder, `token` int64[N, 1], and `past_kv`, whose dynamic axis after the
    batch counts the tokens before. Its outputs are `logits` float32[N, vocabulary] and
    `present_kv`, which is `past_kv` for the next token.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        start: Annotated[tuple[Token, ...], Meta(min_length=1)],
        end: Token,
        max_tokens: Annotated[int, Meta(ge=1)] = 224,
        suppress: tuple[Token, ...] = (),
        suppress_first: tuple[Token, ...] = (),
        no_speech: Token | None = None,
        no_speech_above: Annotated[float, Meta(gt=0, le=1)] = 0.8,
    ) -> None:
        """start: what every transcript begins with. suppress: never said; suppress_first: not said
        first. no_speech: the token whose probability after the first of `start` is that of
        silence; a row where it is above `no_speech_above` gets no text.
        """
        if missing := sorted({"encoder", "decoder"} - bundle.config.engines.keys()):
            raise InvalidModel(
                "model_step_invalid",
                "whisper_greedy: expected engines called encoder and decoder, came no "
                f"{' and no '.join(missing)}; name them so under `engines`",
            )
        self._start = start
        self._end = end
        self._max_tokens = max_tokens
        self._never = list(suppress)
        self._not_first = [*suppress, *suppress_first]
        self._no_speech = no_speech
        self._no_speech_above = no_speech_above

    def __call__(self, engines: dict[str, Engine], inputs: Batch) -> Batch:
        """Returns tokens int64[N, T], T <= max_tokens, rows filled up with the end token, and
        logprob float32[N], the mean over a row's tokens and its end. A silent row has no tokens;
        its logprob is that of silence.
        """
        speaker = _Speaker(engines["decoder"], heard=engines["encoder"].run(inputs))
        after_start = [speaker.say(np.full(speaker.rows, token)) for token in self._start]
        tokens, logprob = self._greedy(speaker, after_start[-1], self._silence(after_start[0]))
        return {"tokens": tokens, "logprob": logprob}

    def _silence(self, logits: Floats) -> Floats:
        """Log probability of each row that nobody speaks, float32[N]."""
        if self._no_speech is None:
            return np.full(len(logits), -np.inf, np.float32)
        return _logprobs(logits, np.full(len(logits), self._no_speech))

    def _greedy(self, speaker: _Speaker, logits: Floats, silence: Floats) -> tuple[Tokens, Floats]:
        ended = silence > math.log(self._no_speech_above)
        logprob: Floats = np.where(ended, silence, np.float32(0))
        length = ended.astype(np.float32)
        said: list[Tokens] = []
        suppressed = self._not_first
        while True:
            logits[:, suppressed] = -np.inf
            token = np.where(ended, self._end, logits.argmax(axis=1))
            logprob += np.where(ended, 0, _logprobs(logits, token))
            length += ~ended
            said.append(token)
            ended = token == self._end
            if ended.all() or len(said) == self._max_tokens:
                return np.stack(said, axis=1), logprob / length
            logits, suppressed = speaker.say(token), self._never


class _Speaker:
    """The decoder in the middle of a batch: what was heard, and what was said so far."""

    def __init__(self, decoder: Engine, heard: Batch) -> None:
        (shape,) = (spec.shape or () for spec in decoder.inputs if spec.name == "past_kv")
        self.rows = len(next(iter(heard.values())))
        self._decoder = decoder
        self._heard = heard
        self._past: Array = np.zeros((self.rows, *(axis or 0 for axis in shape[1:])), np.float32)

    def say(self, token: Tokens) -> Floats:
        """token: int64[N], the next of each row. Returns the logits of the one after it."""
        outputs = self._decoder.run({**self._heard, "token": token[:, None], "past_kv": self._past})
        self._past = outputs["present_kv"]
        return outputs["logits"]


def _logprobs(logits: Floats, token: Tokens) -> Floats:
    """Logarithm of each row's softmax at its token, float32[N]."""
    top = logits.max(axis=1)
    rows = np.arange(len(logits))
    logprobs: Floats = logits[rows, token] - top - np.log(np.exp(logits - top[:, None]).sum(axis=1))
    return logprobs


@postprocess_step("detokenize")
def detokenize(bundle: Bundle) -> Callable[[Row], dict[str, Any]]:
    """Tokens int64[T] and their mean logprob to a transcription, by the bundle's `tokenizer`."""
    tokenizer = load_tokenizer(bundle)

    def transcription(row: Row) -> dict[str, Any]:
        text = tokenizer.decode(row["tokens"].tolist()).strip()
        return {"type": "transcription", "text": text, "probability": math.exp(row["logprob"])}

    return transcription
