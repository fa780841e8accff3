"""Dead letters found in a real log, and redriven into it."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from infra.eventlog import NewRecord, Record
from producers.deadletters import APPEND_MOST, DeadLetters, LetterFilter
from producers.letters import read_payload
from schemas.errors import InvalidJob, Transient
from schemas.jobs import (
    DEAD_LETTER_HEADERS,
    HISTORY_HEADERS,
    REPLAY,
    SIGNATURE,
    Job,
    job_headers,
    job_value,
    new_job_id,
    read_job,
    rfc3339,
)
from schemas.payloads import Payload, Ref
from schemas.proof import check_proof, signed
from schemas.topics import JOB_TOPICS, RETRY, dead_letter_topic

MAX_DEADLINE_S = 3 * 24 * 3600.0
KEYS = {"default": [b"a key of sixteen bytes"]}
EVERYTHING = LetterFilter()

Bury = Callable[..., str]


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def log(client: Any) -> Any:
    return client.log


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def letters(log: Any, clock: FakeClock) -> DeadLetters:
    return DeadLetters(log, KEYS, MAX_DEADLINE_S, clock=clock, sleep=clock.sleep)


@pytest.fixture
def bury(log: Any, make_job: Callable[..., Job]) -> Bury:
    """`bury(code="bad_output", model="echo")`: a dead letter as the dispatcher writes it; gives its job's id.

    given: headers on top of the job's. on: the topic that the job failed on, its own by default.
    """

    def write(
        code: str = "bad_output",
        *,
        given: dict[str, str] | None = None,
        on: str | None = None,
        job: Job | None = None,
        **facts: Any,
    ) -> str:
        if job is None:
            facts.setdefault("id", new_job_id("default"))
            facts.setdefault("submitted_at", time.time())
            job = make_job(**facts)
        reason = {
            "x-original-topic": on or job.topic,
            "x-original-partition": "0",
            "x-original-offset": "7",
            "x-attempt": "3",
            "x-error": code,
            "x-error-message": "why not",
        }
        headers = job_headers(job) | (given or {}) | reason
        topic = dead_letter_topic(RETRY if on == RETRY and given else job.topic)
        log.append([NewRecord(topic, job.id, headers, job_value(job))])
        return job.id

    return write


def redriven(log: Any) -> list[Record]:
    return list(log.read([*JOB_TOPICS, RETRY], 0.0))


def redrive(letters: DeadLetters, wanted: LetterFilter = EVERYTHING, **options: Any) -> int:
    return letters.redrive(letters.select(wanted), **options)


# ── looking ──────────────────────────────────────────────────────────────────────────────────────


def test_a_letter_says_what_failed_and_why(letters: DeadLetters, bury: Bury) -> None:
    before = time.time()
    job_id = bury("bad_output", version=4, tenant="acme", modality="image", lane="bulk")

    (letter,) = letters.newest(EVERYTHING, 10)

    assert letter.job == job_id
    assert letter.topic == "jobs.image.bulk"
    assert (letter.tenant, letter.model, letter.version) == ("acme", "echo", 4)
    assert (letter.code, letter.message, letter.attempts) == ("bad_output", "why not", 3)
    assert (letter.size_bytes, letter.object) == (len(b"hello"), None)
    assert letter.obstacle is None
    assert before - 1 <= letter.at <= time.time() + 1


def test_the_newest_come_first_over_all_topics(letters: DeadLetters, bury: Bury) -> None:
    lanes = ["bulk", "premium", "bulk", "standard", "premium"]
    ids = [bury(lane=lane) for lane in lanes]

    assert [letter.job for letter in letters.newest(EVERYTHING, 10)] == ids[::-1]
    assert [letter.job for letter in letters.newest(EVERYTHING, 2)] == ids[:2:-1]


@pytest.mark.parametrize(
    "wanted",
    [
        {"topic": "jobs.text.bulk"},
        {"topic": "jobs.text.bulk.dlq"},
        {"job": "the-one"},
        {"tenant": "acme"},
        {"model": "other"},
        {"code": "worker_died"},
        {"topic": "jobs.text.bulk", "tenant": "acme", "code": "worker_died"},
    ],
    ids=lambda wanted: " ".join(wanted),
)
def test_only_what_is_wanted_is_found(
    letters: DeadLetters, bury: Bury, wanted: dict[str, Any]
) -> None:
    bury()
    bury("worker_died", id="the-one", lane="bulk", tenant="acme", model="other")
    bury()

    found = letters.newest(LetterFilter(**wanted), 10)

    assert [letter.job for letter in found] == ["the-one"]


def test_letters_of_before_are_left_out(letters: DeadLetters, bury: Bury) -> None:
    bury()

    assert letters.newest(LetterFilter(since=time.time() + 1), 10) == []


def test_a_topic_that_has_no_dead_letters_is_refused(letters: DeadLetters) -> None:
    with pytest.raises(InvalidJob) as refused:
        letters.newest(LetterFilter(topic="results"), 10)
    assert refused.value.code == "topic_unknown"


def test_letters_are_counted_by_code(letters: DeadLetters, bury: Bury) -> None:
    for code in ("bad_output", "worker_died", "bad_output"):
        bury(code)
    bury("bad_output", tenant="acme")

    assert letters.codes(EVERYTHING) == {"bad_output": 3, "worker_died": 1}
    assert letters.codes(LetterFilter(tenant="acme")) == {"bad_output": 1}


def test_a_letter_is_got_by_its_own_id_and_by_its_jobs(letters: DeadLetters, bury: Bury) -> None:
    job_id = bury("worker_died", lane="bulk")
    bury()
    bury("bad_output", id=job_id, lane="bulk")
    newer, older = letters.newest(LetterFilter(job=job_id), 10)

    assert letters.get(older.id).letter == older
    assert letters.get(job_id).letter == newer
    assert letters.get(job_id).record.headers["ce_id"] == job_id


@pytest.mark.parametrize("name", ["nobody", "jobs.text.standard.dlq/0/99", new_job_id("default")])
def test_a_letter_that_is_not_there_is_said_to_be_unknown(
    letters: DeadLetters, bury: Bury, name: str
) -> None:
    bury()

    with pytest.raises(InvalidJob) as refused:
        letters.get(name)
    assert refused.value.code == "letter_unknown"


def test_a_record_that_is_no_job_shows_what_it_claims(letters: DeadLetters, bury: Bury) -> None:
    bury("record_malformed", id="garbage", given={"ce_id": "no id", "ce_tenant": "Ac me"})

    (letter,) = letters.newest(EVERYTHING, 10)

    assert (letter.job, letter.tenant, letter.model) == ("garbage", "Ac me", "echo")
    assert letter.obstacle is not None
    assert "ce_tenant" in letter.obstacle


# ── payloads ─────────────────────────────────────────────────────────────────────────────────────


def test_a_payload_in_the_letter_is_read(letters: DeadLetters, bury: Bury, objects: Any) -> None:
    job_id = bury(payload=Payload("text/plain", data=b"\xff\0"))

    assert read_payload(letters.get(job_id), objects) == b"\xff\0"


def test_a_payload_in_the_store_is_read(letters: DeadLetters, bury: Bury, objects: Any) -> None:
    ref = objects.put("tenants/default/payloads/a.b", b"many bytes")
    job_id = bury(payload=Payload("text/plain", ref=ref))
    found = letters.get(job_id)

    assert (found.letter.object, found.letter.size_bytes) == (ref.key, 10)
    assert read_payload(found, objects) == b"many bytes"


def test_another_tenants_payload_is_not_read(
    letters: DeadLetters, bury: Bury, objects: Any
) -> None:
    ref: Ref = objects.put("tenants/acme/payloads/a.b", b"a secret")
    job_id = bury(payload=Payload("text/plain", ref=ref))

    with pytest.raises(InvalidJob) as refused:
        read_payload(letters.get(job_id), objects)
    assert refused.value.code == "payload_foreign"


def test_the_payload_of_garbage_is_its_value(
    letters: DeadLetters, bury: Bury, objects: Any
) -> None:
    bury("record_malformed", id="garbage", given={"ce_id": "no id"})

    assert read_payload(letters.get("garbage"), objects) == b"hello"


def test_a_letter_that_lost_its_payload_says_where_it_was(
    log: Any, letters: DeadLetters, bury: Bury, objects: Any
) -> None:
    job_id = bury(
        given={"x-value-dropped": "5000000 bytes"}, payload=Payload("text/plain", data=b"")
    )
    found = letters.get(job_id)

    assert found.letter.obstacle is not None
    assert "5000000 bytes" in found.letter.obstacle
    assert "offset 7 of jobs.text.standard" in found.letter.obstacle
    with pytest.raises(InvalidJob) as refused:
        read_payload(found, objects)
    assert refused.value.code == "payload_dropped"
    letters.redrive(letters.select(EVERYTHING, force=True))
    assert "x-value-dropped" not in redriven(log)[0].headers


# ── redriving ────────────────────────────────────────────────────────────────────────────────────


def test_a_redriven_job_is_the_same_job_with_a_new_deadline(
    log: Any, letters: DeadLetters, bury: Bury, make_job: Callable[..., Job]
) -> None:
    job = make_job(
        id=new_job_id("default", "k"),
        key="k",
        params={"top": 3},
        version=2,
        priority=7,
        reply_to="me",
        submitted_at=1_700_000_000.0,
        foreign={"ce_color": "blue", "x-trace": "1"},
        payload=Payload("text/plain", data=bytes(range(256))),
    )
    bury(job=job)
    before = time.time()

    assert redrive(letters, deadline_s=60) == 1

    (record,) = redriven(log)
    (letter,) = letters.newest(EVERYTHING, 1)
    again = read_job(record.position.topic, record.headers, record.value, record.time)
    assert msgspec.structs.replace(again, deadline_at=job.deadline_at, replay=None) == job, (
        "all but the deadline and the replay id is as it was"
    )
    assert before + 60 <= again.deadline_at <= time.time() + 60
    assert again.replay == letter.id
    assert (record.key, record.value) == (job.id, bytes(range(256)))
    assert not record.headers.keys() & (DEAD_LETTER_HEADERS | HISTORY_HEADERS)


def test_a_job_that_failed_in_a_retry_goes_to_its_own_topic(
    log: Any, letters: DeadLetters, bury: Bury
) -> None:
    bury(on=RETRY, lane="premium")
    history = {"ce_attempt": "first", "ce_suspect": "1", "ce_notbefore": "later"}
    bury("record_malformed", on=RETRY, given={"ce_jobtopic": "jobs.text.bulk", **history})

    assert redrive(letters) == 2

    records = redriven(log)
    assert {record.position.topic for record in records} == {"jobs.text.premium", "jobs.text.bulk"}
    assert not any(record.headers.keys() & HISTORY_HEADERS for record in records)


def test_a_letter_has_one_replay_id_and_its_job_s_next_letter_another(
    log: Any, letters: DeadLetters, bury: Bury
) -> None:
    job_id = bury()
    redrive(letters)
    redrive(letters)
    first, second = (record.headers[REPLAY] for record in redriven(log))
    assert first == second

    bury(id=job_id, replay=first)  # it failed again
    redrive(letters)

    replays = [record.headers[REPLAY] for record in redriven(log)]
    assert len(replays) == 4
    assert len(set(replays)) == 2


def test_only_what_was_selected_is_redriven(log: Any, letters: DeadLetters, bury: Bury) -> None:
    wanted = [bury(code="worker_died", lane=lane) for lane in ("bulk", "premium", "bulk")]
    bury(code="bad_output")
    selection = letters.select(LetterFilter(code="worker_died"))
    bury(code="worker_died", lane="bulk")  # it came while somebody was asked
    bury(code="worker_died", lane="basic")

    assert (selection.letters, selection.codes) == (3, {"worker_died": 3})
    assert sorted(each.letter.job for each in letters.each(selection)) == sorted(wanted)
    assert letters.redrive(selection) == 3
    assert sorted(record.key for record in redriven(log)) == sorted(wanted)


def test_of_a_limited_selection_exactly_these_go(
    log: Any, letters: DeadLetters, bury: Bury
) -> None:
    ids = [bury() for _ in range(5)]
    selection = letters.select(EVERYTHING, limit=2)

    assert selection.letters == 2
    assert letters.redrive(selection) == 2
    assert [record.key for record in redriven(log)] == ids[:2]


@pytest.mark.parametrize(
    ("code", "given"),
    [
        ("record_malformed", {"ce_id": "no id"}),
        ("idempotency_conflict", {}),
        ("tenant_unproven", {SIGNATURE: "v1=forged"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_run_goes_only_by_force(
    log: Any, letters: DeadLetters, bury: Bury, code: str, given: dict[str, str]
) -> None:
    bury(code, id="hopeless", given=given)
    fine = bury()
    selection = letters.select(EVERYTHING)

    assert (selection.letters, selection.left_out) == (1, 1)
    assert letters.redrive(selection) == 1
    assert [record.key for record in redriven(log)] == [fine]

    forced = letters.select(LetterFilter(code=code), force=True)
    assert (forced.letters, forced.left_out) == (1, 0)
    assert letters.redrive(forced) == 1
    (record,) = (record for record in redriven(log) if record.key == "hopeless")
    assert record.headers.items() >= given.items()


def test_a_deadline_that_was_no_time_hinders_nobody(
    log: Any, letters: DeadLetters, bury: Bury
) -> None:
    bury("record_malformed", given={"ce_deadline": "tomorrow"})

    assert redrive(letters) == 1
    (record,) = redriven(log)
    assert read_job(record.position.topic, record.headers, b"", 0.0).deadline_at > time.time()


def test_a_proven_job_is_signed_anew(
    log: Any, letters: DeadLetters, bury: Bury, make_job: Callable[..., Job]
) -> None:
    bury(job=signed(make_job(), KEYS))

    assert redrive(letters) == 1

    (record,) = redriven(log)
    check_proof(read_job(record.position.topic, record.headers, record.value, 0.0), KEYS)


@pytest.mark.parametrize("job_keys", [{"acme": [b"k" * 16]}, {"default": [b"k" * 16]}])
def test_a_job_that_cannot_be_proven_here_is_not_signed(
    log: Any,
    letters: DeadLetters,
    bury: Bury,
    make_job: Callable[..., Job],
    job_keys: dict[str, list[bytes]],
) -> None:
    (tenant,) = job_keys
    job = signed(make_job(tenant=tenant), job_keys)
    bury(job=job)

    assert redrive(letters) == 0
    letters.redrive(letters.select(EVERYTHING, force=True))

    (record,) = redriven(log)
    assert record.headers[SIGNATURE] == job.signature


def test_an_unsigned_job_stays_unsigned(log: Any, letters: DeadLetters, bury: Bury) -> None:
    bury()

    assert redrive(letters) == 1
    assert SIGNATURE not in redriven(log)[0].headers


@pytest.mark.parametrize(
    ("deadline_s", "code"),
    [
        (0, "deadline_past"),
        (-1, "deadline_past"),
        (float("nan"), "deadline_past"),
        (MAX_DEADLINE_S + 1, "deadline_too_far"),
        (float("inf"), "deadline_too_far"),
    ],
)
def test_a_deadline_that_cannot_be_is_refused_before_anything_goes(
    log: Any, letters: DeadLetters, bury: Bury, deadline_s: float, code: str
) -> None:
    bury()

    with pytest.raises(InvalidJob) as refused:
        redrive(letters, deadline_s=deadline_s)
    assert refused.value.code == code
    assert redriven(log) == []


@pytest.mark.parametrize("rate", [0.5, 5.0, 50.0])
def test_a_rate_is_kept(letters: DeadLetters, bury: Bury, clock: FakeClock, rate: float) -> None:
    for _ in range(30):
        bury()
    gone: list[tuple[float, int]] = []

    redrive(letters, rate=rate, progress=lambda count: gone.append((clock.now, count)))

    so_far = 0
    for at, count in gone:
        assert so_far <= at * rate + 1e-6
        assert count <= max(1.0, rate / 10)
        so_far += count
    assert so_far == 30
    assert clock.now == pytest.approx((30 - gone[-1][1]) / rate)


def test_without_a_rate_nobody_waits(letters: DeadLetters, bury: Bury, clock: FakeClock) -> None:
    for _ in range(3):
        bury()

    assert redrive(letters) == 3
    assert clock.now == 0.0


def test_after_a_failure_in_the_middle_the_rest_can_follow(
    log: Any, letters: DeadLetters, bury: Bury, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = APPEND_MOST + 1
    ids = {bury() for _ in range(count)}
    append = type(log).append
    refusals = iter([False, True])

    def append_once(log: Any, records: Any) -> None:
        if next(refusals, False):
            raise Transient("log_full", "no room")
        append(log, records)

    monkeypatch.setattr(type(log), "append", append_once)
    with pytest.raises(Transient):
        redrive(letters)
    assert len(redriven(log)) == APPEND_MOST

    assert redrive(letters) == count
    replays = {record.headers[REPLAY] for record in redriven(log)}
    assert len(replays) == count
    assert {record.key for record in redriven(log)} == ids


class EndlessLog:
    """A log of many dead letters, made as they are read."""

    def __init__(self, letter: Record, count: int) -> None:
        self._letter = letter
        self._count = count
        self.appended = 0

    def read(self, topics: Any, since: float) -> Iterator[Record]:
        for offset in range(self._count):
            position = self._letter.position._replace(offset=offset)
            value = self._letter.value + b"." * 1000
            yield self._letter._replace(position=position, time=float(offset), value=value)

    def append(self, records: list[NewRecord]) -> None:
        self.appended += len(records)


def test_many_letters_take_no_more_memory_than_few(letters: DeadLetters, bury: Bury) -> None:
    """5,000 letters of a kilobyte and more; a few hundred of them would be over the limit."""
    job_id = bury()
    log = EndlessLog(letters.get(job_id).record, 5000)
    many = DeadLetters(log, {}, MAX_DEADLINE_S)  # type: ignore[arg-type]
    tracemalloc.start()
    try:
        newest = many.newest(EVERYTHING, 3)
        many.codes(EVERYTHING)
        assert redrive(many) == 5000
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert [letter.id.rpartition("/")[2] for letter in newest] == ["4999", "4998", "4997"]
    assert log.appended == 5000
    assert peak_bytes < 1_000_000


def test_the_time_of_a_letter_is_when_it_was_written(letters: DeadLetters, bury: Bury) -> None:
    """And so a job of long ago is found by its id all the same."""
    job_id = bury(submitted_at=1_000_000_000.0, given={"ce_time": rfc3339(1_000_000_000.0)})

    assert letters.get(job_id).letter.at > time.time() - 60
