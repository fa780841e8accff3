"""What the engine cache costs at a start, beside two floors. Each measurement is a process of its own, in shuffled
order; those of a round are compared with each other.

*cache* is `engine_sample.py` with the engine on this machine's disk. *floor* is the same process with sessions of the
cached files opened by hand: the clock of a load begins with the script's first line, so imports count in both.
*minimum* is `engine_minimum.py`, what a person would write who has no headrace: compared from the start of the process
to the first result. `coldstart.py` measures the other ways to an engine.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from msgspec import Struct, field, structs, to_builtins

from bench.figures import Asked, Effort, Figure, spread
from examples.models import efficientnet, minilm, whisper
from examples.models.wheels import cache_folder
from pipelines.bundle import Bundle
from pipelines.engines import EngineCache, Engines
from pipelines.engines.signing import Keyring
from schemas.models import EngineConfig

LIGHT = ("light_resnet50", "light_squeezenet", "light_densenet121")
DEMO = {
    "efficientnet-lite0": efficientnet.build,
    "minilm-embed": minilm.build_embedder,
    "whisper-tiny-en": whisper.build,
}

ASKED = Asked("<=", 1.15)
BUCKETS = (1, 2, 4, 8)
CONFIG = EngineConfig(file="model.onnx")
CACHE_BYTES = 8 << 30
SETTLE_S = 2.5  # younger files are hashed again at each start, which is not what is measured
LENGTH = 16
"""Of axes beside the batch that are dynamic."""

HERE = Path(__file__).parent
MINIMUM, CACHE = "engine_minimum.py", "engine_sample.py"


class ModelEngine(Struct, frozen=True):
    """inputs: dtype and shape without the batch, by name. artefact: its folder in the cache of this machine."""

    model: str
    config: EngineConfig
    inputs: dict[str, tuple[str, tuple[int, ...]]] = {}
    artefact: str = ""


class Model(Struct, frozen=True):
    name: str
    buckets: tuple[int, ...]
    engines: list[ModelEngine]


class Request(Struct, frozen=True, kw_only=True):
    """What a process is to measure. store: of objects, "" for none. held: how long a run takes once all is warm.
    by_hand: open the artefacts without the cache. target: a GPU that is not here, for which the artefact is only
    obtained."""

    engines: list[ModelEngine]
    buckets: tuple[int, ...]
    cache: str
    key: str
    store: str = ""
    s3: dict[str, Any] = field(default_factory=dict)
    held: bool = False
    by_hand: bool = False
    target: str = ""


class Sample(NamedTuple):
    """Milliseconds. load: from the script's first line to the last engine loaded. first_result: from the start of the
    process. held: of a run when all is warm. load_cpu, cpu: CPU time of the process up to the load, and the result."""

    load: float
    first_result: float
    held: float
    load_cpu: float
    cpu: float


class Round(NamedTuple):
    """Processes that ran one after the other."""

    cache: Sample
    floor: Sample
    minimum: Sample


def measure(effort: Effort, _kind: str) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory(prefix="hr-load-") as folder:
        key = secrets.token_hex(32)
        cache = EngineCache(Path(folder, "cache"), CACHE_BYTES, keyring=keyring(key))
        models = [built(model, cache) for model in all_models(Path(folder))]
        time.sleep(SETTLE_S)
        requests = {model.name: request(model, cache.root, key) for model in models}
        for one in requests.values():
            one_round(
                one
            )  # notes that the files are as they were built, and compiles what is imported
        rounds: dict[str, list[Round]] = {name: [] for name in requests}
        for name in shuffled(list(requests), 3 if effort == "quick" else 9):
            rounds[name].append(one_round(requests[name]))
    for name, taken in rounds.items():
        yield from ratios(name, taken)


def one_round(one: Request) -> Round:
    """All three, in any order."""
    ways = [(CACHE, one), (CACHE, structs.replace(one, by_hand=True)), (MINIMUM, one)]
    order = random.sample(range(3), 3)
    taken = {at: sample(*ways[at]) for at in order}
    return Round(*(taken[at] for at in range(3)))


def ratios(name: str, rounds: list[Round]) -> Iterator[Figure]:
    """Of those that were measured one after the other, so that other work on the machine shows less."""
    yield ratio(
        f"cached engine load over the floor of the same process, {name}",
        [(taken.cache.load, taken.floor.load) for taken in rounds],
        [(taken.cache.load_cpu, taken.floor.load_cpu) for taken in rounds],
    )
    yield ratio(
        f"process start to first result over the hand-written minimum, {name}",
        [(taken.cache.first_result, taken.minimum.first_result) for taken in rounds],
        [(taken.cache.cpu, taken.minimum.cpu) for taken in rounds],
    )


def ratio(
    name: str, times: list[tuple[float, float]], cpu_times: list[tuple[float, float]]
) -> Figure:
    ours, theirs = zip(*times, strict=True)
    by_cpu = median(a / b for a, b in cpu_times)
    return Figure(
        name=name,
        measured=median(a / b for a, b in times),
        asked=ASKED,
        note=f"{median(ours):.0f} and {median(theirs):.0f} ms; by CPU time {by_cpu:.2f}",
        details={"ms": spread(ours), "floor_ms": spread(theirs)},
    )


def all_models(folder: Path) -> list[Model]:
    """folder: for those that are made here; the demo's lie where the demo puts them."""
    light = [
        Model(
            name.removeprefix("light_"),
            BUCKETS,
            [ModelEngine(str(write_light(name, folder / name)), CONFIG)],
        )
        for name in LIGHT
    ]
    return light + [demo_model(name) for name in DEMO]


