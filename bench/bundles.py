"""The models that are measured: a no-op of our own, and the demo's real ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from examples.models import efficientnet, minilm
from examples.models.graph import Graph
from examples.models.wheels import cache_folder
from infra.catalogue import Catalogue
from infra.objects import connect_objects
from infra.settings import Settings
from pipelines.bundle import Bundle
from pipelines.engines import open_engines
from pipelines.load import load_model
from pipelines.model import LoadedModel
from pipelines.registry import add
from schemas.models import BatchConfig

NOOP, WIDE_NOOP = "noop", "noop-wide"
IMAGE, TEXT = "efficientnet-lite0", "minilm-embed"

NOOP_FLOATS = 256
NOOP_YAML = """\
name: {name}
version: 1
modality: tensor
description: Takes 1 KB, gives its first number back
engines:
  main: {{file: model.onnx}}
preprocess:
  - from_buffer: {{input: x, dtype: float32, shape: [256]}}
postprocess:
  - tensor: {{outputs: [first]}}
batch:
  max_jobs: {max_jobs}
  buckets: [1, {max_jobs}]
"""
NOOP_MAX_JOBS = {NOOP: BatchConfig().max_jobs, WIDE_NOOP: 128}


def build_noop(folder: Path) -> None:
    """folder: named as the model, NOOP or WIDE_NOOP, which takes more jobs in a batch."""
    folder.mkdir(parents=True, exist_ok=True)
    g = Graph(folder.name)
    x = g.input("x", np.float32, ["N", NOOP_FLOATS])
    starts, ends, axes = (g.constant(np.array([at])) for at in (0, 1, 1))
    g.output("first", g.op("Slice", x, starts, ends, axes), np.float32, ["N", 1])
    g.save(folder / "model.onnx")
    text = NOOP_YAML.format(name=folder.name, max_jobs=NOOP_MAX_JOBS[folder.name])
    (folder / "model.yaml").write_text(text, "utf-8")


def noop_payload(number: int) -> bytes:
    """1 KB whose answer is this number."""
    return np.full(NOOP_FLOATS, number, np.float32).tobytes()


BUILD = {
    NOOP: build_noop,
    WIDE_NOOP: build_noop,
    IMAGE: efficientnet.build,
    TEXT: minilm.build_embedder,
}


def install(settings: Settings, names: list[str]) -> None:
    """Make the bundles that are missing, and add them to the stack's catalogue."""
    objects = connect_objects(settings)
    for name in names:
        cached = name in (IMAGE, TEXT)  # as the demo does: they take a while to make
        parent = cache_folder().parent if cached else settings.data_dir
        folder = parent / "bundles" / name
        BUILD[name](folder)
        engines = open_engines(settings, objects)
        add(folder, objects, engines, budget_bytes=settings.worker.memory_bytes)


def load(settings: Settings, name: str) -> LoadedModel:
    """As a worker loads it: the installed files, one thread an engine, warmed up."""
    objects = connect_objects(settings)
    catalogue, engines = Catalogue(objects), open_engines(settings, objects)
    bundle = Bundle.open(catalogue.folder(catalogue.resolve(name)), check_graphs=False)
    model = load_model(bundle, engines, budget_bytes=settings.worker.memory_bytes, may_build=False)
    model.warm()
    return model
