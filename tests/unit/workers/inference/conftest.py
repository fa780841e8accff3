"""Models and stores for the worker's parts, and threads whose failures do not go unnoticed."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from infra.fleet import SlotToken
from pipelines.engines.engine import DeviceOutOfMemory
from schemas.batches import Batch, BatchItem
from schemas.errors import InferenceFailed, InvalidJob, Transient
from schemas.models import BatchConfig
from schemas.payloads import Payload, Ref

PATIENCE_S = 20
"""How long a test waits for a thread before it says that it never came."""


class Crew:
    """Threads of one test. `run(work)` starts one; at the end they must have ended, and without an error."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self._errors: list[BaseException] = []

    def run(self, work: Callable[..., Any], *args: Any) -> threading.Thread:
        def guarded() -> None:
            try:
                work(*args)
            except BaseException as error:
                self._errors.append(error)

        thread = threading.Thread(target=guarded, daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread

    def join(self) -> None:
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive(), "a thread did not end"
        if self._errors:
            raise self._errors[0]


@pytest.fixture
def crew() -> Iterator[Crew]:
    crew = Crew()
    yield crew
    crew.join()


@pytest.fixture
def soon() -> Callable[[threading.Event], None]:
    """`soon(event)`: it is set before long, or the test fails."""

    def wait(event: threading.Event) -> None:
        assert event.wait(PATIENCE_S), "it did not happen"

    return wait


class FakeModel:
    """Answers a number with its double. Payloads that say `bad STAGE` or `bug STAGE` fail there;
    `large` has a large answer. runs: the rows of each engine run."""

    def __init__(self, buckets: tuple[int, ...] = (1, 2, 4, 8)) -> None:
        config = SimpleNamespace(batch=BatchConfig(buckets=buckets))
        self.bundle = SimpleNamespace(config=config)
        self.decoded: list[bytes] = []
        self.runs: list[list[Any]] = []
        self.most_rows = 1000
        self.before_infer: Callable[[list[str]], None] = lambda rows: None
        self._lock = threading.Lock()

    def decode(self, payload: bytes, content_type: str, params: Mapping[str, Any]) -> Any:
        with self._lock:
            self.decoded.append(payload)
        self._fail("decode", payload.decode())
        return {"x": np.array(payload.decode())}

    def cost(self, row: Any) -> int:
        """Longer payloads cost more; equal ones are told apart backwards, so that order must be kept."""
        return -len(str(row["x"]))

    def infer(self, rows: Sequence[Any]) -> list[Any]:
        said = [str(row["x"]) for row in rows]
        with self._lock:
            self.runs.append(said)
        self.before_infer(said)
        if len(rows) > self.most_rows:
            raise DeviceOutOfMemory("Expected room for the batch.")
        for words in said:
            self._fail("infer", words)
        return [{"y": row["x"]} for row in rows]

    def encode(self, row: Any) -> bytes:
        words = str(row["y"])
        self._fail("encode", words)
        return msgspec.json.encode(
            {"said": words, "more": "x" * 10_000 if "large" in words else ""}
        )

    def _fail(self, stage: str, words: str) -> None:
        if words == f"bad {stage}":
            raise InferenceFailed(f"bad_{stage}", f"It is bad in {stage}.")
        if words == f"invalid {stage}":
            raise InvalidJob(f"invalid_{stage}", f"It is invalid in {stage}.")
        if words == f"busy {stage}":
            raise Transient(f"busy_{stage}", f"It is busy in {stage}.")
        if words == f"bug {stage}":
            raise ZeroDivisionError(f"a bug in {stage}")


class FakeObjects:
    """What the stages use of an object store. fault: raised by the next calls."""

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}
        self.fault: Exception | None = None

    def put(self, key: str, data: Any, *, if_absent: bool = False) -> Ref:
        if self.fault:
            raise self.fault
        self.held[key] = bytes(data)
        return Ref(key, len(data), hashlib.sha256(data).hexdigest())

    def fetch(self, ref: Ref) -> bytes:
        if self.fault:
            raise self.fault
        if ref.key not in self.held:
            raise InvalidJob("object_missing", f"Object {ref.key}: there is none.")
        return self.held[ref.key]


@pytest.fixture
def model() -> FakeModel:
    return FakeModel()


@pytest.fixture
def objects() -> FakeObjects:
    return FakeObjects()


@pytest.fixture
def make_items() -> Callable[..., list[BatchItem]]:
    """`make_items("1", "bad decode", ref)`: an item per word or reference, with a deadline far ahead."""

    def make(*said: Any, deadline_at: float = 9e9) -> list[BatchItem]:
        payloads = [
            Payload("text/plain", ref=word)
            if isinstance(word, Ref)
            else Payload("text/plain", data=word.encode())
            for word in said
        ]
        return [
            BatchItem(f"job-{i}", "default", payload, {}, 0.0, deadline_at)
            for i, payload in enumerate(payloads)
        ]

    return make


@pytest.fixture
def send(fleet: Any) -> Callable[..., str]:
    """`send(batch)`: under lease for worker `w`; gives the slot it was sent to, as the task gets it."""

    def lease(batch: Batch, seat: Any = "any", token: SlotToken | None = None) -> str:
        fleet.lease(batch, "w")
        return (token or SlotToken("w", "life", 99, seat)).packed()

    return lease
