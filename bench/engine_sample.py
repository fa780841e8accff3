"""One cold start with the engine cache, in a process of its own, started by `engine_load.py`.

Reads from stdin what to load and from where. It imports no more than the load needs, and nothing of `bench`: its
imports are part of what is measured.
"""

from __future__ import annotations

import time

BEGAN = time.perf_counter()

import json  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import msgspec  # noqa: E402
import numpy as np  # noqa: E402

from pipelines.engines import Engine, EngineCache, Engines  # noqa: E402
from pipelines.engines.signing import Keyring  # noqa: E402
from schemas.models import EngineConfig  # noqa: E402

CACHE_BYTES = 8 << 30


def main() -> None:
    request = json.load(sys.stdin)
    cache = open_cache(request)
    if request["target"]:
        print(json.dumps(obtain(request, cache)))
        return
    if request["by_hand"]:
        sessions = open_by_hand(request)
        print(json.dumps(loaded()))
        del sessions
        return
    engines = [
        Engines(cache).obtain(Path(e["model"]), config_of(e), request["buckets"]).load()
        for e in request["engines"]
    ]
    told = loaded()
    run(request, engines)
    told |= {"answered_at": time.monotonic(), "cpu_ms": time.process_time() * 1000}
    for bucket in request["buckets"] if request["held"] else ():
        run(request, engines, bucket)
    began = time.perf_counter()
    if request["held"]:
        run(request, engines)
        told["held_ms"] = ms_since(began)
    print(json.dumps(told))


def loaded() -> dict[str, float]:
    """What it took up to now."""
    return {
        "load_ms": ms_since(BEGAN),
        "load_cpu_ms": time.process_time() * 1000,
        "answered_at": time.monotonic(),
    }


def open_by_hand(request: dict[str, Any]) -> list[Any]:
    """The least that loading takes in this very process: the vendor's library, and sessions of the cached files."""
    from pipelines.engines.onnxruntime import import_onnxruntime

    ort = import_onnxruntime()
    sessions = []
    for e in request["engines"]:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        path = f"{e['artefact']}/model.onnx"
        sessions.append(ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]))
    return sessions


def obtain(request: dict[str, Any], cache: EngineCache) -> dict[str, float]:
    """For a GPU that is not here: only until the artefacts are at hand, what it needs imported before."""
    import tensorrt_rtx  # noqa: F401

    import pipelines.engines.tensorrt  # noqa: F401

    began = time.perf_counter()
    for e in request["engines"]:
        Engines(cache).obtain(
            Path(e["model"]), config_of(e), request["buckets"], target=request["target"]
        ).release()
    return {"load_ms": ms_since(began), "answered_at": time.monotonic()}


def open_cache(request: dict[str, Any]) -> EngineCache:
    keyring = Keyring({"bench": bytes.fromhex(request["key"])})
    store = None
    if request["store"]:
        from infra.objects import open_objects
        from infra.settings import S3Settings
        from pipelines.engines.store import EngineStore

        objects = open_objects(request["store"], S3Settings.model_validate(request["s3"]))
        store = EngineStore(objects, keyring)
    return EngineCache(Path(request["cache"]), CACHE_BYTES, keyring=keyring, store=store)


def config_of(engine: dict[str, Any]) -> EngineConfig:
    return msgspec.convert(engine["config"], EngineConfig)


def run(request: dict[str, Any], engines: list[Engine], size: int = 1) -> None:
    """Each engine once, on a batch of ones."""
    for engine, e in zip(engines, request["engines"], strict=True):
        engine.run(
            {name: np.ones((size, *shape), dtype) for name, (dtype, shape) in e["inputs"].items()}
        )


def ms_since(began: float) -> float:
    return (time.perf_counter() - began) * 1000


if __name__ == "__main__":
    main()
