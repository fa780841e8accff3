"""Whether a plan fits this machine, as far as it can be told before it is loaded."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct

from pipelines.engines.engine import DeviceOutOfMemory
from pipelines.engines.tensorrt_library import Library
from schemas.errors import InvalidModel

_NO_ROOM = "INSUFFICIENT_GPU_MEMORY"


class Validity(Struct, frozen=True):
    """unknown: nothing speaks against it, and only loading it can tell; always so for TensorRT, and for
    TensorRT-RTX on a machine without a GPU. suboptimal: it runs here, one built here would be faster.
    reasons: why it is bad, in the library's words, such as UNSUPPORTED_CC."""

    verdict: Literal["valid", "suboptimal", "unknown", "bad"]
    reasons: tuple[str, ...] = ()

    def refuse_bad(self, artefact: str) -> None:
        """Raises InvalidModel("engine_unusable"), or DeviceOutOfMemory if only memory is missing."""
        if self.verdict != "bad":
            return
        if self.reasons == (_NO_ROOM,):
            raise DeviceOutOfMemory(
                f"Expected room on the GPU for {artefact}, got {_NO_ROOM}; close other engines, or "
                "use smaller buckets or a larger GPU."
            )
        raise InvalidModel(
            "engine_unusable",
            f"Expected an engine for this GPU, driver and library, {artefact} is refused for "
            f"{', '.join(self.reasons)}; build it again here, or update what is too old.",
        )


def validity_of(library: Library, runtime: Any, plan: Any) -> Validity:
    """plan: a buffer, of which the header is looked at."""
    if not library.is_rtx:
        return Validity("unknown")
    trt = library.trt
    # Without a driver the library finds every plan invalid, and has no reason to name.
    found, diagnostics = runtime.get_engine_validity(plan[: runtime.engine_header_size])
    reasons = tuple(
        name
        for name, member in trt.EngineInvalidityDiagnostics.__members__.items()
        if int(diagnostics) & int(member)
    )
    if found == trt.EngineValidity.VALID:
        return Validity("valid")
    if found == trt.EngineValidity.SUBOPTIMAL:
        return Validity("suboptimal", reasons)
    missing = reasons in [(), ("CUDA_ERROR",)]
    return Validity("unknown") if missing else Validity("bad", reasons)
