from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper
from typer.testing import CliRunner, Result

from headrace.cli.models import app

MODEL_YAML = """\
name: tiny
version: 1
modality: tensor
description: gives back [what] it gets
engines:
  main: {file: model.onnx}
preprocess: [{from_buffer: {input: x, dtype: float32, shape: [3]}}]
postprocess: [tensor]
"""

Run = Callable[..., Result]
MakeBundle = Callable[..., Path]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """`run("list", ...)`, with data and caches in a folder of its own."""

    def run(*args: str | Path, stdin: str | None = None, **env: str) -> Result:
        own = {"HEADRACE_DATA_DIR": str(tmp_path / "data"), "XDG_CACHE_HOME": str(tmp_path / "c")}
        return CliRunner().invoke(app, [str(arg) for arg in args], input=stdin, env=own | env)

    return run


@pytest.fixture
def make_bundle(tmp_path: Path) -> MakeBundle:
    def make(name: str = "tiny", version: int = 1, more: str = "") -> Path:
        folder = tmp_path / f"{name}-{version}"
        folder.mkdir()
        x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 3]) for n in "xy")
        graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y])
        opset = helper.make_opsetid("", 17)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=10)
        onnx.save(model, folder / "model.onnx")
        text = MODEL_YAML.replace("tiny", name).replace("version: 1", f"version: {version}")
        (folder / "model.yaml").write_text(text + more)
        return folder

    return make


def words(result: Result) -> str:
    """stderr without the line breaks of a narrow terminal."""
    return " ".join(result.stderr.split())


def refused(result: Result) -> str:
    """The message of a command that ended as the user's mistake."""
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert "error: " in result.stderr
    return words(result)


def test_a_model_is_added_listed_shown_and_removed(run: Run, make_bundle: MakeBundle) -> None:
    added = run("add", make_bundle())
    assert (added.exit_code, added.stdout) == (0, "")
    assert "tiny version 1 added" in words(added)

    listed = run("list")
    assert listed.exit_code == 0
    header, row = listed.stdout.splitlines()
    assert header.split()[:4] == ["name", "version", "modality", "tier"]
    assert row.split()[:4] == ["tiny", "1", "tensor", "standard"]

    shown = run("show", "tiny")
    assert shown.exit_code == 0
    assert "gives back [what] it gets" in shown.stdout
    assert "max_jobs 32" in shown.stdout

    removed = run("remove", "tiny", "--force", "--yes")
    assert removed.exit_code == 0
    assert "tiny version 1 removed" in words(removed)
    assert json.loads(run("list", "--json").stdout) == []


def test_json_is_all_that_stdout_holds(run: Run, make_bundle: MakeBundle) -> None:
    folders = [make_bundle("one"), make_bundle("two")]
    added = [json.loads(line) for line in run("add", *folders, "--json").stdout.splitlines()]
    assert [(card["name"], card["new"]) for card in added] == [("one", True), ("two", True)]
    again = json.loads(run("add", folders[0], "--json").stdout)
    assert again == {**added[0], "new": False}
    listed = json.loads(run("list", "--json").stdout)
    assert [{**card, "new": True} for card in listed] == added
    assert json.loads(run("show", "two", "--version", "1", "--json").stdout) == listed[1]


def test_the_same_model_again_is_no_error(run: Run, make_bundle: MakeBundle) -> None:
    folder = make_bundle()
    run("add", folder)
    again = run("add", folder)
    assert again.exit_code == 0
    assert "installed already, unchanged" in words(again)


def test_data_names_the_folder(run: Run, make_bundle: MakeBundle, tmp_path: Path) -> None:
    run("add", make_bundle(), "--data", tmp_path / "elsewhere")
    assert json.loads(run("list", "--json").stdout) == []
    assert len(json.loads(run("list", "--json", "--data", tmp_path / "elsewhere").stdout)) == 1


def test_no_model_installed(run: Run) -> None:
    result = run("list")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "`headrace models add DIR` installs one" in words(result)


