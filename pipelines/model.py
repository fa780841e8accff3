"""A loaded model: a bundle, its engines and its steps. The inference worker's way through one
batch is decode (each job), infer (all together), encode (each job)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from pipelines.bundle import Bundle
from pipelines.engines.engine import Engine, OnStep, unheard
from pipelines.modalities import build_steps
from pipelines.samples import sample_payload
from schemas.errors import InferenceFailed, InvalidJob, InvalidModel

Row = dict[str, NDArray[Any]]
"""One item's arrays by engine input or output, without the batch axis."""


class LoadedModel:
    """Safe to use from several threads at once. Owns its engines: `close` closes them."""

    def __init__(self, bundle: Bundle, engines: Mapping[str, Engine]) -> None:
        """Makes the steps; some of them run the model already. Raises InvalidModel."""
        self.bundle = bundle
        self.config = bundle.config
        self.engines = dict(engines)
        self._steps = build_steps(bundle)
        for i, step in enumerate(self._steps.postprocess):
            if prepare := getattr(step, "prepare", None):
                self._prepare(prepare, f"$.postprocess[{i}]")

    @property
    def memory_bytes(self) -> int:
        return sum(engine.memory_bytes for engine in self.engines.values())

    def close(self) -> None:
        for engine in self.engines.values():
            engine.close()

    @property
    def pads(self) -> bool:
        """Whether rows of different length share a batch, the shorter filled up with zeros."""
        pad = self.config.batch.pad
        return self.config.modality == "text" if pad is None else pad

    def decode(self, payload: bytes, content_type: str, params: Mapping[str, Any]) -> Row:
        """One job's payload to a row. content_type: only named in refusals, the bytes decide.

        Raises InvalidJob.
        """
        if params:
            raise InvalidJob(
                "params_unknown",
                f"Expected no parameters, {self.config.name} takes none; came {', '.join(params)}.",
            )
        value: Any = payload
        try:
            for step in self._steps.preprocess:
                value = step(value)
        except InvalidJob as error:
            raise InvalidJob(error.code, f"{error.message} (Sent as {content_type}.)") from error
        if not isinstance(value, dict):
            raise InvalidModel(
                "model_step_invalid",
                f"{self.bundle.where('$.preprocess')}: expected the last step to give arrays by"
                f" input, as to_tensor and tokenize do, came {type(value).__name__}",
            )
        return value

    def cost(self, row: Row) -> int:
        """How much work a row is, in elements; rows of like cost waste least when run together."""
        return sum(array.size for array in row.values())

    def infer(self, rows: Sequence[Row]) -> list[Row]:
        """Run rows through the engines; outputs in the same order, views of the batch's arrays.

        Rows of one shape run as one batch, whatever its size. Of rows that differ, one model pads
        the shorter with zeros, another runs a batch for each shape (`batch.pad`), so that no
        answer depends on its neighbours. Raises InferenceFailed, DeviceOutOfMemory.
        """
        outputs: list[Row] = [{} for _ in rows]
        for members in self._groups(rows):
            batch = self._steps.run(self.engines, collate([rows[i] for i in members]))
            self._check_batch(batch, len(members))
            for place, i in enumerate(members):
                outputs[i] = {name: array[place, ...] for name, array in batch.items()}
        return outputs

    def encode(self, row: Row) -> bytes:
        """One row of outputs to its answer's JSON. Raises InferenceFailed("bad_output")."""
        answer: Any = row
        for step in self._steps.postprocess:
            answer = step(answer)
        try:
            encoded = msgspec.json.encode(answer)
        except (TypeError, ValueError, RecursionError) as error:
            raise InferenceFailed(
                "bad_output", f"Expected an answer that can be JSON, came {error}."
            ) from error
        # msgspec writes NaN and infinity as null, which is hardly ever there otherwise.
        if b"null" in encoded and not _finite(answer):
            raise InferenceFailed(
                "bad_output", "Expected finite numbers in the answer, came NaN or infinity."
            )
        return encoded

    def sample_row(self) -> Row:
        """What to warm up with: the bundle's sample; without one a plain payload of the modality;
        if that is not for this model, zeros of the engine's input shapes."""
        if self.config.sample:
            return self.decode(self.bundle.path(self.config.sample).read_bytes(), "sample", {})
        if payload := sample_payload(self.config.modality):
            try:
                return self.decode(payload, "sample", {})
            except InvalidJob:
                pass  # such as a model of X-rays, whose own step reads no PNG
        return {
            spec.name: np.zeros([axis or 1 for axis in (spec.shape or ())[1:]], spec.dtype)
            for engine in self.engines.values()
            for spec in engine.inputs
        }

    def warm(self, on_step: OnStep = unheard) -> None:
        """One run per bucket, so that the first jobs find memory and kernels ready; each is a step."""
        row = self.sample_row()
        for bucket in self.config.batch.buckets:
            self.infer([row] * bucket)
            on_step(f"warm {bucket}")

    def _prepare(self, prepare: Any, at: str) -> None:
        try:
            prepare(self)
        except (InvalidJob, InferenceFailed) as error:
            raise InvalidModel(
                "model_check_failed", f"{self.bundle.where(at)}: {error.message}"
            ) from error

    def _groups(self, rows: Sequence[Row]) -> list[list[int]]:
        groups: dict[object, list[int]] = defaultdict(list)
        for i, row in enumerate(rows):
            shapes = tuple((name, a.ndim if self.pads else a.shape) for name, a in row.items())
            groups[shapes].append(i)
        return list(groups.values())

    def _check_batch(self, batch: Row, size: int) -> None:
        for name, array in batch.items():
            if not array.ndim or len(array) != size:
                raise InferenceFailed(
                    "bad_output",
                    f"Expected output {name!r} with the batch of {size} as its first axis,"
                    f" came shape {list(array.shape)}; export the graph with a dynamic batch.",
                )


def collate(rows: Sequence[Row]) -> Row:
    """Rows to one batch; where their lengths differ, the shorter are filled up with zeros."""
    return {name: _stack([row[name] for row in rows]) for name in rows[0]}


def _stack(arrays: list[NDArray[Any]]) -> NDArray[Any]:
    if len({array.shape for array in arrays}) == 1:
        return np.stack(arrays)
    longest = np.max([array.shape for array in arrays], axis=0)
    batch = np.zeros((len(arrays), *longest), arrays[0].dtype)
    for item, array in zip(batch, arrays, strict=True):
        item[tuple(map(slice, array.shape))] = array
    return batch


def _finite(value: Any) -> bool:
    if isinstance(value, float):
        return bool(np.isfinite(value))
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_finite, value))
    return True
