"""The client's own part: what it appends, what it refuses, what it makes of outcomes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from infra.objects.files import FileObjects
from infra.settings import load_settings
from producers.client import APPEND_MOST, Client, JobHandle
from schemas.errors import InvalidJob, JobFailed
from schemas.jobs import read_job
from schemas.models import ModelCard
from schemas.payloads import Ref
from schemas.results import Outcome, StageTimes
from schemas.topics import CONTROL

Appended = Callable[[], list[Any]]
Succeeded = Callable[..., Outcome]


def job_of(record: Any) -> Any:
    return read_job(record.position.topic, record.headers, record.value, record.time)


# ── submit ───────────────────────────────────────────────────────────────────────────────────────


def test_a_job_is_in_the_log_when_submit_returns(client: Client, appended: Appended) -> None:
    handle = client.submit("echo", "hello", params={"k": 5}, priority=3, deadline_s=60)

    (record,) = appended()
    job = job_of(record)
    assert record.position.topic == "jobs.text.standard"
    assert record.key == job.id == handle.id
    assert (job.tenant, job.model, job.version, job.priority) == ("default", "echo", None, 3)
    assert (job.payload.data, job.params, job.reply_to) == (b"hello", {"k": 5}, client.id)
    assert job.deadline_at - job.submitted_at == pytest.approx(60, abs=0.001)
    assert len(job.trace_id) == 32


@pytest.mark.parametrize(
    ("tier", "topic"),
    [(None, "jobs.text.standard"), ("bulk", "jobs.text.bulk"), ("premium", "jobs.text.premium")],
)
def test_the_tier_is_the_models_unless_the_caller_says(
    client: Client, appended: Appended, tier: str | None, topic: str
) -> None:
    client.submit("echo", "x", tier=tier)

    assert [record.position.topic for record in appended()] == [topic]


def test_a_version_that_is_asked_for_is_pinned(client: Client, appended: Appended) -> None:
    client.submit("echo", "x", version=1)

    assert job_of(appended()[0]).version == 1


def test_the_same_key_makes_the_same_job(client: Client) -> None:
    first, second = (client.submit("echo", "x", key="order-7") for _ in range(2))

    assert first.id == second.id
    assert first.fingerprint == second.fingerprint is not None


def test_without_a_key_each_submission_is_a_job(client: Client) -> None:
    assert client.submit("echo", "x").id != client.submit("echo", "x").id


def test_many_are_appended_in_groups_and_in_order(
    client: Client, appended: Appended, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[int] = []
    append = client.log.append

    def counted(records: Any) -> None:
        groups.append(len(records))
        append(records)

    monkeypatch.setattr(client.log, "append", counted)

    handles = client.submit_many("echo", (str(i) for i in range(APPEND_MOST + 3)))

    assert groups == [APPEND_MOST, 3]
    assert [handle.id for handle in handles] == [record.key for record in appended()]
    assert [record.value for record in appended()] == [
        str(i).encode() for i in range(APPEND_MOST + 3)
    ]


def test_none_are_appended_for_none(client: Client, appended: Appended) -> None:
    assert client.submit_many("echo", []) == []
    assert appended() == []


def test_a_bad_payload_stops_a_group_but_not_what_was_accepted_before(
    client: Client, appended: Appended
) -> None:
    with pytest.raises(InvalidJob):
        client.submit_many("echo", [*(["x"] * APPEND_MOST), "y", b""])

    assert len(appended()) == APPEND_MOST


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"tier": "gold"}, "tier_unknown"),
        ({"tier": ""}, "tier_unknown"),
        ({"priority": 10}, "priority_invalid"),
        ({"priority": -1}, "priority_invalid"),
        ({"priority": "high"}, "priority_invalid"),
        ({"priority": 1.0}, "priority_invalid"),
        ({"priority": True}, "priority_invalid"),
        ({"deadline_s": 0}, "deadline_past"),
        ({"deadline_s": -1}, "deadline_past"),
        ({"deadline_s": float("nan")}, "deadline_past"),
        ({"deadline_s": float("inf")}, "deadline_too_far"),
        ({"deadline_s": 1e9}, "deadline_too_far"),
        ({"key": ""}, "key_invalid"),
        ({"key": "k" * 257}, "key_invalid"),
        ({"key": "\ud800"}, "key_invalid"),
        ({"params": {"a": "x" * 20_000}}, "params_too_large"),
        ({"params": {"a": object()}}, "params_invalid"),
        ({"params": {"a": "\ud800"}}, "params_invalid"),
        ({"params": {"a": 2**70}}, "params_invalid"),
        ({"version": 2}, "version_unknown"),
        ({"version": 0}, "version_unknown"),
    ],
)
def test_a_wrong_option_is_refused_and_nothing_is_appended(
    client: Client, appended: Appended, options: dict[str, Any], code: str
) -> None:
    with pytest.raises(InvalidJob, match=r"[Ee]xpected|no version|at most") as caught:
        client.submit("echo", "x", **options)

    assert caught.value.code == code
    assert appended() == []


@pytest.mark.parametrize(
    "options", [{"params": {1: "a", "b": 2}}, {"params": {"a": float("nan")}}, {"params": {}}]
)
@pytest.mark.parametrize("key", [None, "k"])
def test_whatever_params_are_accepted_can_be_read_by_the_dispatcher(
    client: Client, appended: Appended, options: dict[str, Any], key: str | None
) -> None:
    handle = client.submit("echo", "x", key=key, **options)

    job = job_of(appended()[0])
    assert job.id == handle.id
    assert handle.fingerprint == (None if key is None else job.fingerprint)


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (b"", "payload_empty"),
        ("", "payload_empty"),
        (b"x" * 100_001, "payload_too_large"),
        (Ref("tenants/other/x", 5, "0" * 64), "payload_foreign"),
        (Ref("tenants/default/x", 200_000, "0" * 64), "payload_too_large"),
        (5, "payload_type"),
    ],
)
def test_a_wrong_payload_is_refused_and_nothing_is_appended_or_stored(
    client: Client, appended: Appended, objects: FileObjects, payload: Any, code: str
) -> None:
    with pytest.raises(InvalidJob) as caught:
        client.submit("echo", payload)

    assert caught.value.code == code
    assert appended() == []
    assert list(objects.list("tenants")) == []


def test_a_wrong_option_is_found_before_a_large_payload_is_stored(
    client: Client, objects: FileObjects
) -> None:
    with pytest.raises(InvalidJob):
        client.submit("echo", b"x" * 50_000, deadline_s=1e9)

    assert list(objects.list("tenants")) == []


def test_an_unknown_model_is_refused_saying_what_there_is(client: Client) -> None:
    with pytest.raises(InvalidJob, match="echo") as caught:
        client.submit("ech", "x")

    assert caught.value.code == "model_unknown"


def test_a_small_limit_of_the_model_counts_for_inline_payloads_too(
    client: Client, install: Any, make_card: Callable[..., ModelCard]
) -> None:
    install(make_card(name="small", max_bytes=10))

    with pytest.raises(InvalidJob, match="at most 10 bytes"):
        client.submit("small", b"x" * 11)


@pytest.mark.parametrize("tenant", ["", "Acme", "a/b", "..", "a" * 64, "acme\n"])
def test_a_wrong_tenant_is_refused(tmp_path: Path, tenant: str) -> None:
    with pytest.raises(InvalidJob) as caught:
        Client(settings=load_settings(data_dir=tmp_path), tenant=tenant)

    assert caught.value.code == "tenant_invalid"


def test_making_and_closing_a_client_opens_nothing(tmp_path: Path) -> None:
    with Client(data_dir=tmp_path / "not-there"):
        pass

    assert not (tmp_path / "not-there").exists()


# ── results ──────────────────────────────────────────────────────────────────────────────────────


def test_a_result_is_what_the_model_answered(
    client: Client, view: Any, succeeded: Succeeded
) -> None:
    handle = client.submit("echo", "x")
    times = StageTimes(1, 2, 3, 4, 5)
    answer = b'{"type": "classification", "label": "cup", "probability": 0.75, "text": "t"}'
    view.end(succeeded(handle.id, answer, attempts=2, times=times))

    result = handle.result()

    assert (result.job_id, result.model, result.version) == (handle.id, "echo", 1)
    assert (result.attempts, result.times) == (2, times)
    assert (result.label, result.probability, result.text) == ("cup", 0.75, "t")


def test_a_large_result_is_fetched_from_the_store(
    client: Client, view: Any, succeeded: Succeeded, objects: FileObjects
) -> None:
    ref = objects.put("tenants/default/results/x", b'{"type": "tensor", "outputs": [1]}')
    view.end(succeeded("a", b"null", ref=ref))

    (result,) = client.results([JobHandle("a", client)])

    assert result.answer == {"type": "tensor", "outputs": [1]}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("status", "code", "seen"),
    [("failed", "image_truncated", "image_truncated"), ("expired", None, "expired"),
     ("cancelled", None, "cancelled")],
)  # fmt: skip
def test_a_job_that_ended_without_a_result_raises_and_says_why(
    client: Client, view: Any, succeeded: Succeeded, status: Any, code: str | None, seen: str
) -> None:
    view.end(succeeded("a", b"null", status=status, code=code, message="It was bad."))
    handle = JobHandle("a", client)

    with pytest.raises(JobFailed, match=f"a ended as {status}: It was bad") as caught:
        handle.result()
    assert caught.value.code == seen
    (given,) = client.results([handle])
    assert isinstance(given, JobFailed)
    assert handle.wait().status == status


def test_results_come_as_they_arrive_each_once(
    client: Client, view: Any, succeeded: Succeeded
) -> None:
    ids = ["a", "b", "c"]
    view.end(succeeded("b"))
    view.on["wait"] = [lambda: view.end(succeeded("c")), lambda: view.end(succeeded("a"))]

    arrived = [outcome.job_id for outcome in client.outcomes(ids)]

    assert arrived == ["b", "c", "a"]


def test_the_outcome_of_other_work_under_the_same_key_is_not_taken_for_ones_own(
    client: Client, view: Any, succeeded: Succeeded
) -> None:
    handle = client.submit("echo", "mine", key="k")
    view.end(succeeded(handle.id, fingerprint="of other work"))

    with pytest.raises(InvalidJob, match="already stands for another payload") as caught:
        handle.result()

    assert caught.value.code == "idempotency_conflict"


def test_one_conflict_among_many_does_not_keep_the_other_results(
    client: Client, view: Any, succeeded: Succeeded
) -> None:
    handles = [client.submit("echo", str(i), key=f"k{i}") for i in range(3)]
    for handle in handles:
        taken = handle is handles[1]
        view.end(succeeded(handle.id, fingerprint="other" if taken else handle.fingerprint))

    given = list(client.results(handles))

    assert [type(result).__name__ for result in given].count("Result") == 2


def test_the_outcome_of_the_same_work_under_the_same_key_is_given(
    client: Client, view: Any, succeeded: Succeeded
) -> None:
    handle = client.submit("echo", "mine", key="k")
    view.end(succeeded(handle.id, fingerprint=handle.fingerprint))

    assert handle.result().job_id == handle.id


def test_threads_that_come_and_go_leave_no_connection_behind(
    client: Client, view: Any, succeeded: Succeeded
) -> None:
    """A server with a thread per request would run out of them."""
    for i in range(20):
        view.on["wait"] = [lambda i=i: view.end(succeeded(f"job-{i}"))]
        thread = threading.Thread(target=lambda i=i: list(client.outcomes([f"job-{i}"])))
        thread.start()
        thread.join(20)

    assert sum(not ear.closed for ear in view.ears) <= 1


def test_two_waits_of_one_thread_do_not_take_each_others_notices(
    client: Client, view: Any, succeeded: Succeeded
) -> None:
    one, other = client.outcomes(["a", "c"]), client.outcomes(["b"])
    view.on["wait"] = [lambda: view.end(succeeded("a"))]
    assert next(one).job_id == "a"
    view.on["wait"] = [lambda: view.end(succeeded("c")) or view.end(succeeded("b"))]
    assert next(other).job_id == "b"
    view.calls.clear()

    assert next(one).job_id == "c"

    assert view.calls.count("wait") <= 1


# ── status and cancel ────────────────────────────────────────────────────────────────────────────


def test_the_status_is_what_the_view_says(client: Client, view: Any, succeeded: Succeeded) -> None:
    view.end(succeeded("a", status="running"))

    assert client.status("a").status == "running"


def test_the_status_of_a_job_the_view_does_not_know_is_looked_up_in_the_log(
    client: Client,
) -> None:
    handle = client.submit("echo", "x")

    assert handle.status().status == "queued"


def test_the_status_is_told_while_redis_is_away(client: Client, view: Any) -> None:
    """The log remembers; Redis only shows."""
    handle = client.submit("echo", "x")
    view.away = True

    assert handle.status().status == "queued"


def test_a_job_nobody_knows_is_said_to_be_unknown(client: Client) -> None:
    with pytest.raises(InvalidJob, match="No job nobody") as caught:
        client.status("nobody")

    assert caught.value.code == "job_unknown"


@pytest.mark.parametrize("job_id", ["", "a b", "x" * 129, "a\n", "../x"])
def test_what_is_no_id_is_refused(client: Client, job_id: str) -> None:
    for ask in (client.status, client.cancel, lambda id_: next(client.outcomes([id_]))):
        with pytest.raises(InvalidJob) as caught:
            ask(job_id)
        assert caught.value.code == "job_id_invalid"


def test_cancelling_is_a_record_for_the_dispatcher(client: Client, appended: Appended) -> None:
    client.cancel("a")

    (record,) = appended()
    assert (record.position.topic, record.key) == (CONTROL, "a")
    assert record.headers["ce_type"] == "io.headrace.cancel.v1"


def test_the_models_are_those_installed(
    client: Client, install: Any, make_card: Callable[..., ModelCard]
) -> None:
    install(make_card(name="other", version=2))

    cards = {(card.name, card.version) for card in client.models()}

    assert cards == {("echo", 1), ("other", 2)}


def test_an_answer_keeps_its_numbers(client: Client, view: Any, succeeded: Succeeded) -> None:
    vector = [0.1, -1e-7, 1.0]
    view.end(succeeded("a", msgspec.json.encode({"type": "embedding", "vector": vector})))

    assert client.result_of(client.status("a")).answer["vector"] == vector
