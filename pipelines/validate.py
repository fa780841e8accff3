"""The last question before a model is added to the catalogue: does it answer?"""

from __future__ import annotations

import numpy as np

from pipelines.model import LoadedModel, Row
from schemas.errors import InvalidModel, PipelineError

_PADDING_TOLERANCE = 1e-3


def check(model: LoadedModel) -> bytes:
    """Take a sample all the way, in every batch size. Returns its answer, JSON.

    Raises InvalidModel("model_check_failed") that says where, what was expected and what came:
    shapes that do not fit, outputs that do not exist, as many labels as the output is not wide.
    """
    at = "preprocess"
    try:
        row = model.sample_row()
        at = "run"
        model.warm()
        outputs = model.infer([row])[0]
        at = "postprocess"
        answer = model.encode(outputs)
    except InvalidModel:
        raise
    except PipelineError as error:
        raise _failed(model, at, error.message) from error
    except Exception as error:  # a user's steps in a wrong order, or a custom step's own mistake
        raise _failed(
            model,
            at,
            f"a step raised {type(error).__name__}: {error}; are they in the right order?",
        ) from error
    if model.pads:
        _check_padding(model, row, outputs)
    return answer


def _check_padding(model: LoadedModel, row: Row, alone: Row) -> None:
    """An answer must not depend on its neighbours in the batch."""
    longer = {name: np.concatenate([array, array]) for name, array in row.items() if array.ndim}
    beside = model.infer([row, {**row, **longer}])[0]
    grown = {name: a for name, a in beside.items() if a.shape != alone[name].shape}
    same = all(
        np.allclose(array, beside[name], _PADDING_TOLERANCE, _PADDING_TOLERANCE, equal_nan=True)
        for name, array in alone.items()
        if name not in grown
    )
    if not same or model.encode({**alone, **grown}) != model.encode(alone):
        raise _failed(
            model,
            "batch",
            "expected the same answer when the row is padded with zeros beside a longer one, came"
            " another; give the model a mask as input, or set `pad: false`",
        )


def _failed(model: LoadedModel, at: str, message: str) -> InvalidModel:
    where = model.bundle.where(f"$.{at}")
    return InvalidModel("model_check_failed", f"{where}: {at} fails on the sample: {message}")
