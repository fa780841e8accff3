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
    longer = {name: np.concatenate([array, array]) for name, array in row.items() if array.ndim}
    beside = model.infer([row, {**row, **longer}])[0]
    for name, array in alone.items():
        if array.shape == beside[name].shape and not np.allclose(
            array, beside[name], rtol=_PADDING_TOLERANCE, atol=_PADDING_TOLERANCE
        ):
            raise _failed(
                model,
                "batch",
                f"expected output {name!r} to be the same when its row is padded beside a longer"
                " one, it is not; give the model a mask as input, or set `pad: false`",
            )


def _failed(model: LoadedModel, at: str, message: str) -> InvalidModel:
    where = model.bundle.where(f"$.{at}")
    return InvalidModel("model_check_failed", f"{where}: {at} fails on the sample: {message}")
