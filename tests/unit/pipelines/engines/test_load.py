"""The way from a model file to a running engine, through the cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipelines.engines import Engine, EngineCache, Engines, digest
from pipelines.engines.onnxruntime import OnnxRuntime
from schemas.errors import InvalidModel, Transient
from schemas.models import EngineConfig

MakeModel = Callable[..., Path]
CONFIG = EngineConfig(file="model.onnx")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The models that were compiled, one entry for each time."""
    models: list[Path] = []
    compile_ = OnnxRuntime.compile

    def counted(self: OnnxRuntime, model: Path, *rest: object) -> None:
        models.append(model)
        compile_(self, model, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(OnnxRuntime, "compile", counted)
    return models


def load(model: Path, cache: EngineCache, buckets: tuple[int, ...] = (1, 8)) -> Engine:
    return Engines(cache).obtain(model, CONFIG, buckets).load()


def test_a_hit_compiles_nothing_and_answers_the_same(
    classifier: MakeModel, cache: EngineCache, batch: np.ndarray, compiled: list[Path]
) -> None:
    model = classifier(external=True)
    first = load(model, cache).run({"x": batch})["y"]
    again = load(model, cache).run({"x": batch})["y"]
    assert len(compiled) == 1
    assert np.array_equal(first, again)


def test_an_engine_that_is_compiled_anew_while_it_is_loaded_is_to_be_loaded_again(
    classifier: MakeModel, cache: EngineCache
) -> None:
    """Files of both may have been read."""
    engines, model = Engines(cache), classifier()
    obtained = engines.obtain(model, CONFIG, (1, 8))
    engines.obtain(model, CONFIG, (1, 8), rebuild=True).release()

    with pytest.raises(Transient) as replaced:
        obtained.load()

    assert replaced.value.code == "engine_replaced"
    engines.obtain(model, CONFIG, (1, 8)).load().close()


def test_a_load_tells_its_steps_and_where_the_artefact_came_from(
    classifier: MakeModel, cache: EngineCache
) -> None:
    told: list[str] = []
    for _ in range(2):
        Engines(cache).obtain(classifier(), CONFIG, (1, 8), on_step=told.append).load().close()
    assert told == [
        "backend", "artefact (built)",
        "backend", "artefact (local)",
    ]  # fmt: skip


SLOW_TO_IMPORT = {
    "asyncio", "concurrent.futures", "logging", "pydantic", "rich", "structlog", "subprocess", "tempfile",
}  # fmt: skip
"""Each takes longer than a hit does, and what loads an engine out of the cache needs none of them."""

A_HIT = """if True:
    import json, pathlib, sys
    import numpy, onnxruntime
    before = set(sys.modules)
    from pipelines.engines import EngineCache, Engines
    from schemas.models import EngineConfig
    cache = EngineCache(pathlib.Path(sys.argv[2]), 2**30)
    config = EngineConfig(file="model.onnx")
    Engines(cache).obtain(pathlib.Path(sys.argv[1]), config, (1, 8), may_build=False).load().close()
    print(json.dumps(sorted(set(sys.modules) - before)))
"""


def test_a_hit_imports_nothing_that_makes_a_cold_start_longer(
    classifier: MakeModel, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = classifier()
    monkeypatch.setattr(digest, "_SETTLED_NS", -(10**15))  # so that the model is not read anew
    load(model, cache).close()
    done = subprocess.run(
        [sys.executable, "-c", A_HIT, model, cache.root],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    imported = set(json.loads(done.stdout))
    assert "pipelines.engines.cache" in imported
    assert imported & {*SLOW_TO_IMPORT, "onnx", "pipelines.engines.flight"} == set()


def test_all_that_an_engine_depends_on_makes_another_one(
    classifier: MakeModel,
    cache: EngineCache,
    batch: np.ndarray,
    compiled: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = classifier(external=True)
    before = load(model, cache).run({"x": batch})["y"]

    load(model, cache, buckets=(1, 2, 4))
    assert len(compiled) == 2

    graph = model.read_bytes()
    classifier(external=True, seed=1)
    assert model.read_bytes() == graph
    assert not np.array_equal(load(model, cache).run({"x": batch})["y"], before)
    assert len(compiled) == 3, "changed weights beside an unchanged graph"

    here = OnnxRuntime().fingerprint()
    monkeypatch.setattr(OnnxRuntime, "fingerprint", lambda _: here | {"instruction_set": ["other"]})
    load(model, cache)
    assert len(compiled) == 4, "a cache copied to another CPU"


def test_an_engine_holds_its_artefact_until_it_is_closed(
    classifier: MakeModel, tmp_path: Path
) -> None:
    cache = EngineCache(tmp_path / "cache", max_bytes=1)

    def kept() -> int:
        return len(list((cache.root / "objects").glob("*/*")))

    first, second = load(classifier("a.onnx"), cache), load(classifier("b.onnx", seed=1), cache)
    assert kept() == 2
    first.close()
    second.close()
    load(classifier("c.onnx", seed=2), cache)
    assert kept() == 1


def test_a_broken_model_is_compiled_once_and_again_when_forced(
    cache: EngineCache, tmp_path: Path, compiled: list[Path]
) -> None:
    model = tmp_path / "empty.onnx"
    model.write_bytes(b"")
    for _ in range(2):
        with pytest.raises(InvalidModel) as refused:
            load(model, cache)
        assert refused.value.code == "unusable_onnx"
    assert len(compiled) == 1
    with pytest.raises(InvalidModel):
        Engines(cache).obtain(model, CONFIG, (1,), force=True).load()
    assert len(compiled) == 2


def test_a_model_that_changes_while_it_is_compiled_is_not_kept(
    classifier: MakeModel, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = classifier()
    compile_ = OnnxRuntime.compile

    def overtaken(self: OnnxRuntime, *args: object) -> None:
        classifier(seed=1)
        compile_(self, *args)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(OnnxRuntime, "compile", overtaken)
        with pytest.raises(Transient) as refused:
            load(model, cache)
    assert refused.value.code == "model_changed"
    assert not list((cache.root / "objects").glob("*/*"))
    load(model, cache)


def test_a_damaged_engine_is_rebuilt(
    classifier: MakeModel, cache: EngineCache, batch: np.ndarray, compiled: list[Path]
) -> None:
    model = classifier()
    before = load(model, cache).run({"x": batch})["y"]
    [weights] = (cache.root / "objects").glob("*/*/artefact/weights.bin")
    content = bytearray(weights.read_bytes())
    content[100] ^= 0x40
    weights.write_bytes(content)
    assert np.array_equal(load(model, cache).run({"x": batch})["y"], before)
    assert len(compiled) == 2


FULL_DISK = """if True:
    import json, pathlib, resource, sys, structlog
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    from pipelines.engines import EngineCache, Engines
    from schemas.errors import Transient
    from schemas.models import EngineConfig
    model, root = map(pathlib.Path, sys.argv[1:3])
    limit = int(sys.argv[3])
    cache = EngineCache(root, max_bytes=1 << 30)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        Engines(cache).obtain(model, EngineConfig(file="model.onnx"), (1,)).load()
    except Transient as error:
        print(json.dumps([error.code, error.message]))
    left = [str(path) for name in ("objects", "building") for path in (root / name).rglob("*")]
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    Engines(cache).obtain(model, EngineConfig(file="model.onnx"), (1,)).load()
    print(json.dumps(left))
"""


@pytest.mark.parametrize("limit_bytes", [0, 100, 30_000, 65_536])
def test_a_full_disk_is_a_clear_error_and_leaves_nothing(
    classifier: MakeModel, tmp_path: Path, limit_bytes: int
) -> None:
    expect_a_full_disk(classifier(), tmp_path / "cache", limit_bytes)


def test_a_disk_too_full_for_the_graph_alone_is_the_same_error(
    save_graph: MakeModel, tmp_path: Path
) -> None:
    nodes = [
        helper.make_node("Neg" if n % 2 else "Relu", [f"t{n}"], [f"t{n + 1}"]) for n in range(200)
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N"]) for name in ("t0", "t200")
    ]
    model = save_graph("no_weights.onnx", helper.make_graph(nodes, "chain", ends[:1], ends[1:]))
    expect_a_full_disk(model, tmp_path / "cache", limit_bytes=1000)


def expect_a_full_disk(model: Path, root: Path, limit_bytes: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, model, root, str(limit_bytes)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    error, left = map(json.loads, done.stdout.splitlines())
    assert error[0] == "disk_full"
    assert "free some space" in error[1]
    assert left == []


OUT_OF_MEMORY = """if True:
    import pathlib, resource, sys
    from pipelines.engines import DeviceOutOfMemory, EngineCache, Engines, digest
    from schemas.models import EngineConfig
    digest._SETTLED_NS = -(10**15)  # or the model itself would be read once more
    model, root = map(pathlib.Path, sys.argv[1:3])
    cache, config = EngineCache(root, max_bytes=1 << 30), EngineConfig(file="model.onnx")
    Engines(cache).obtain(model, config, (1,)).load().close()
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (16 << 20), resource.RLIM_INFINITY))
    try:
        Engines(cache).obtain(model, config, (1,)).load()
    except DeviceOutOfMemory as error:
        print(error)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux' account of memory")
def test_a_machine_without_enough_memory_for_the_weights_may_be_retried(
    save_graph: MakeModel, tmp_path: Path
) -> None:
    weights = numpy_helper.from_array(np.ones((4096, 2048), np.float32), "w")  # 32 MB
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "large",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4096])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 2048])],
        [weights],
    )
    model = save_graph("large.onnx", graph)
    done = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY, model, tmp_path / "cache"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert "Expected enough memory for loading model.onnx" in done.stdout
