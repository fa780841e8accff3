"""The product's main job: submit through the public client, get the right answer back, once."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import redis

from examples.models import samples, whisper
from headrace import AsyncClient, Client
from infra.job_view import JobView
from infra.objects import connect_objects
from infra.redis_client import connect_redis
from producers.explain import explain_job
from producers.job_search import recent_jobs
from schemas.errors import InvalidJob, JobFailed
from schemas.results import Outcome, decode_outcome

if TYPE_CHECKING:
    from tests.conftest import Stack

pytestmark = pytest.mark.timeout(600)  # the first test brings the stack up and may download models


def order(**words: Any) -> bytes:
    return json.dumps(words).encode()


def plain(text: str) -> list[str]:
    """Words alone: a transcript is right whatever its commas."""
    return re.findall(r"[a-z]+", text.lower())


# ── answers ──────────────────────────────────────────────────────────────────────────────────────


def test_photographs_are_seen_for_what_they_show(client: Client) -> None:
    paths = samples.photographs()
    jobs = client.submit_many("efficientnet-lite0", paths)
    shown = {job.id: path.name for job, path in zip(jobs, paths, strict=True)}
    seen = {shown[r.job_id]: r.label for r in client.results(jobs) if not isinstance(r, JobFailed)}
    assert seen == samples.PHOTOGRAPHS


def test_sentences_are_sorted_by_topic(client: Client) -> None:
    jobs = client.submit_many("minilm-topics", samples.sentences())
    assert [job.result().label for job in jobs] == list(samples.SENTENCES.values())


def test_sentences_of_like_meaning_lie_close(client: Client) -> None:
    texts = ["A cat sits on the sofa.", "A kitten lies on the couch.", "Shares fell on Monday."]
    vectors = [
        np.array(job.result().answer["vector"]) for job in client.submit_many("minilm-embed", texts)
    ]
    assert vectors[0].shape == (384,)
    assert vectors[0] @ vectors[1] > 0.5 > 0.3 > vectors[0] @ vectors[2]


def test_speech_is_written_down(client: Client) -> None:
    clips = whisper.speech()
    jobs = client.submit_many("whisper-tiny-en", [path for path, _ in clips])
    assert [plain(job.result().text) for job in jobs] == [plain(said) for _, said in clips]


def test_a_result_says_where_its_time_went(client: Client) -> None:
    result = client.submit("minilm-topics", samples.sentences()[0]).result()
    assert result.version == 2
    assert result.attempts == 1
    assert result.times.run_ms > 0
    assert result.times.waited_ms > 0


# ── payloads ─────────────────────────────────────────────────────────────────────────────────────


def outputs(result: Any) -> list[float]:
    return list(result.answer["outputs"]["y"])


def test_a_payload_may_be_bytes_a_path_an_array_or_text(client: Client, tmp_path: Path) -> None:
    array = np.array([1, 2, 3], np.float32)
    path = tmp_path / "array.npy"
    np.save(path, array)
    for payload in (array, path, path.read_bytes(), bytearray(path.read_bytes())):
        assert outputs(client.submit("noop", payload).result()) == [1, 2, 3]
    text = samples.sentences()[0]
    assert client.submit("minilm-topics", text).result().label == "sports"
    assert client.submit("minilm-topics", text.encode()).result().label == "sports"


def test_a_payload_may_be_a_reference_to_an_object(
    stack: Stack, client: Client, tmp_path: Path
) -> None:
    np.save(tmp_path / "a.npy", np.array([4, 5], np.float32))
    objects = connect_objects(stack.settings)
    ref = objects.put("tenants/default/mine/a.npy", tmp_path / "a.npy")
    assert outputs(client.submit("noop", ref).result()) == [4, 5]


def test_what_is_large_goes_as_an_object_both_ways(stack: Stack, client: Client) -> None:
    array = np.arange(20_000, dtype=np.float32)
    job = client.submit("noop", array)
    outcome = job.wait()
    (record,) = [r for r in stack.records("jobs.tensor.standard") if r.key == job.id]
    assert record.value == b""
    assert record.headers["ce_dataref"].startswith("tenants/default/payloads/")
    assert outcome.ref is not None
    assert outcome.ref.key.startswith("tenants/default/results/")
    assert outputs(client.result_of(outcome)) == array.tolist()


def test_what_is_small_stays_in_the_record(stack: Stack, client: Client) -> None:
    job = client.submit("noop", np.zeros(4, np.float32))
    assert job.wait().ref is None
    (record,) = [r for r in stack.records("jobs.tensor.standard") if r.key == job.id]
    assert len(record.value) > 0


def test_tenants_objects_lie_apart(stack: Stack) -> None:
    with Client(data_dir=stack.data, tenant="acme") as acme:
        outcome = acme.submit("noop", np.zeros(20_000, np.float32)).wait()
        assert outcome.tenant == "acme"
        assert outcome.ref is not None
        assert outcome.ref.key.startswith("tenants/acme/")


# ── many, as they arrive, and from asyncio ───────────────────────────────────────────────────────


def test_results_arrive_before_the_last_job_has_ended(stack: Stack, client: Client) -> None:
    gate = stack.data / "gate-arrival"
    slow = client.submit("single", order(wait_for=str(gate)))
    quick = client.submit_many("noop", [np.zeros(1, np.float32)] * 40)
    arriving = client.results([slow, *quick])
    first = {next(arriving).job_id for _ in quick}  # type: ignore[union-attr]
    assert first == {job.id for job in quick}
    gate.touch()
    (last,) = arriving
    assert not isinstance(last, JobFailed)
    assert last.job_id == slow.id


def test_a_failed_job_arrives_among_the_results(client: Client) -> None:
    jobs = client.submit_many("obey", [order(number=1), order(fail="no"), order(number=3)])
    arrived = list(client.results(jobs))
    assert sorted(type(result).__name__ for result in arrived) == ["JobFailed", "Result", "Result"]
    with pytest.raises(JobFailed, match="RuntimeError: no") as failed:
        jobs[1].result()
    assert failed.value.code == "step_failed"


def test_submit_each_accepts_lazily(client: Client) -> None:
    handles = client.submit_each("noop", (np.zeros(1, np.float32) for _ in range(600)))
    first = next(handles)
    assert outputs(first.result()) == [0]
    assert len(list(handles)) == 599


def test_waiting_has_an_end_and_the_job_goes_on(stack: Stack, client: Client) -> None:
    gate = stack.data / "gate-timeout"
    job = client.submit("obey", order(wait_for=str(gate), number=7))
    with pytest.raises(TimeoutError, match="1 jobs had not ended"):
        job.result(timeout_s=0.1)
    gate.touch()
    assert outputs(job.result()) == [7]


async def test_the_same_words_awaited(stack: Stack) -> None:
    async with AsyncClient(data_dir=stack.data) as client:
        job = await client.submit("minilm-topics", samples.sentences()[1], tier="premium")
        assert (await job.result()).label == "technology"
        assert (await job.status()).status == "succeeded"
        jobs = await client.submit_many("noop", [np.full(1, i, np.float32) for i in range(20)])
        came = [outputs(result) async for result in client.results(jobs)]
        assert sorted(came) == [[i] for i in range(20)]
        assert "noop" in {card.name for card in await client.models()}
        bad = await client.submit("obey", order(fail="no"))
        with pytest.raises(JobFailed):
            await bad.result()


# ── cancel, deadlines, priorities, tiers ─────────────────────────────────────────────────────────


def test_a_waiting_job_is_cancelled_at_once(stack: Stack, client: Client) -> None:
    with stack.held(client):
        job = client.submit("noop", np.zeros(1, np.float32))
        job.cancel()
        assert job.wait().status == "cancelled"
    assert len(stack.results(job.id)) == 1
    with pytest.raises(JobFailed) as failed:
        job.result()
    assert failed.value.code == "cancelled"


def test_a_job_beyond_the_window_is_cancelled_when_it_is_reached(
    stack: Stack, client: Client
) -> None:
    window = 256
    with stack.held(client):
        jobs = client.submit_many("noop", [np.zeros(1, np.float32)] * (window + 20))
        jobs[-1].cancel()
        stack.until(lambda: "control" not in stack.lag())
        assert jobs[-1].status().status == "queued"
    ends = {outcome.job_id: outcome.status for outcome in client.outcomes(jobs)}
    assert ends.pop(jobs[-1].id) == "cancelled"
    assert set(ends.values()) == {"succeeded"}


def test_a_running_job_that_is_cancelled_gives_no_result(stack: Stack, client: Client) -> None:
    gate, mark = stack.data / "gate-cancel", stack.data / "mark-cancel"
    job = client.submit("obey", order(wait_for=str(gate), mark=str(mark)))
    stack.until(lambda: stack.lines(mark))
    job.cancel()
    stack.until(lambda: "control" not in stack.lag())
    gate.touch()
    assert job.wait().status == "cancelled"


def test_cancelling_what_has_ended_changes_nothing(stack: Stack, client: Client) -> None:
    job = client.submit("noop", np.zeros(1, np.float32))
    job.result()
    job.cancel()
    stack.until(lambda: "control" not in stack.lag())
    assert job.status().status == "succeeded"
    assert len(stack.results(job.id)) == 1


def test_a_job_that_waits_past_its_deadline_expires(stack: Stack, client: Client) -> None:
    mark = stack.data / "mark-deadline"
    with stack.held(client):
        job = client.submit("obey", order(mark=str(mark)), deadline_s=0.3)
        assert job.wait().status == "expired"
    assert stack.lines(mark) == 0
    with pytest.raises(JobFailed) as failed:
        job.result()
    assert failed.value.code == "expired"


def ran(mark: Path) -> list[str]:
    return mark.read_text().splitlines()


def test_the_urgent_goes_first_within_a_tier(stack: Stack, client: Client) -> None:
    mark = stack.data / "mark-priority"
    with stack.held(client):
        low = [order(mark=str(mark), name="low")] * 20
        high = [order(mark=str(mark), name="high")] * 5
        jobs = client.submit_many("single", low, priority=1)
        jobs += client.submit_many("single", high, priority=9)
        stack.until(lambda: waiting(client) >= 25)
    assert {outcome.status for outcome in client.outcomes(jobs)} == {"succeeded"}
    # Three run side by side, so the last of the urgent may write after two of the others.
    assert ran(mark)[:7].count("high") == 5


def test_the_higher_tier_goes_first_and_the_lower_one_goes_on(stack: Stack, client: Client) -> None:
    mark = stack.data / "mark-tier"
    with stack.held(client):
        bulk = [order(mark=str(mark), name="bulk")] * 40
        premium = [order(mark=str(mark), name="premium")] * 16
        jobs = client.submit_many("single", bulk, tier="bulk")
        jobs += client.submit_many("single", premium, tier="premium")
        stack.until(lambda: waiting(client) >= 56)
    assert {outcome.status for outcome in client.outcomes(jobs)} == {"succeeded"}
    names = ran(mark)
    # Eight to one by weight, with three at once: all of premium comes early, and some of bulk too.
    assert "bulk" in names[:20]
    assert names[:24].count("premium") == 16


def waiting(client: Client) -> int:
    dispatcher = next(iter(client.fleet.dispatchers()), None)
    return sum(lane.waiting for lane in dispatcher.waiting.values()) if dispatcher else 0


def test_each_tier_has_its_topic(stack: Stack, client: Client) -> None:
    for tier in ("premium", "standard", "basic", "bulk"):
        job = client.submit("noop", np.zeros(1, np.float32), tier=tier)
        job.result()
        assert job.id in {record.key for record in stack.records(f"jobs.tensor.{tier}")}


# ── idempotency ──────────────────────────────────────────────────────────────────────────────────


def test_one_key_and_the_same_work_is_one_job(stack: Stack, client: Client) -> None:
    array = np.ones(3, np.float32)
    jobs = [client.submit("noop", array, key="order-1") for _ in range(5)]
    assert len({job.id for job in jobs}) == 1
    assert [outputs(job.result()) for job in jobs] == [[1, 1, 1]] * 5
    stack.until(lambda: not stack.lag())
    again = client.submit("noop", array, key="order-1")
    stack.until(lambda: not stack.lag())
    assert outputs(again.result()) == [1, 1, 1]
    assert len(stack.results(again.id)) == 1


def test_one_key_and_other_work_is_a_conflict_for_the_second(stack: Stack, client: Client) -> None:
    first = client.submit("noop", np.ones(1, np.float32), key="order-2")
    second = client.submit("noop", np.zeros(1, np.float32), key="order-2")
    with pytest.raises(InvalidJob, match="already stands for another payload") as conflict:
        second.result()
    assert conflict.value.code == "idempotency_conflict"
    assert outputs(first.result()) == [1]
    stack.until(lambda: not stack.lag())
    assert len(stack.results(first.id)) == 1
    (letter,) = stack.dead_letters(first.id)
    assert letter.headers["x-error"] == "idempotency_conflict"


def test_a_key_means_another_job_for_another_tenant(stack: Stack, client: Client) -> None:
    with Client(data_dir=stack.data, tenant="acme") as acme:
        ours = client.submit("noop", np.ones(1, np.float32), key="order-3")
        theirs = acme.submit("noop", np.zeros(1, np.float32), key="order-3")
        assert ours.id != theirs.id
        assert (outputs(ours.result()), outputs(theirs.result())) == ([1], [0])


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_key_outlives_the_dispatcher(
    stack: Stack, client: Client, signum: signal.Signals
) -> None:
    key, array = f"order-{signum}", np.ones(1, np.float32)
    client.submit("noop", array, key=key).result()
    before = stack.restarts("dispatcher")
    stack.kill("dispatcher", signum)
    stack.until_restarted("dispatcher", before)
    again = client.submit("noop", array, key=key)
    other = client.submit("noop", np.zeros(1, np.float32), key=key)
    stack.until(lambda: not stack.lag())
    assert outputs(again.result()) == [1]
    assert len(stack.results(again.id)) == 1
    with pytest.raises(InvalidJob, match="another payload"):
        other.result()
    stack.until(lambda: stack.healthy)


# ── versions ─────────────────────────────────────────────────────────────────────────────────────


def test_a_version_is_pinned_when_the_job_is_admitted(
    stack: Stack, client: Client, make_tensor_bundle: Callable[..., Path]
) -> None:
    array = np.zeros(1, np.float32)
    bundles = [make_tensor_bundle("steps", version=v, plus=v) for v in (1, 2, 3)]
    stack.headrace("models", "add", *bundles[:2])
    newest = client.submit("steps", array)
    first = client.submit("steps", array, version=1)
    assert (outputs(newest.result()), outputs(first.result())) == ([2], [1])
    with stack.held(client):
        waits = client.submit("steps", array)
        stack.until(lambda: not unadmitted(stack, client))
        stack.headrace("models", "add", bundles[2])
    result = waits.result()
    assert (result.version, outputs(result)) == (2, [2])
    # The new version may go unseen for a moment.
    stack.until(lambda: outputs(client.submit("steps", array).result()) == [3])


def unadmitted(stack: Stack, client: Client) -> bool:
    """Whether the dispatcher's last word counts fewer jobs than the log has open."""
    beat = next(iter(client.fleet.dispatchers()), None)
    held = waiting(client) + beat.running_jobs if beat else 0
    return held < sum(lag.open for lag in stack.lag().values())