def test_a_folder_that_is_no_bundle(run: Run, tmp_path: Path) -> None:
    assert "expected a folder with a model.yaml" in refused(run("add", tmp_path / "nothing"))
    assert "model.yaml" in refused(run("add", tmp_path))


def test_a_mistake_in_the_yaml_is_named_with_its_line(run: Run, make_bundle: MakeBundle) -> None:
    folder = make_bundle(more="tire: premium\n")
    assert f"{folder}/model.yaml:9: " in refused(run("add", folder))


def test_a_model_that_does_not_fit_is_refused_with_the_numbers(
    run: Run, make_bundle: MakeBundle
) -> None:
    folder = make_bundle()
    with (folder / "model.onnx").open("rb") as file:
        model = onnx.load(file)
    weights = helper.make_tensor("w", TensorProto.FLOAT, [17 << 20], bytes(68 << 20), raw=True)
    model.graph.initializer.append(weights)
    model.graph.node[0].CopyFrom(helper.make_node("Add", ["x", "mean"], ["y"]))
    model.graph.node.insert(0, helper.make_node("ReduceMean", ["w"], ["mean"], keepdims=0))
    model.graph.node.insert(0, helper.make_node("Identity", ["w"], ["z"]))
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [17 << 20]))
    onnx.save(model, folder / "model.onnx")
    message = refused(run("add", folder, HEADRACE_WORKER__MEMORY_BYTES="67108864"))
    assert "at most 67108864 bytes" in message
    assert "HEADRACE_WORKER__MEMORY_BYTES" in message


def test_models_before_a_refused_one_stay(
    run: Run, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    refused(run("add", make_bundle(), tmp_path / "nothing"))
    assert run("show", "tiny").exit_code == 0


@pytest.mark.parametrize("command", [["show"], ["remove", "--yes"]])
def test_an_unknown_model_is_refused_with_its_neighbours(
    run: Run, make_bundle: MakeBundle, command: list[str]
) -> None:
    run("add", make_bundle())
    assert "Did you mean tiny?" in refused(run(*command, "tinny"))
    assert "no version 7 is installed; there are 1" in refused(
        run(*command, "tiny", "--version", "7")
    )


def test_the_last_version_goes_only_by_force(run: Run, make_bundle: MakeBundle) -> None:
    run("add", make_bundle(version=1), make_bundle(version=2))
    assert "the versions [1, 2]" in refused(run("remove", "tiny", "--yes"))
    assert run("remove", "tiny", "--version", "1", "--yes").exit_code == 0
    assert "last of model tiny" in refused(run("remove", "tiny", "--yes"))
    assert run("remove", "tiny", "--yes", "--force").exit_code == 0


@pytest.mark.parametrize("answer", ["n\n", ""])
def test_nothing_is_removed_without_a_yes(run: Run, make_bundle: MakeBundle, answer: str) -> None:
    run("add", make_bundle())
    result = run("remove", "tiny", "--force", stdin=answer)
    assert result.exit_code == 1
    assert "Remove tiny version 1?" in result.stderr
    assert run("show", "tiny").exit_code == 0
    assert run("remove", "tiny", "--force", stdin="y\n").exit_code == 0
    assert refused(run("show", "tiny"))


def test_a_wrong_setting_is_named(run: Run) -> None:
    message = refused(run("list", HEADRACE_WORKER__MEMORY_BYTES="much"))
    assert "HEADRACE_WORKER__MEMORY_BYTES" in message


def test_a_store_that_does_not_answer_is_no_mistake_of_the_user(run: Run, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "objects").mkdir()
    (tmp_path / "data" / "objects" / "models").symlink_to("models")
    result = run("list")
    assert result.exit_code == 3
    assert "the store's folder does not answer" in words(result)


def test_listing_loads_no_engine(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom headrace.cli.models import app\n"
        f"app(['list', '--data', {str(tmp_path)!r}], standalone_mode=False)\n"
        "print([name for name in ('numpy', 'onnx', 'onnxruntime') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
