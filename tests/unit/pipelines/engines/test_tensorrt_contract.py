"""The fake library is held against the real bindings: every name that headrace uses is there, with these
parameters, in TensorRT 10.16 and 11 and in TensorRT-RTX.

The classic bindings are a wheel of their own, which is imported in a process with empty libraries
where the real ones would be: those come from another index than PyPI.
"""

from __future__ import annotations

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

Docs = dict[str, dict[str, str]]
"""By class and member the docstring, which begins with the signature."""

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


def used(*, by_rtx: bool) -> Docs:
    """The fake's classes and members, with the parameters of methods."""
    docs: Docs = {}
    for cls in tensorrt_fake.CLASSES:
        only = tensorrt_fake.RTX_ONLY.get(cls.__name__, set())
        if by_rtx or only is not None:
            members = {n: v for n, v in vars(cls).items() if not n.startswith("_")}
            docs[cls.__name__] = {
                name: parameters_of(member)
                for name, member in members.items()
                if by_rtx or name not in (only or ())
            }
        if issubclass(cls, enum.Enum):
            docs[cls.__name__] = dict.fromkeys(cls.__members__, "") if cls.__name__ in docs else {}
    return docs


def parameters_of(member: object) -> str:
    if not inspect.isfunction(member):
        return ""
    return ", ".join(list(inspect.signature(member).parameters)[1:])


def signatures(name: str, doc: str) -> list[str]:
    """`f(self: A, x: B = <C: 0>, y: D) -> E` gives `x, y`; of an overloaded function there are several."""
    found = re.findall(rf"\b{name}\(self: [^,)]+(?:, (.*?))?\) -> ", doc)
    return [", ".join(re.findall(r"(?:^|, )(\w+): ", parameters)) for parameters in found]


def differences(fake: Docs, real: Docs) -> list[str]:
    wrong = []
    for cls, members in fake.items():
        for name, parameters in members.items():
            if name not in real.get(cls, {}):
                wrong.append(f"{cls}.{name} is not there")
            elif parameters and parameters not in signatures(name, real[cls][name]):
                wrong.append(f"{cls}.{name}({parameters}): {signatures(name, real[cls][name])}")
    return wrong


def test_tensorrt_rtx_has_what_is_used(rtx: Docs) -> None:
    assert differences(used(by_rtx=True), rtx) == []


def test_tensorrt_has_what_is_used(classic: Docs) -> None:
    assert differences(used(by_rtx=False), classic) == []


def test_differences_are_found() -> None:
    doc = "f(self: m.A, x: typing.SupportsInt, y: m.B = <B.C: 0>) -> bool\n"
    fake = {"A": {"f": "x, z", "g": ""}}
    assert differences({"A": {"f": "x, y"}}, {"A": {"f": doc}}) == []
    assert differences(fake, {"A": {"f": doc}}) == ["A.f(x, z): ['x, y']", "A.g is not there"]
    assert len(used(by_rtx=True)["IExecutionContext"]) > 6
    assert "is_stream_capturable" not in used(by_rtx=False)["IExecutionContext"]
