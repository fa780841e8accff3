"""A model bundle's `model.yaml`, as a type.

Parsing it, with the line of each mistake, is in `pipelines/model_yaml.py`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field

from schemas.topics import Lane, Modality

MODEL_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")

Name = Annotated[str, Meta(pattern=rf"^{MODEL_NAME.pattern}\Z")]
Positive = Annotated[int, Meta(ge=1)]
Axis = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(gt=0)]
Milliseconds = Annotated[float, Meta(ge=0)]

Steps = Annotated[list[str | dict[str, dict[str, Any]]], Meta(min_length=1)]
"""Each step is `name` or `name: {parameter: value}`."""


class ShapeRange(Struct, frozen=True, forbid_unknown_fields=True):
    """Shapes of one input that an engine takes, without the batch axis; it is fastest at `opt`."""

    min: tuple[Axis, ...]
    opt: tuple[Axis, ...]
    max: tuple[Axis, ...]


Precision = Literal["float32", "bfloat16", "int8", "int8-dynamic"]


class Accuracy(Struct, frozen=True, forbid_unknown_fields=True):
    """What fewer bits than float32 may cost. samples: an .npz file beside the graph, with rows of every
    input; int8 is calibrated with them too. tolerance: how far off an output of any of them may be, as
    a part of its length: |output - float32's| / |float32's|."""

    samples: str
    tolerance: Annotated[float, Meta(gt=0)]


class EngineConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """One graph of the bundle. file: an ONNX file of the bundle, its weights in the bundle too.
    precision: float32 computes in what the graph says; fewer bits are refused without `accuracy`.
    shapes: of inputs with dynamic axes beside the batch, which TensorRT must know beforehand."""

    file: str
    backend: Literal["onnxruntime", "onnxruntime-cuda", "openvino", "tensorrt", "tensorrt-rtx"] = (
        "onnxruntime"
    )
    precision: Precision = "float32"
    accuracy: Accuracy | None = None
    shapes: dict[str, ShapeRange] = field(default_factory=dict)


class BatchConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """max_jobs: most jobs in one task. buckets: batch sizes the engine runs, ascending.
    max_delay_ms: how long a job may wait for company; 0 sends it as soon as a slot is free.
    pad: rows of different length share a run, the shorter ones filled up with zeros; only for
    models whose inputs tell them what is filling. By default text models do, others do not."""

    max_jobs: Positive = 32
    buckets: Annotated[tuple[Positive, ...], Meta(min_length=1)] = (1, 2, 4, 8)
    max_delay_ms: Milliseconds = 0
    pad: bool | None = None

    def __post_init__(self) -> None:
        if list(self.buckets) != sorted(set(self.buckets)):
            raise ValueError(f"Expected `buckets` in ascending order, got {list(self.buckets)}")


class Limits(Struct, frozen=True, forbid_unknown_fields=True):
    """max_bytes: of one payload. max_run_s: of one batch, then the worker process is ended.
    max_attempts: how often a job may fail for a passing reason, or take its worker down."""

    max_bytes: Positive = 32 * 1024 * 1024
    max_run_s: Seconds = 60
    max_attempts: Positive = 3


class ModelConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """All that `model.yaml` may say. run: the batch step between pre- and postprocessing;
    by default one forward pass of the only engine. sample: a file of the bundle to warm up with."""

    name: Name
    version: Positive
    modality: Modality
    engines: dict[str, EngineConfig]
    preprocess: Steps
    postprocess: Steps
    run: str | dict[str, dict[str, Any]] = "forward"
    description: str = ""
    tier: Lane = "standard"
    labels: list[str] | str | None = None
    tokenizer: str | None = None
    sample: str | None = None
    batch: BatchConfig = field(default_factory=BatchConfig)
    limits: Limits = field(default_factory=Limits)


class ModelCard(Struct, frozen=True):
    """What producers and the dispatcher need to know of one installed version."""

    name: str
    version: int
    modality: Modality
    tier: Lane
    description: str
    batch: BatchConfig
    limits: Limits
    digest: str
    """SHA-256 over the bundle's files: the version's identity."""
    size_bytes: int
    added_at: float
    memory_bytes: int = 0
    """What its engines took in memory when it was added; 0 where that is not known."""
