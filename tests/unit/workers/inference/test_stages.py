"""A batch's way through the stages: each item fails alone, and answers keep their order."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from schemas.batches import BatchItem, ItemOutcome
from schemas.errors import DEVICE_FAILED, Transient
from schemas.payloads import RESULT_INLINE_LIMIT_BYTES
from workers.inference.stages import Stages

MakeItems = Callable[..., list[BatchItem]]
Soon = Callable[[threading.Event], None]

STAGES = ["decode", "infer", "encode"]


@pytest.fixture
def stages(objects: Any) -> Iterator[Stages]:
    stages = Stages(objects, executors=2)
    yield stages
    stages.close()


@pytest.fixture
def run(stages: Stages, model: Any, make_items: MakeItems, make_batch: Any) -> Callable[..., Any]:
    """`run("1", "bad decode")`: the outcomes of a batch with these payloads."""

    def start(*said: Any, **facts: Any) -> list[ItemOutcome]:
        return stages.run(make_batch(make_items(*said, **facts), id="the-batch"), model)

    return start


def said(outcome: ItemOutcome) -> str | None:
    return json.loads(outcome.answer)["said"] if outcome.answer else None


@pytest.mark.parametrize("size", [1, 2, 3, 8, 33])
def test_answers_come_in_the_order_of_the_items(run: Any, size: int) -> None:
    words = ["x" * (i * 7 % 5) + str(i) for i in range(size)]

    assert [said(outcome) for outcome in run(*words)] == words


@pytest.mark.parametrize("at", [0, 13, 31])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("kind", "code", "passing"),
    [
        ("bad", "bad_{}", False),
        ("invalid", "invalid_{}", False),
        ("busy", "busy_{}", True),
        ("bug", "step_failed", False),
    ],
)
def test_one_bad_item_among_32_fails_alone(
    run: Any, stage: str, kind: str, code: str, passing: bool, at: int
) -> None:
    words = [str(i) for i in range(32)]
    words[at] = f"{kind} {stage}"

    outcomes = run(*words)

    failed = outcomes.pop(at)
    assert (failed.code, failed.retry) == (code.format(stage), passing)
    assert failed.message
    assert failed.answer is None
    assert [said(outcome) for outcome in outcomes] == [word for word in words if word.isdigit()]
    assert all(outcome.code is None for outcome in outcomes)


def test_a_bug_in_a_step_is_told_with_its_name(run: Any) -> None:
    (outcome,) = run("bug decode")

    assert outcome.message is not None
    assert "ZeroDivisionError: a bug in decode" in outcome.message


def test_a_bad_item_costs_its_part_of_the_batch_a_few_runs_more_not_one_per_item(
    run: Any, model: Any
) -> None:
    run(*map(str, range(31)), "bad infer")

    assert len(model.runs) <= 4 + 2 * 3


def test_a_batch_too_large_for_the_device_runs_in_halves(run: Any, model: Any) -> None:
    model.most_rows = 2

    outcomes = run(*map(str, range(16)))

    assert [said(outcome) for outcome in outcomes] == list(map(str, range(16)))


def test_an_item_too_large_for_the_device_may_pass_another_time(run: Any, model: Any) -> None:
    model.most_rows = 0

    outcomes = run("1", "2")

    assert [(o.code, o.retry) for o in outcomes] == [("device_out_of_memory", True)] * 2


def test_on_a_device_that_failed_every_item_may_pass_another_time(run: Any, model: Any) -> None:
    def fail(_: list[str]) -> None:
        raise Transient(DEVICE_FAILED, "Expected CUDA's cuStreamSynchronize to succeed.")

    model.before_infer = fail

    outcomes = run("1", "2", "3")

    assert [(o.code, o.retry) for o in outcomes] == [(DEVICE_FAILED, True)] * 3


def test_no_run_is_larger_than_the_largest_bucket(run: Any, model: Any) -> None:
    run(*map(str, range(33)))

    assert max(map(len, model.runs)) <= 8
    assert sorted(word for words in model.runs for word in words) == sorted(map(str, range(33)))


def test_every_executor_gets_a_part(run: Any, model: Any) -> None:
    run(*map(str, range(4)))

    assert [len(words) for words in model.runs] == [2, 2]


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.sampled_from(
            ["ok", "longer one", "large", *(f"{k} {s}" for k in ("bad", "bug") for s in STAGES)]
        ),
        min_size=1,
        max_size=40,
    )
)
def test_whatever_fails_each_item_has_its_own_outcome(run: Any, words: list[str]) -> None:
    outcomes = run(*words)

    assert len(outcomes) == len(words)
    for word, outcome in zip(words, outcomes, strict=True):
        if word == "large":
            assert outcome.ref is not None
        elif word.startswith(("bad", "bug")):
            assert outcome.code is not None
        else:
            assert said(outcome) == word


# ── deadlines ────────────────────────────────────────────────────────────────────────────────────


def test_an_item_whose_deadline_passed_is_not_run_and_the_others_are(
    stages: Stages, model: Any, make_items: MakeItems, make_batch: Any
) -> None:
    items = [*make_items("1"), *make_items("late", deadline_at=1.0), *make_items("3")]

    outcomes = stages.run(make_batch(items), model)

    assert [said(outcome) for outcome in outcomes] == ["1", None, "3"]
    assert (outcomes[1].code, outcomes[1].retry) == ("deadline_passed", False)
    assert sorted(model.decoded) == [b"1", b"3"]


def test_a_batch_that_came_too_late_runs_nothing(run: Any, model: Any) -> None:
    outcomes = run("1", "2", deadline_at=1.0)

    assert [outcome.code for outcome in outcomes] == ["deadline_passed"] * 2
    assert model.decoded == model.runs == []


# ── objects ──────────────────────────────────────────────────────────────────────────────────────


def test_a_payload_that_is_an_object_is_fetched(run: Any, objects: Any) -> None:
    ref = objects.put("tenants/default/payloads/x", b"from the store")

    outcomes = run("inline", ref)

    assert [said(outcome) for outcome in outcomes] == ["inline", "from the store"]


def test_a_payload_that_is_not_there_fails_for_good_and_alone(run: Any, objects: Any) -> None:
    ref = objects.put("tenants/default/payloads/x", b"gone")
    objects.held.clear()

    outcomes = run("1", ref, "3")

    assert [outcome.code for outcome in outcomes] == [None, "object_missing", None]
    assert not outcomes[1].retry


def test_a_store_that_is_away_fails_only_what_needs_it_and_may_pass_another_time(
    run: Any, objects: Any
) -> None:
    ref = objects.put("tenants/default/payloads/x", b"far")
    objects.fault = Transient("storage_unavailable", "away")

    outcomes = run("small", ref, "large")

    assert [outcome.code for outcome in outcomes] == [
        None,
        "storage_unavailable",
        "storage_unavailable",
    ]
    assert [outcome.retry for outcome in outcomes] == [False, True, True]


def test_a_large_answer_becomes_an_object_of_this_attempt(run: Any, objects: Any) -> None:
    (outcome,) = run("large")

    assert outcome.answer is None
    assert outcome.ref is not None
    assert outcome.ref.key == "tenants/default/results/job-0.the-batch"
    stored = objects.held[outcome.ref.key]
    assert json.loads(stored)["said"] == "large"
    assert outcome.ref.size_bytes == len(stored) > RESULT_INLINE_LIMIT_BYTES


@pytest.mark.parametrize(("size", "inline"), [(0, True), (1, False)])
def test_an_answer_is_inline_up_to_the_limit(
    run: Any, model: Any, size: int, inline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = b'"' + b"x" * (RESULT_INLINE_LIMIT_BYTES - 2 + size) + b'"'
    monkeypatch.setattr(model, "encode", lambda row: answer)

    (outcome,) = run("1")

    assert (outcome.answer == answer) == inline
    assert (outcome.ref is None) == inline


# ── times ────────────────────────────────────────────────────────────────────────────────────────


def test_each_item_tells_the_time_it_spent_in_each_stage(run: Any, objects: Any) -> None:
    ref = objects.put("tenants/default/payloads/x", b"1")

    for outcome in run("2", ref):
        times = outcome.times
        assert times.waited_ms > 0
        assert min(times.load_ms, times.decode_ms, times.run_ms, times.store_ms) >= 0
        assert times.run_ms > 0


# ── side by side ─────────────────────────────────────────────────────────────────────────────────


def test_a_batch_is_decoded_while_another_computes(
    stages: Stages, model: Any, make_items: MakeItems, make_batch: Any, crew: Any, soon: Soon
) -> None:
    computing, decoded = threading.Event(), threading.Event()

    def hold(words: list[str]) -> None:
        if words == ["first"]:
            computing.set()
            soon(decoded)

    def decode_and_tell(payload: bytes, *rest: Any) -> Any:
        row = decode(payload, *rest)
        if payload == b"second":
            decoded.set()
        return row

    decode = model.decode
    model.before_infer = hold
    model.decode = decode_and_tell
    outcomes: dict[str, list[ItemOutcome]] = {}

    def run(word: str) -> None:
        outcomes[word] = stages.run(make_batch(make_items(word)), model)

    crew.run(run, "first")
    soon(computing)
    crew.run(run, "second")
    crew.join()

    assert {word: said(found[0]) for word, found in outcomes.items()} == {
        "first": "first",
        "second": "second",
    }


def test_as_many_engine_runs_at_once_as_there_are_executors_and_no_more(
    stages: Stages, model: Any, make_items: MakeItems, make_batch: Any, crew: Any
) -> None:
    lock, pair = threading.Lock(), threading.Barrier(2)
    inside, most = 0, 0

    def count(words: list[str]) -> None:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        pair.wait(20)  # passes only if two are inside at once
        with lock:
            inside -= 1

    model.before_infer = count
    for number in range(3):
        items = make_items(*map(str, range(number, number + 4)))
        crew.run(stages.run, make_batch(items), model)
    crew.join()

    assert most == 2
    assert len(model.runs) == 6


def test_batches_of_slow_payloads_do_not_keep_others_from_computing(
    stages: Stages, model: Any, make_items: MakeItems, make_batch: Any, objects: Any, crew: Any,
    soon: Soon,
) -> None:  # fmt: skip
    """A store that takes its time must not take the executors with it."""
    fetching, arrived = threading.Semaphore(0), threading.Event()
    refs = [objects.put(f"tenants/default/payloads/{i}", b"far") for i in range(4)]
    fetch = objects.fetch

    def slowly(ref: Any) -> bytes:
        fetching.release()
        soon(arrived)
        data: bytes = fetch(ref)
        return data

    objects.fetch = slowly
    crew.run(stages.run, make_batch(make_items(*refs)), model)
    for _ in refs:
        assert fetching.acquire(timeout=20)
    near: list[list[ItemOutcome]] = []
    done = threading.Event()

    def compute() -> None:
        near.append(stages.run(make_batch(make_items("1", "2", "3")), model))
        done.set()

    crew.run(compute)
    in_time = done.wait(5)
    arrived.set()
    crew.join()

    assert in_time
    assert [said(outcome) for outcome in near[0]] == ["1", "2", "3"]
