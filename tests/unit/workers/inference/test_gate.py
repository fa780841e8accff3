"""Alone means alone: shown with threads that are held where the test wants them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from workers.inference.gate import Gate

Soon = Callable[[threading.Event], None]
PATIENCE_S = 20


class TellingCondition(threading.Condition):
    """Tells when a thread goes to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = threading.Semaphore(0)

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.release()
        return super().wait(timeout)


class Visitor:
    """Goes through the gate when it may, and stays inside until it is sent out."""

    def __init__(self, gate: Gate, inside: list[Visitor], *, alone: bool) -> None:
        self.alone = alone
        self.entered = threading.Event()
        self.leave = threading.Event()
        self.beside: list[int] = []
        self._gate = gate
        self._inside = inside

    def visit(self) -> None:
        with self._gate.passage(alone=self.alone):
            self._inside.append(self)
            self.beside.append(len(self._inside))
            self.entered.set()
            assert self.leave.wait(PATIENCE_S)
            self.beside.append(len(self._inside))
            self._inside.remove(self)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    gate = Gate()
    monkeypatch.setattr(gate, "_changed", TellingCondition())
    return gate


@pytest.fixture
def blocked(gate: Gate) -> Callable[[], None]:
    """Returns once a thread waits at the gate."""

    def wait() -> None:
        assert gate._changed.waits.acquire(timeout=PATIENCE_S)  # type: ignore[attr-defined]

    return wait


@pytest.fixture
def visitor(gate: Gate, crew: Any) -> Callable[..., Visitor]:
    inside: list[Visitor] = []

    def send(*, alone: bool) -> Visitor:
        visitor = Visitor(gate, inside, alone=alone)
        crew.run(visitor.visit)
        return visitor

    return send


def test_batches_run_side_by_side(visitor: Any, soon: Soon) -> None:
    visitors = [visitor(alone=False) for _ in range(3)]
    for one in visitors:
        soon(one.entered)
    for one in visitors:
        one.leave.set()


def test_one_alone_waits_until_nobody_is_inside(visitor: Any, soon: Soon, blocked: Any) -> None:
    shared = [visitor(alone=False) for _ in range(2)]
    for one in shared:
        soon(one.entered)
    alone = visitor(alone=True)
    blocked()

    shared[0].leave.set()
    blocked()
    assert not alone.entered.is_set()
    shared[1].leave.set()
    soon(alone.entered)
    alone.leave.set()

    assert alone.beside[0] == 1


def test_nobody_goes_in_beside_one_alone(visitor: Any, soon: Soon, blocked: Any, crew: Any) -> None:
    alone = visitor(alone=True)
    soon(alone.entered)
    others = [visitor(alone=kind) for kind in (False, True, False)]
    for _ in others:
        blocked()
    assert not any(other.entered.is_set() for other in others)

    for one in (alone, *others):
        one.leave.set()
    crew.join()

    assert alone.beside == [1, 1]
    assert others[1].beside == [1, 1]


def test_one_alone_goes_before_those_who_came_later(visitor: Any, soon: Soon, blocked: Any) -> None:
    first = visitor(alone=False)
    soon(first.entered)
    alone = visitor(alone=True)
    blocked()
    late = visitor(alone=False)
    blocked()
    assert not late.entered.is_set()

    first.leave.set()
    soon(alone.entered)
    assert not late.entered.is_set()
    alone.leave.set()
    soon(late.entered)
    late.leave.set()


def test_after_an_error_inside_the_gate_is_open(gate: Gate, visitor: Any, soon: Soon) -> None:
    for alone in (False, True):
        with pytest.raises(ZeroDivisionError), gate.passage(alone=alone):
            raise ZeroDivisionError

    last = visitor(alone=True)
    soon(last.entered)
    last.leave.set()