# ── looking on ───────────────────────────────────────────────────────────────────────────────────


def test_a_job_is_queued_then_running_then_ended(stack: Stack, client: Client) -> None:
    gate, mark = stack.data / "gate-status", stack.data / "mark-status"
    with stack.held(client):
        job = client.submit("obey", order(wait_for=str(gate), mark=str(mark)))
        assert job.status().status == "queued"
        assert any("wait" in reason for reason in explain_job(client, job.id))
    stack.until(lambda: stack.lines(mark))
    stack.until(lambda: job.status().status == "running")  # shown of jobs that take a while
    gate.touch()
    job.result()
    assert job.status().status == "succeeded"
    assert explain_job(client, job.id)[0].startswith("It does not wait: it ended as succeeded")


def test_jobs_are_listed_newest_first_as_they_ended(client: Client) -> None:
    good = client.submit("noop", np.zeros(1, np.float32))
    good.result()
    bad = client.submit("obey", order(fail="no"))
    bad.wait()
    listed = recent_jobs(client.log, 0.0, 2, lambda outcome: True)
    assert [outcome.job_id for outcome in listed] == [bad.id, good.id]
    assert [outcome.status for outcome in listed] == ["failed", "succeeded"]


def test_an_unknown_job_is_said_to_be_unknown(client: Client) -> None:
    with pytest.raises(InvalidJob) as unknown:
        client.status("01a00000-0000-7000-8000-000000000000")
    assert unknown.value.code == "job_unknown"


