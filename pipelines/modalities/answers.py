"""Postprocess steps that any modality can end with: from a row of engine outputs to the answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from pipelines.bundle import Bundle
from pipelines.modalities import postprocess_step
from schemas.errors import InferenceFailed

Row = dict[str, NDArray[Any]]
Scores = NDArray[np.floating[Any]]
Answer = dict[str, Any]


@postprocess_step("softmax")
def softmax(bundle: Bundle, output: str) -> Callable[[Row], Scores]:
    """Scores [classes] to probabilities that sum to 1."""
    return lambda row: softmax_of(output_vector(row, output))


@postprocess_step("sigmoid")
def sigmoid(bundle: Bundle, output: str) -> Callable[[Row], Scores]:
    """Scores [classes] to a probability each, for labels that do not exclude each other."""

    def squash(row: Row) -> Scores:
        scores = output_vector(row, output).astype(np.float64).clip(-700, 700)
        return np.asarray(1 / (1 + np.exp(-scores)))

    return squash


@postprocess_step("top_k")
def top_k(
    bundle: Bundle, k: Annotated[int, Meta(ge=1)] = 5, output: str = "probabilities"
) -> Callable[[Scores | Row], Answer]:
    """Probabilities [classes] to a classification by the bundle's labels, or numbers without.
    output: where the graph itself makes the probabilities."""
    labels = bundle.labels

    def classify(value: Scores | Row) -> Answer:
        probabilities = output_vector(value, output) if isinstance(value, dict) else value
        width = len(probabilities)
        if labels and len(labels) != width:
            raise InferenceFailed(
                "bad_output",
                f"Expected one probability for each of {len(labels)} labels, came {width};"
                " give as many labels as the output is wide.",
            )
        return classification(probabilities, labels or [str(i) for i in range(width)], k)

    return classify


@postprocess_step("embedding")
def embedding(bundle: Bundle, output: str) -> Callable[[Row], Answer]:
    """A vector [dimensions] as it is."""

    def answer(row: Row) -> Answer:
        vector = output_vector(row, output)
        return {"type": "embedding", "vector": vector.tolist(), "dimensions": len(vector)}

    return answer


@postprocess_step("tensor")
def tensor(bundle: Bundle, outputs: list[str] | None = None) -> Callable[[Row], Answer]:
    """Outputs as nested lists. outputs: which, by default all."""

    def answer(row: Row) -> Answer:
        names = row if outputs is None else outputs
        return {"type": "tensor", "outputs": {name: _output(row, name).tolist() for name in names}}

    return answer


def classification(probabilities: Scores, labels: list[str], k: int = 5) -> Answer:
    """confidence: by how much the first label is more probable than the second."""
    best = np.argsort(-probabilities, kind="stable")[: max(k, 2)]
    top = [{"label": labels[i], "probability": float(probabilities[i])} for i in best]
    first = top[0]["probability"]
    return {
        "type": "classification",
        "label": top[0]["label"],
        "probability": first,
        "confidence": first - top[1]["probability"] if len(top) > 1 else first,
        "top": top[:k],
    }


def softmax_of(scores: Scores) -> Scores:
    powers = np.exp(scores.astype(np.float64) - scores.max())
    return np.asarray(powers / powers.sum())


def output_vector(row: Row, name: str) -> Scores:
    """An output that must be one vector. Raises InferenceFailed("bad_output")."""
    vector = _output(row, name)
    if vector.ndim != 1 or not vector.size:
        raise InferenceFailed(
            "bad_output",
            f"Expected output {name!r} to be one vector an item, came shape {list(vector.shape)};"
            " use the step `tensor`, or reduce it in the graph.",
        )
    if not np.isfinite(vector).all():
        raise InferenceFailed(
            "bad_output", f"Expected finite numbers in output {name!r}, came NaN or infinity."
        )
    return vector


def _output(row: Row, name: str) -> NDArray[Any]:
    if name not in row:
        raise InferenceFailed(
            "bad_output", f"Expected an output {name!r}, came {', '.join(sorted(row))}; name one."
        )
    return row[name]
