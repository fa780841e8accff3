"""An ONNX graph in 8 bits, by ONNX Runtime's own quantiser."""

from __future__ import annotations

import platform
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.engines.cpu import instruction_set
from pipelines.engines.engine import Arrays
from pipelines.engines.onnxruntime import import_onnxruntime
from schemas.errors import InvalidModel

_VNNI = {"avx512_vnni", "avx_vnni"}

_tempdir = threading.Lock()


def quantised(model: Path, folder: Path, samples: Sequence[Arrays] | None) -> Path:
    """Write the graph in 8 bits into an empty folder, and what is needed on the way.

    samples: batches by whose range activations are quantised beforehand (static, by Q/DQ nodes);
    without, only weights are, and activations as they come (dynamic): for models made of MatMul,
    whose activations differ much from one input to the next. Raises InvalidModel.
    """
    import_onnxruntime()
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared, written = folder / "prepared.onnx", folder / "quantised.onnx"
    options: dict[str, Any] = {
        "per_channel": True,
        "reduce_range": _sums_overflow(),
        "weight_type": quantization.QuantType.QInt8,
        "use_external_data_format": True,  # or a graph of 2 GB could not be written
    }
    try:
        with _temporary_files_in(folder):
            quant_pre_process(
                str(model), str(prepared), skip_symbolic_shape=True, save_as_external_data=True
            )
            if samples is None:
                quantization.quantize_dynamic(str(prepared), str(written), **options)
            else:
                kinds = quantization.QuantType
                activations = kinds.QInt8 if _is_arm() else kinds.QUInt8
                reader = _reader(quantization, samples)
                quantization.quantize_static(
                    str(prepared), str(written), reader, activation_type=activations, **options
                )
    except OSError:  # such as a full disk: not the model's fault
        raise
    except Exception as error:
        raise InvalidModel(
            "quantisation_failed",
            f"Expected {model.name} to be quantised, ONNX Runtime says: {error}; see that the samples"
            " fit its inputs, or use another precision.",
        ) from error
    return written


@contextmanager
def _temporary_files_in(folder: Path) -> Iterator[None]:
    """The quantiser takes its temporary folders, as large as the model, from where Python's lie, and cannot
    be told another place. For the whole process, so one at a time."""
    with _tempdir:
        usual, tempfile.tempdir = tempfile.tempdir, str(folder)
        try:
            yield
        finally:
            tempfile.tempdir = usual


def _reader(quantization: Any, samples: Sequence[Arrays]) -> Any:
    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._samples: Iterator[Arrays] = iter(samples)

        def get_next(self) -> Arrays | None:
            return next(self._samples, None)

    return Reader()


def _sums_overflow() -> bool:
    """x86 without VNNI adds pairs of products in 16 bits: weights then get 7."""
    return not _is_arm() and not _VNNI & set(instruction_set())


def _is_arm() -> bool:
    return platform.machine().lower() in ("aarch64", "arm64")
