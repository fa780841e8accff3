"""What the engine cache costs at a worker's start, beside the floor: a hand-written session.

python -m bench.engine_load [--rounds 7] [--json]

Each measurement is a process of its own, in shuffled order. *floor* makes a session of the cached
artefact with ONNX Runtime's own calls, *cache* is `load_engine`, *onnx* lets ONNX Runtime optimise
the model each time. All three have imported the same before the clock of `load` starts.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from bench.figures import Asked, Effort, Figure, spread
from pipelines.engines import EngineCache, load_engine
from pipelines.engines.onnxruntime import MODEL_FILE, OnnxRuntime
from schemas.models import EngineConfig

MODELS = ("light_resnet50", "light_squeezenet", "light_densenet121")
ASKED = Asked("<=", 2)
CACHE_BYTES = 1 << 30
SETTLE_S = 2.5  # younger files are hashed again at each start, which is not what is measured

Run = Callable[[np.ndarray], object]


class Sample(NamedTuple):
    """Milliseconds. first_result_ms: since the process was started."""

    load_ms: float
    first_result_ms: float


class Prepared(NamedTuple):
    """A model in the cache. artefact: its folder there. build_s: what compiling it took."""

    model: Path
    cache: Path
    artefact: Path
    build_s: float


def measure(effort: Effort, _kind: str) -> Iterator[Figure]:
    for name, samples in measure_all(3 if effort == "quick" else 7)[0].items():
        ratio = loads(samples["cache"]) / loads(samples["floor"])
        yield Figure(
            name=f"engine load from cache over the floor, {name}",
            measured=ratio,
            asked=ASKED,
            note=", ".join(f"{way} {loads(samples[way]):.1f} ms" for way in WAYS),
            details={way: {"load_ms": spread(s.load_ms for s in samples[way])} for way in WAYS},
        )


def measure_all(rounds: int) -> tuple[dict[str, dict[str, list[Sample]]], dict[str, Prepared]]:
    """Samples by model and way, and what was measured."""
    with tempfile.TemporaryDirectory() as folder:
        prepared = {name: prepare(name, Path(folder)) for name in MODELS}
        time.sleep(SETTLE_S)
        for item in prepared.values():
            sample("cache", item)
        plan = [(name, way) for name in MODELS for way in WAYS] * rounds
        random.shuffle(plan)
        samples: dict[str, dict[str, list[Sample]]] = {
            name: {way: [] for way in WAYS} for name in MODELS
        }
        for name, way in plan:
            samples[name][way].append(sample(way, prepared[name]))
    return samples, prepared


def prepare(name: str, folder: Path) -> Prepared:
    """Take a model from the onnx package, make its batch dynamic, compile it into a cache."""
    import onnx
    from onnx import numpy_helper

    proto = onnx.load(Path(onnx.__file__).parent / f"backend/test/data/light/{name}.onnx")
    for value in (*proto.graph.input, *proto.graph.output):
        if len(value.type.tensor_type.shape.dim) > 1:
            value.type.tensor_type.shape.dim[0].dim_param = "N"
    targets = {node.input[1] for node in proto.graph.node if node.op_type == "Reshape"}
    for tensor in proto.graph.initializer:
        if tensor.name in targets:
            shape = numpy_helper.to_array(tensor).copy()
            shape[0] = -1 if (shape[1:] > 0).all() else 0
            tensor.CopyFrom(numpy_helper.from_array(shape, tensor.name))
    model, cache = folder / name / "model.onnx", folder / name / "cache"
    model.parent.mkdir()
    onnx.save(proto, model)
    began = time.perf_counter()
    load_engine(model, CONFIG, BUCKETS, cache=EngineCache(cache, CACHE_BYTES)).close()
    build_s = time.perf_counter() - began
    [artefact] = (cache / "objects").glob("*/*/artefact")
    return Prepared(model, cache, artefact, build_s)


def sample(way: str, prepared: Prepared) -> Sample:
    paths = map(str, (prepared.model, prepared.cache, prepared.artefact))
    command = [sys.executable, "-m", "bench.engine_load", "--sample", way, *paths]
    began = time.monotonic()
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    load_ms, answered = json.loads(output)
    return Sample(load_ms, (answered - began) * 1000)


def take_sample(way: str, model: Path, cache: Path, artefact: Path) -> None:
    """In the process of its own: load, answer once, print the milliseconds and the time."""
    OnnxRuntime()  # imports the vendor's library, for whichever way
    began = time.perf_counter()
    run = WAYS[way](model, cache, artefact)
    load_ms = (time.perf_counter() - began) * 1000
    run(np.zeros((1, 3, 224, 224), np.float32))
    print(json.dumps([load_ms, time.monotonic()]))


def floor(model: Path, cache: Path, artefact: Path) -> Run:
    return session(artefact / MODEL_FILE, optimise=False)


def plain(model: Path, cache: Path, artefact: Path) -> Run:
    return session(model, optimise=True)


def session(path: Path, optimise: bool) -> Run:
    import onnxruntime

    levels = onnxruntime.GraphOptimizationLevel
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimise else levels.ORT_DISABLE_ALL
    made: Any = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = made.get_inputs()[0].name
    return lambda images: made.run(None, {name: images})


def cached(model: Path, cache: Path, artefact: Path) -> Run:
    engine = load_engine(model, CONFIG, BUCKETS, cache=EngineCache(cache, CACHE_BYTES))
    name = engine.inputs[0].name
    return lambda images: engine.run({name: images})


CONFIG = EngineConfig(file="model.onnx")
BUCKETS = (1, 2, 4, 8)
WAYS: dict[str, Callable[[Path, Path, Path], Run]] = {
    "floor": floor,
    "cache": cached,
    "onnx": plain,
}


def loads(samples: list[Sample]) -> float:
    return median(sample.load_ms for sample in samples)


def first_results(samples: list[Sample]) -> float:
    return median(sample.first_result_ms for sample in samples)


def show(samples: dict[str, dict[str, list[Sample]]], prepared: dict[str, Prepared]) -> None:
    from rich.console import Console  # not at the top: each sample would import it
    from rich.table import Table

    table = Table(title="load / process start to first result, medians in ms")
    for column in ("model", *WAYS, "ratio", "asked", "compile"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, by_way in samples.items():
        ratio = loads(by_way["cache"]) / loads(by_way["floor"])
        table.add_row(
            name.removeprefix("light_"),
            *(f"{loads(by_way[way]):.1f} / {first_results(by_way[way]):.0f}" for way in WAYS),
            f"{ratio:.2f} {'ok' if ASKED.met_by(ratio) else 'short'}",
            f"{ASKED.sign} {ASKED.value:g}",
            f"{prepared[name].build_s * 1000:.0f}",
        )
    Console().print(table)


def as_dicts(by_way: dict[str, list[Sample]]) -> dict[str, list[dict[str, float]]]:
    return {way: [sample._asdict() for sample in samples] for way, samples in by_way.items()}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.engine_load", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="processes per model and way")
    parser.add_argument("--json", action="store_true", help="print all samples instead of a table")
    parser.add_argument("--sample", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.sample:
        way, *paths = options.sample
        take_sample(way, *map(Path, paths))
        return 0
    samples, prepared = measure_all(options.rounds)
    if options.json:
        print(json.dumps({name: as_dicts(by_way) for name, by_way in samples.items()}))
    else:
        show(samples, prepared)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