# ── Redis forgets ────────────────────────────────────────────────────────────────────────────────


def flush(stack: Stack) -> None:
    server = redis.Redis(unix_socket_path=str(stack.settings.redis_socket))
    server.flushall()
    server.close()


def shown(stack: Stack, job_id: str) -> Outcome | None:
    connection = connect_redis(stack.settings)
    try:
        return JobView(connection).get([job_id])[0]
    finally:
        connection.close()


def test_a_redis_that_forgets_all_loses_no_job_and_shows_none_twice(
    stack: Stack, client: Client
) -> None:
    earlier = client.submit("noop", np.zeros(1, np.float32))
    earlier.result()
    jobs = client.submit_many("obey", [order(sleep_s=0.004, number=i) for i in range(1000)])
    arriving = client.outcomes(jobs)
    ended = [next(arriving) for _ in range(200)]
    flush(stack)
    ended += [next(arriving) for _ in range(300)]
    flush(stack)
    ended += arriving
    assert len(ended) == len({outcome.job_id for outcome in ended}) == 1000
    # Nobody pays for it: no job had its worker die.
    assert {(outcome.status, outcome.attempts) for outcome in ended} == {("succeeded", 1)}
    stack.until(lambda: not stack.lag())
    written = [decode_outcome(record.value) for record in stack.records("results")]
    ours = [outcome.job_id for outcome in written if outcome.job_id in {job.id for job in jobs}]
    assert len(ours) == len(set(ours)) == 1000
    # The view is whole again: what ended before Redis forgot shows in it without the log.
    view = stack.until(lambda: shown(stack, earlier.id))
    assert view.status == "succeeded"
    assert stack.until(lambda: shown(stack, ended[0].job_id)).status == "succeeded"


def test_a_client_that_waits_hears_of_a_job_that_ended_while_redis_forgot(
    stack: Stack, client: Client
) -> None:
    gate, mark = stack.data / "gate-flush", stack.data / "mark-flush"
    job = client.submit("obey", order(wait_for=str(gate), mark=str(mark), number=5))
    stack.until(lambda: stack.lines(mark))
    flush(stack)
    gate.touch()
    assert outputs(job.result()) == [5]
    assert len(stack.results(job.id)) == 1


def test_the_stack_is_well_in_the_end(stack: Stack, client: Client) -> None:
    assert stack.until(lambda: stack.healthy)
    assert stack.lag() == {}
    assert shutil.disk_usage(stack.data).free > 0
