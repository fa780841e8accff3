from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper
from typer.testing import CliRunner, Result

from headrace.cli import engine_builds
from headrace.cli.engines import app
from headrace.cli.models import app as models_app
from infra.objects.files import FileObjects
from pipelines.engines.onnxruntime import OnnxRuntime
from schemas.errors import InvalidModel, PipelineError

MODEL_YAML = """\
name: {name}
version: 1
modality: tensor
engines:
  main: {{file: model.onnx}}
preprocess: [{{from_buffer: {{input: x, dtype: float32, shape: [3]}}}}]
postprocess: [tensor]
"""
KEYS = json.dumps({"k1": "s" * 32})

Run = Callable[..., Result]
MakeBundle = Callable[..., Path]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """`run("list", ...)`, on a machine with data and caches of its own. keys: with which it signs."""

    def run(*args: object, keys: str = "", machine: str = "here", models: bool = False) -> Result:
        env = {
            "HEADRACE_DATA_DIR": str(tmp_path / "data"),
            "HEADRACE_ENGINES__CACHE_DIR": str(tmp_path / machine),
            "HEADRACE_ENGINES__KEYS": keys or "{}",
        }
        used = models_app if models else app
        return CliRunner().invoke(used, [str(arg) for arg in args], env=env)

    return run


@pytest.fixture
def make_bundle(tmp_path: Path) -> MakeBundle:
    def make(name: str = "tiny", op: str = "Identity") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 3]) for n in "xy")
        graph = helper.make_graph([helper.make_node(op, ["x"], ["y"])], name, [x], [y])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
        onnx.save(model, folder / "model.onnx")
        (folder / "model.yaml").write_text(MODEL_YAML.format(name=name))
        return folder

    return make


def documents(result: Result) -> Any:
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def words(result: Result) -> str:
    """stderr without the line breaks of a narrow terminal."""
    return " ".join(result.stderr.split())


def refused(result: Result, code: int = 2) -> str:
    assert result.exit_code == code, result.stderr
    assert "Traceback" not in result.stderr
    assert "error: " in result.stderr
    return words(result)


def test_an_engine_is_built_listed_shown_verified_and_pruned(
    run: Run, make_bundle: MakeBundle
) -> None:
    built = run("build", make_bundle())
    assert built.exit_code == 0
    assert built.stdout.startswith("tiny/1 main: ")
    assert "built in" in built.stdout

    [engine] = documents(run("list", "--json"))
    assert (engine["label"], engine["state"], engine["where"]) == ("tiny/1 main", "ready", ["disk"])
    header, row = run("list").stdout.splitlines()
    assert header.split()[:3] == ["key", "engine", "backend"]
    assert row.split()[:4] == [engine["key"][:16], "tiny/1", "main", "onnxruntime"]

    shown = run("show", engine["key"][:5])
    assert "instruction_set" in shown.stdout
    assert documents(run("show", engine["key"], "--json"))["manifest"]["label"] == "tiny/1 main"

    assert run("verify").stdout == f"{engine['key']}  good\n"
    assert run("prune", "--bytes", 0, "--dry-run").stdout.startswith("would remove 1, ")
    [removed] = documents(run("prune", "--bytes", 0, "--json"))
    assert removed["key"] == engine["key"]
    assert "There are no engines" in words(run("list"))


def test_prewarming_goes_on_after_an_engine_that_cannot_be_built(
    run: Run, make_bundle: MakeBundle
) -> None:
    run("add", make_bundle("broken"), make_bundle("good"), models=True, machine="another")
    build = OnnxRuntime.compile

    def compile_(self: OnnxRuntime, model: Path, *rest: Any) -> None:
        if "broken" in str(model):
            raise InvalidModel("engine_build_failed", "Expected it to compile; do something.")
        build(self, model, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnnxRuntime, "compile", compile_)
        done = run("prewarm")
    assert done.exit_code == 2
    told = done.stdout.splitlines()
    assert told[0].startswith("broken/1 main: not built: engine_build_failed")
    assert told[2].startswith("broken/1: does not run: ")
    assert told[3].startswith("good/1: loaded and warmed up in ")


