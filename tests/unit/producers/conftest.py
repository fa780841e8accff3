"""A client over a real log and object store in the test's own folder, and a view that is a dict."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from infra.catalogue import card_key
from infra.eventlog import Record
from infra.objects.files import FileObjects
from infra.settings import load_settings
from producers.client import Client
from schemas.errors import Transient
from schemas.models import ModelCard
from schemas.results import Outcome
from schemas.topics import TOPIC_BY_NAME


class FakeNotices:
    """A client's ear: hears what ended after it was opened."""

    def __init__(self, view: FakeView) -> None:
        self._view = view
        self._heard = len(view.told)
        self.closed = False

    def wait(self, timeout_s: float) -> list[str]:
        self._view.happen("wait", timeout_s)
        told = self._view.told[self._heard :]
        self._heard = len(self._view.told)
        return told

    def close(self) -> None:
        self.closed = True


class FakeView:
    """What a client uses of the job view. calls: in order; on: what happens at the next call of a name."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Outcome] = {}
        self.told: list[str] = []
        self.away = False
        self.calls: list[str] = []
        self.ears: list[FakeNotices] = []
        self.on: dict[str, list[Callable[[], object]]] = {}
        self.pass_s: Callable[[float], None] = lambda seconds: None

    def happen(self, name: str, seconds: float = 0.0) -> None:
        self.calls.append(name)
        if self.on.get(name):
            self.on[name].pop(0)()
        if self.away:
            raise Transient("redis_unavailable", "Redis is told to be away.")
        self.pass_s(seconds)

    def end(self, outcome: Outcome, *, notice: bool = True) -> None:
        self.outcomes[outcome.job_id] = outcome
        if notice:
            self.told.append(outcome.job_id)

    def get(self, job_ids: Sequence[str]) -> list[Outcome | None]:
        self.happen("get")
        return [self.outcomes.get(job_id) for job_id in job_ids]

    def notices(self, client: str) -> FakeNotices:
        self.happen("notices")
        self.ears.append(FakeNotices(self))
        return self.ears[-1]


@pytest.fixture
def view() -> FakeView:
    return FakeView()


@pytest.fixture
def objects(tmp_path: Path) -> FileObjects:
    return FileObjects(tmp_path / "objects")


@pytest.fixture
def install(objects: FileObjects) -> Callable[[ModelCard], ModelCard]:
    """`install(card)`: the catalogue has it."""

    def put(card: ModelCard) -> ModelCard:
        objects.put(card_key(card.name, card.version), msgspec.json.encode(card))
        return card

    return put


@pytest.fixture
def client(
    tmp_path: Path,
    view: FakeView,
    install: Callable[[ModelCard], ModelCard],
    make_card: Callable[..., ModelCard],
) -> Iterator[Client]:
    """Of tenant `default`, with model `echo` that takes text of up to 100,000 bytes."""
    install(make_card(max_bytes=100_000))
    client = Client(settings=load_settings(data_dir=tmp_path))
    client.__dict__["_view"] = view
    yield client
    client.close()


@pytest.fixture
def appended(client: Client) -> Callable[[], list[Record]]:
    """Every record that the log holds."""
    return lambda: list(client.log.read(list(TOPIC_BY_NAME), 0.0))


@pytest.fixture
def succeeded() -> Callable[..., Outcome]:
    """`succeeded("a", b'{"type": "echo"}')`"""

    def make(job_id: str, answer: bytes = b'{"type": "echo"}', **facts: Any) -> Outcome:
        defaults: dict[str, Any] = {
            "status": "succeeded",
            "tenant": "default",
            "model": "echo",
            "version": 1,
            "answer": msgspec.Raw(answer),
        }
        return Outcome(job_id=job_id, **(defaults | facts))

    return make