def demo_model(name: str) -> Model:
    folder = cache_folder().parent / "bundles" / name
    DEMO[name](folder)
    bundle = Bundle.open(folder)
    engines = bundle.config.engines.values()
    return Model(
        name,
        bundle.config.batch.buckets,
        [ModelEngine(str(bundle.path(config.file)), config) for config in engines],
    )


def on(backend: Any, model: Model) -> Model:
    """The same by another backend."""
    return structs.replace(
        model,
        engines=[
            structs.replace(e, config=structs.replace(e.config, backend=backend))
            for e in model.engines
        ],
    )


def built(model: Model, cache: EngineCache, target: str = "") -> Model:
    """The model with its engines compiled, so that `cache` has them. With a target, inputs stay unknown."""
    return structs.replace(
        model, engines=[_built(e, model.buckets, cache, target) for e in model.engines]
    )


def _built(
    engine: ModelEngine, buckets: tuple[int, ...], cache: EngineCache, target: str
) -> ModelEngine:
    args = Path(engine.model), engine.config, buckets
    artefact = Engines(cache).obtain(*args, target=target or None).artefact
    artefact.release()
    if target:
        return structs.replace(engine, artefact=str(artefact.path))
    loaded = Engines(cache).obtain(*args).load()
    inputs = {
        spec.name: (spec.dtype.name, tuple(axis or LENGTH for axis in (spec.shape or ())[1:]))
        for spec in loaded.inputs
    }
    loaded.close()
    return structs.replace(engine, artefact=str(artefact.path), inputs=inputs)


def request(model: Model, cache: Path, key: str, **more: Any) -> Request:
    return Request(engines=model.engines, buckets=model.buckets, cache=str(cache), key=key, **more)


def sample(script: str, request: Request) -> Sample:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-P", str(HERE / script)],
        input=json.dumps(to_builtins(request)),
        stdout=subprocess.PIPE,
        env=environment(Path(request.cache).parent),
        check=True,
        text=True,
    )
    told = json.loads(done.stdout)
    first_result = (told["answered_at"] - began) * 1000
    return Sample(
        told["load_ms"],
        first_result,
        told.get("held_ms", 0.0),
        told.get("load_cpu_ms", 0.0),
        told.get("cpu_ms", 0.0),
    )


def environment(folder: Path) -> dict[str, str]:
    """All alike: no telemetry of ONNX Runtime, which the engines switch off and a script by hand does not; and Python's
    modules compiled once, as an installation has them."""
    inherited = {name: value for name, value in os.environ.items() if name[:10] != "PYTHONDONT"}
    prefix = folder / "bytecode"
    return inherited | {"ORT_DISABLE_TELEMETRY": "1", "PYTHONPYCACHEPREFIX": str(prefix)}


def shuffled(plan: list[Any], rounds: int) -> list[Any]:
    plan = plan * rounds
    random.shuffle(plan)
    return plan


def keyring(key: str) -> Keyring:
    return Keyring({"bench": bytes.fromhex(key)})


def write_light(name: str, folder: Path) -> Path:
    """Take a model from the onnx package and make its batch dynamic."""
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
    folder.mkdir(parents=True)
    onnx.save(proto, folder / "model.onnx")
    return folder / "model.onnx"
