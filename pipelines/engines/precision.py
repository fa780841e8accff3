"""Fewer bits than float32: asked for in model.yaml, and proven on samples before an engine is kept.

int8 is written into the graph (`quantise.py`), so every backend computes in it; bfloat16 is left to
the backend. What comes out is run beside the unchanged model, and refused if it is too far off.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from infra.logs import get_logger
from pipelines.engines.digest import sha256_of
from pipelines.engines.engine import Array, Arrays, Backend, Engine
from schemas.errors import InferenceFailed, InvalidModel
from schemas.models import Accuracy, EngineConfig, Precision

PRECISIONS: dict[str, tuple[Precision, ...]] = {
    "onnxruntime": ("float32", "int8", "int8-dynamic"),
    "onnxruntime-cuda": ("float32",),
    "openvino": ("float32", "bfloat16", "int8"),
    "tensorrt": ("float32",),
    "tensorrt-rtx": ("float32",),
}
"""By backend. float32 is what the graph says: one that is exported in fewer bits keeps them."""

_RECIPE = 1
"""Raise it when the same words of model.yaml shall make another engine."""

_log = get_logger("engines.precision")


def refuse_unsupported(config: EngineConfig) -> None:
    """Raises InvalidModel for a precision that the backend has not, or that nothing is to be proven by."""
    known = PRECISIONS[config.backend]
    if config.precision not in known:
        raise InvalidModel(
            "precision_unsupported",
            f"Expected precision {' or '.join(known)} of the backend {config.backend}, got"
            f" {config.precision}; choose another of the two.",
        )
    if config.precision != "float32" and config.accuracy is None:
        raise InvalidModel(
            "precision_unproven",
            f"Expected `accuracy: {{samples: FILE.npz, tolerance: 0.1}}` beside precision"
            f" {config.precision}, got none; say what it may cost and on which inputs that is seen.",
        )


class Lowering:
    """How one model's graph becomes what its backend compiles, and what the engine must keep to."""

    def __init__(self, model: Path, config: EngineConfig) -> None:
        """Raises InvalidModel."""
        refuse_unsupported(config)
        self._model = model
        self._precision = config.precision
        self._accuracy = config.accuracy if config.precision != "float32" else None

    def key(self) -> object:
        """What of it an artefact depends on, JSON-able. Raises InvalidModel."""
        if self._accuracy is None:
            return self._precision
        from pipelines.engines.onnxruntime import OnnxRuntime

        return {
            "recipe": [_RECIPE, OnnxRuntime.name, OnnxRuntime().version],
            "precision": self._precision,
            "samples": self._digest(self._accuracy),
            "tolerance": self._accuracy.tolerance,
        }

    @contextmanager
    def graph(self, scratch: Path) -> Iterator[Path]:
        """What the backend compiles, for the length of the block. scratch: a folder with room for it, where
        nothing is left. Raises InvalidModel."""
        if self._accuracy is None or self._precision == "bfloat16":
            yield self._model
            return
        import tempfile  # not at the top: see cache.py

        from pipelines.engines.quantise import quantised

        with tempfile.TemporaryDirectory(prefix="graph-", dir=scratch) as folder:
            samples = read_samples(self._model.parent / self._accuracy.samples)
            dynamic = self._precision == "int8-dynamic"
            yield quantised(self._model, Path(folder), None if dynamic else samples)

    def prove(self, backend: Backend, artefact: Path) -> None:
        """Run every sample as the engine does and as the unchanged model does.

        Raises InvalidModel("accuracy_lost") if an output of one is further off than the tolerance.
        """
        if self._accuracy is None:
            return
        from pipelines.engines.onnxruntime import open_unchanged

        samples = read_samples(self._model.parent / self._accuracy.samples)
        engine, exact = backend.load(artefact, threads=1), open_unchanged(self._model)
        try:
            self._compare(engine, exact, samples, self._accuracy.tolerance)
        finally:
            engine.close()
            exact.close()

    def _compare(
        self, engine: Engine, exact: Engine, samples: list[Arrays], tolerance: float
    ) -> None:
        worst, where = 0.0, ""
        for index, sample in enumerate(samples):
            try:
                came, expected = engine.run(sample), exact.run(sample)
            except InferenceFailed as error:
                raise _wrong_samples(f"sample {index} does not run: {error.message}") from error
            for name, array in expected.items():
                off = difference(came[name], array)
                if off > worst:
                    worst, where = off, f"output {name!r} on sample {index}"
        _log.info("precision_compared", precision=self._precision, worst=worst, where=where)
        if worst > tolerance:
            raise InvalidModel(
                "accuracy_lost",
                f"Expected {self._precision} of {self._model.name} to be at most {tolerance:g} off"
                f" float32, it is {worst:.3g} off in {where}; allow more if its answers are still"
                " right, or use another precision.",
            )

    def _digest(self, accuracy: Accuracy) -> str:
        try:
            return sha256_of(self._model.parent / accuracy.samples)
        except OSError as error:
            raise _wrong_samples(str(error)) from error


def difference(came: Array, exact: Array) -> float:
    """|came - exact| / |exact|, each the root of the sum of squares; infinite where that is no number."""
    if came.shape != exact.shape:
        return math.inf
    if exact.dtype.kind == "O":
        return 0.0 if np.array_equal(came, exact) else math.inf
    apart = float(np.linalg.norm(came.astype(np.float64) - exact.astype(np.float64)))
    length = float(np.linalg.norm(exact.astype(np.float64)))
    off = apart / length if length else apart and math.inf
    return math.inf if math.isnan(off) else off


def read_samples(path: Path) -> list[Arrays]:
    """Of an .npz file with the rows of each input: a batch of one for each. Raises InvalidModel."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        counts = {len(array) for array in arrays.values()}
    except (
        Exception
    ) as error:  # numpy, zipfile and zlib have one of their own for each kind of damage
        raise _wrong_samples(f"{path.name}: {error}") from error
    if len(counts) != 1 or counts == {0}:
        raise _wrong_samples(f"{path.name}: inputs with {sorted(counts)} rows")
    return [{name: array[i : i + 1] for name, array in arrays.items()} for i in range(counts.pop())]


def _wrong_samples(came: str) -> InvalidModel:
    return InvalidModel(
        "samples_invalid",
        "Expected an .npz file beside the graph, in which each of its inputs has as many rows as the"
        f" others, got: {came}; write it with numpy.savez.",
    )