def test_prewarming_shows_that_an_engine_does_not_run(
    run: Run, make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PipelineError("device_missing", "Expected a GPU, there is none; add one.")

    run("add", make_bundle(), models=True)
    monkeypatch.setattr(engine_builds, "load_model", refuse)
    done = run("prewarm")
    assert done.exit_code == 2
    assert done.stdout.splitlines()[-1].startswith(
        "tiny/1: does not run: device_missing: Expected a GPU"
    )


def test_what_is_there_is_not_built_again_unless_it_is_forced(
    run: Run, make_bundle: MakeBundle
) -> None:
    folder = make_bundle()
    assert run("build", folder).exit_code == 0
    again = documents(run("build", folder, "--json"))
    assert (again["engine"], again["origin"]) == ("tiny/1 main", "local")
    assert documents(run("build", folder, "--json", "--force"))["origin"] == "built"


def test_prewarm_takes_every_installed_model(run: Run, make_bundle: MakeBundle) -> None:
    assert "No model is installed" in words(run("prewarm"))
    folders = [make_bundle("one"), make_bundle("two", "Neg")]
    assert run("add", *folders, models=True, machine="another").exit_code == 0
    lines = [json.loads(line) for line in run("prewarm", "--json").stdout.splitlines()]
    assert [line["engine"] for line in lines[:2]] == ["one/1 main", "two/1 main"]
    assert [(line["model"], line["error"]) for line in lines[2:]] == [
        ("one/1", None),
        ("two/1", None),
    ]
    first, second = run("prewarm", "two/1").stdout.splitlines()
    assert "was here already" in first
    assert second.startswith("two/1: loaded and warmed up in ")
    assert "no model 'three'" in refused(run("prewarm", "three")).casefold()
    assert "NAME/VERSION" in refused(run("prewarm", "two/x"))


def test_machines_share_what_is_signed(run: Run, make_bundle: MakeBundle) -> None:
    folder = make_bundle()
    assert "copied to the store" in run("build", folder, keys=KEYS).stdout
    fetched = documents(run("build", folder, "--json", keys=KEYS, machine="there"))
    assert fetched["origin"] == "store"
    [engine] = documents(run("list", "--json", keys=KEYS))
    assert engine["where"] == ["disk", "store"]
    assert documents(run("verify", "--store", "--json", keys=KEYS)) == [
        {"key": engine["key"], "where": "store", "fault": None}
    ]
    assert "removed 0" in run("prune", "--store", "--unused-days", 0, keys=KEYS).stdout


def test_an_engine_that_the_store_lacks_is_copied_there(run: Run, make_bundle: MakeBundle) -> None:
    folder = make_bundle()
    assert run("build", folder, keys=KEYS).exit_code == 0
    [engine] = documents(run("list", "--json", keys=KEYS))
    objects = FileObjects(folder.parent / "data" / "objects")
    for info in list(objects.list("engines")):
        objects.delete(info.key)
    assert documents(run("build", folder, "--json", keys=KEYS))["shared"] is True
    assert documents(run("list", "--json", keys=KEYS)) == [
        {**engine, "where": ["disk", "store"], "used_at": pytest.approx(engine["used_at"], abs=60)}
    ]


def test_a_store_that_does_not_answer_is_left_out_and_it_is_said(
    run: Run, make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE_OBJECTS_URL", "s3://127.0.0.1:9/gone?secure=false")
    for name, value in {"ATTEMPTS": "1", "ACCESS_KEY": "a", "SECRET_KEY": "b"}.items():
        monkeypatch.setenv(f"HEADRACE_S3__{name}", value)
    folder = make_bundle()
    built = documents(run("build", folder, "--json", keys=KEYS))
    assert built["origin"] == "built"
    assert "127.0.0.1:9" in built["store_fault"]
    listed = run("list", "--json", keys=KEYS)
    assert len(documents(listed)) == 1
    assert "it does not answer" in words(listed)


def test_damage_is_found_and_the_exit_code_says_so(
    run: Run, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    folder = make_bundle()
    assert run("build", folder).exit_code == 0
    [file] = (tmp_path / "here" / "objects").glob("*/*/artefact/model.onnx")
    content = bytearray(file.read_bytes())
    content[10] ^= 1
    file.write_bytes(content)
    found = run("verify")
    assert found.exit_code == 1
    assert "artefact/model.onnx" in found.stdout
    assert run("verify").exit_code == 0, "it is removed"
    assert documents(run("build", folder, "--json"))["origin"] == "built"


def test_engines_travel_in_a_file(run: Run, make_bundle: MakeBundle, tmp_path: Path) -> None:
    file = tmp_path / "engines.tar"
    folder = make_bundle()
    assert run("build", folder, keys=KEYS).exit_code == 0
    assert "written to" in run("export", file, keys=KEYS).stdout
    [taken] = documents(run("import", file, "--json", keys=KEYS, machine="there"))
    assert (taken["engine"], taken["new"]) == ("tiny/1 main", True)
    origin = documents(run("build", folder, "--json", keys=KEYS, machine="there"))["origin"]
    assert origin == "local"

    stranger = json.dumps({"k1": "x" * 32})
    assert "not that of its content" in refused(run("import", file, keys=stranger), code=1)
    assert "HEADRACE_ENGINES__KEYS" in refused(run("import", file), code=1)
    assert "tar file" in refused(run("import", folder / "model.yaml", keys=KEYS), code=1)
    assert "No such file" in refused(run("import", tmp_path / "none", keys=KEYS), code=1)


def test_an_export_that_fails_leaves_no_file(
    run: Run, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    assert run("build", make_bundle()).exit_code == 0
    refused(run("export", tmp_path / "engines.tar"), code=1)
    assert list(tmp_path.glob("engines.tar*")) == []


def test_what_cannot_be_built_does_not_keep_the_rest_from_it(
    run: Run, make_bundle: MakeBundle
) -> None:
    broken, good = make_bundle("broken"), make_bundle("good")
    model = onnx.load(broken / "model.onnx")
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, broken / "model.onnx")
    done = run("build", broken, good)
    assert done.exit_code == 2
    first, second = done.stdout.splitlines()
    assert first.startswith("broken/1 main: not built: unsupported_operator")
    assert "NoSuchOperator" in first
    assert second.startswith("good/1 main: ")

    assert "not tried again" in run("build", broken).stdout
    assert "not tried again" not in run("build", broken, "--force").stdout
    [failed] = [e for e in documents(run("list", "--json")) if e["state"] == "failed"]
    assert failed["label"] == "broken/1 main"
    assert "NoSuchOperator" in run("show", failed["key"]).stdout


def test_the_builders_log_is_shown(
    run: Run, make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    from infra.logs import get_logger

    compile_ = OnnxRuntime.compile

    def talkative(self: OnnxRuntime, *args: Any) -> None:
        get_logger("engines.vendor").info("layer_fused", layer="conv[1]")
        compile_(self, *args)

    monkeypatch.setattr(OnnxRuntime, "compile", talkative)
    assert "layer='conv[1]'" in words(run("build", make_bundle()))
    [engine] = documents(run("list", "--json"))
    assert "layer='conv[1]'" in run("show", engine["key"]).stdout


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["show", "ab"], "headrace engines list"),
        (["verify", "ab"], "headrace engines list"),
        (["verify", "--store"], "HEADRACE_ENGINES__KEYS"),
        (["prune", "--store"], "--unused-days"),
        (["prune", "--unused-days", "1"], "--store"),
        (["build", "no-such-model"], "no-such-model"),
    ],
)
def test_mistakes_are_explained(run: Run, args: list[str], expected: str) -> None:
    assert expected in refused(run(*args))


def test_a_backend_that_builds_for_this_machine_alone_says_so(
    run: Run, make_bundle: MakeBundle
) -> None:
    folder = make_bundle()
    assert "engine_target_unsupported" in run("build", folder, "--target", "sm89").stdout
    assert "unknown_backend" in run("build", folder, "--backend", "abacus").stdout


def test_a_key_that_is_too_short_is_refused_and_not_shown(run: Run) -> None:
    result = run("list", keys=json.dumps({"k1": "tooshort"}))
    assert "HEADRACE_ENGINES__KEYS" in refused(result)
    assert "tooshort" not in result.stderr


def test_listing_imports_no_engine(tmp_path: Path) -> None:
    """It must answer at once, and on machines without a backend."""
    script = f"""
import sys
from headrace.cli import main
sys.argv[1:] = ["engines", "list", "--data", {str(tmp_path)!r}]
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
print([name for name in sys.modules if name in ("onnxruntime", "onnx", "openvino", "tensorrt_rtx")])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["[]"], done


def test_some_engines_are_exported(run: Run, make_bundle: MakeBundle, tmp_path: Path) -> None:
    assert run("build", make_bundle("one"), make_bundle("two", "Neg"), keys=KEYS).exit_code == 0
    [engine, _] = documents(run("list", "--json", keys=KEYS))
    assert run("export", tmp_path / "e.tar", engine["key"][:8], keys=KEYS).exit_code == 0
    with tarfile.open(tmp_path / "e.tar") as tar:
        assert {name.partition("/")[0] for name in tar.getnames()} == {engine["key"]}
