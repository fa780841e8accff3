"""The fake library is held against the real bindings: every name that headrace uses is there, with these
parameters, in TensorRT 10.16 and 11 and in TensorRT-RTX; and what headrace uses is in the fake.

The classic bindings are a wheel of their own, which is imported in a process with empty libraries
where the real ones would be: those come from another index than PyPI.
"""

from __future__ import annotations

import ast
import enum
import importlib.util
import inspect
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from examples.models.wheels import wheel_file
from tests.servers.process import NOT_TESTED
from tests.unit.pipelines.engines import tensorrt_fake

ROOT = Path(__file__).parents[4]
OURS = {
    *("append", "clear", "itemsize", "logger", "max", "message"),
    *("metadata", "min", "opt", "read", "write"),
}
"""Attributes in headrace's modules that the library has too, and that are Python's and headrace's own there."""

Docs = dict[str, dict[str, str]]
"""By class and member the docstring, which begins with the signature."""

Used = dict[str, dict[str, str | None]]
"""By class and member the parameters; None: it is not called."""

CLASSIC = {
    "10.16.1.11": "9bf84a17f9df12e2c907d2f03b57139a8cfc9b034b90f701eec3e495caf8ad15",
    "11.4.0.106": "d07cb6dfd4300c794285e056633c98ffa54c63e06f828b903fdb4abbe2158938",
}
"""SHA-256 of tensorrt.so in the wheel of tensorrt-cu13-bindings for CPython 3.11 on x86-64."""

NEEDED = (
    *("createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL"),
    *("createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getPluginRegistry"),
    *("getBuilderPluginRegistry", "getNvOnnxParserVersion", "initLibNvInferPlugins"),
)
"""What the bindings look for in TensorRT's libraries."""

TELL = """if True:
    import importlib, json, sys
    sys.path.insert(0, sys.argv[2])
    trt = importlib.import_module(sys.argv[1])
    classes = {name: value for name, value in vars(trt).items() if isinstance(value, type)}
    classes["ILogger.Severity"] = trt.ILogger.Severity
    print(json.dumps({
        name: {member: getattr(cls, member).__doc__ or "" for member in dir(cls)}
        for name, cls in classes.items()
    }))
"""


def docs_of(module: str, folder: Path = Path("/nowhere"), **environment: str) -> Docs:
    done = subprocess.run(
        [sys.executable, "-c", TELL, module, str(folder)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    docs: Docs = json.loads(done.stdout)
    return docs


@pytest.fixture(scope="module")
def rtx() -> Docs:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip(f"{NOT_TESTED} TensorRT-RTX: it is not installed")
    return docs_of("tensorrt_rtx")


@pytest.fixture(scope="module", params=CLASSIC)
def classic(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Docs:
    compiler = shutil.which("cc")
    here = (sys.implementation.name, sys.version_info[:2], sys.platform, platform.machine())
    if compiler is None or here != ("cpython", (3, 11), "linux", "x86_64"):
        pytest.skip(
            f"{NOT_TESTED} the bindings of TensorRT: that takes CPython 3.11 on Linux with an x86-64 "
            "processor, and a C compiler"
        )
    version = request.param
    folder = tmp_path_factory.mktemp("bindings")
    name = "tensorrt_bindings/tensorrt.so"
    shutil.copy(wheel_file("tensorrt-cu13-bindings", version, name, CLASSIC[version]), folder)
    source = "".join(f"void* {symbol}(void) {{ return 0; }}\n" for symbol in NEEDED)
    for library in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
        file = f"lib{library}.so.{version.partition('.')[0]}"
        command = [compiler, "-shared", "-x", "c", "-", "-o", folder / file, f"-Wl,-soname,{file}"]
        subprocess.run(command, input=source, text=True, check=True)
    return docs_of("tensorrt", folder, LD_LIBRARY_PATH=str(folder))


def used(*, by_rtx: bool) -> Used:
    """The fake's classes and members, with the parameters of methods."""
    docs: Used = {}
    for cls in tensorrt_fake.CLASSES:
        only = tensorrt_fake.RTX_ONLY.get(cls.__name__, set())
        if only is None and not by_rtx:
            continue
        if issubclass(cls, enum.Enum):
            docs[cls.__qualname__] = dict.fromkeys(cls.__members__)
            continue
        docs[cls.__name__] = {
            name: parameters_of(member)
            for name, member in vars(cls).items()
            if (by_rtx or name not in (only or ()))
            and (not name.startswith("_") or is_constructor(cls, name))
        }
    return docs


def is_constructor(cls: type, name: str) -> bool:
    return name == "__init__" and cls in tensorrt_fake.CONSTRUCTED


def parameters_of(member: object) -> str | None:
    """None of what is not called."""
    if not inspect.isfunction(member):
        return None
    return ", ".join(list(inspect.signature(member).parameters)[1:])


def signatures(name: str, doc: str) -> list[str]:
    """`f(self: A, x: B = <C: 0>, y: D) -> E` gives `x, y`; of an overloaded function there are several."""
    found = re.findall(rf"\b{name}\(self: [^,)]+(?:, (.*?))?\) -> ", doc)
    return [", ".join(re.findall(r"(?:^|, )(\w+): ", parameters)) for parameters in found]


def differences(fake: Used, real: Docs) -> list[str]:
    wrong = []
    for cls, members in fake.items():
        for name, parameters in members.items():
            if name not in real.get(cls, {}):
                wrong.append(f"{cls}.{name} is not there")
                continue
            calls = signatures(name, real[cls][name])
            if calls if parameters is None else parameters not in calls:
                wrong.append(f"{cls}.{name}({parameters}): {calls}")
    return wrong


def test_tensorrt_rtx_has_what_is_used(rtx: Docs) -> None:
    assert differences(used(by_rtx=True), rtx) == []


def test_tensorrt_has_what_is_used(classic: Docs) -> None:
    assert differences(used(by_rtx=False), classic) == []


def test_the_fake_has_what_is_used(rtx: Docs) -> None:
    modules = (ROOT / "pipelines" / "engines").glob("tensorrt*.py")
    nodes = [node for module in modules for node in ast.walk(ast.parse(module.read_text()))]
    used_here = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    there = {name for cls, members in rtx.items() for name in (cls, *members)}
    fake = {name for cls in tensorrt_fake.CLASSES for name in (cls.__name__, *vars(cls))}
    assert {name for name in (used_here & there) - fake if name[0] != "_"} == OURS


def test_differences_are_found() -> None:
    doc = "f(self: m.A, x: typing.SupportsInt, y: m.B = <B.C: 0>) -> bool\n"
    fake = {"A": {"f": "x, z", "g": ""}}
    assert differences({"A": {"f": "x, y"}}, {"A": {"f": doc}}) == []
    assert differences(fake, {"A": {"f": doc}}) == ["A.f(x, z): ['x, y']", "A.g is not there"]
    assert differences({"A": {"f": None}}, {"A": {"f": doc}}) == ["A.f(None): ['x, y']"]
    assert differences({"A": {"f": ""}}, {"A": {"f": "a property"}}) == ["A.f(): []"]
    assert len(used(by_rtx=True)["IExecutionContext"]) > 6
    assert used(by_rtx=False)["OnnxParser"]["__init__"] == "network, logger"
    assert "__init__" not in used(by_rtx=False)["ParserError"]
    assert "is_stream_capturable" not in used(by_rtx=False)["IExecutionContext"]
