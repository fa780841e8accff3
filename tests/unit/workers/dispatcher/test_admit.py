"""Every verdict on a job that arrives."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from schemas.errors import InvalidJob, Transient
from schemas.jobs import Job
from schemas.models import ModelCard
from schemas.payloads import Payload, Ref
from schemas.proof import signed
from workers.dispatcher.admit import Admitter
from workers.dispatcher.memory import JobMemory, OpenJob

MakeJob = Callable[..., Job]
MakeOpen = Callable[..., OpenJob]


@pytest.fixture
def card(make_card: Callable[..., ModelCard]) -> ModelCard:
    return make_card(version=3, max_bytes=100)


@pytest.fixture
def memory() -> JobMemory:
    return JobMemory(keys_window_s=100, keys_most=10)


@pytest.fixture
def admitter(card: ModelCard, memory: JobMemory) -> Admitter:
    def resolve(name: str, version: int | None) -> ModelCard:
        if name == "away":
            raise Transient("storage_unavailable", "away")
        if name != card.name:
            raise InvalidJob("model_unknown", f"No model {name}.")
        if version not in (None, card.version):
            raise InvalidJob("version_unknown", f"No version {version}.")
        return card

    return Admitter(resolve, memory, max_deadline_s=7200)


def test_a_good_job_runs_with_its_version_pinned(
    admitter: Admitter, make_job: MakeJob, card: ModelCard, noon: float
) -> None:
    job = make_job(id="a")

    verdict, pinned, its_card, error = admitter.admit(job, noon)

    assert (verdict, its_card, error) == ("run", card, None)
    assert (pinned.id, pinned.version) == ("a", 3)
    assert job.version is None


@pytest.mark.parametrize(
    ("facts", "code"),
    [
        ({"model": "other"}, "model_unknown"),
        ({"version": 9}, "version_unknown"),
        ({"payload": Payload("", data=b"x" * 101)}, "payload_too_large"),
        ({"payload": Payload("", data=b"")}, "payload_empty"),
        ({"payload": Payload("", ref=Ref("tenants/other/x", 1, "0" * 64))}, "payload_foreign"),
        ({"modality": "image"}, "wrong_modality"),
        ({"deadline_at": 1_800_000_000.0 + 7201}, "deadline_too_far"),
    ],
)
def test_what_is_wrong_with_a_job_is_said(
    admitter: Admitter, make_job: MakeJob, noon: float, facts: dict[str, object], code: str
) -> None:
    admission = admitter.admit(make_job(**facts), noon)

    assert admission.verdict == "refused"
    assert admission.error is not None
    assert admission.error.code == code


@pytest.mark.parametrize("skew_s", [1e6, -1e6])
def test_how_far_a_deadline_may_be_counts_from_here_not_from_the_producers_clock(
    admitter: Admitter, make_job: MakeJob, noon: float, skew_s: float
) -> None:
    """Otherwise a producer whose clock runs ahead holds a place in the window beyond the log's retention."""
    ahead = make_job(submitted_at=noon + 1e6, deadline_at=noon + 1e6 + 60)
    behind = make_job(submitted_at=noon - 1e6, deadline_at=noon + 60)

    verdict = admitter.admit(ahead if skew_s > 0 else behind, noon).verdict

    assert verdict == ("refused" if skew_s > 0 else "run")


@pytest.mark.parametrize(("late_s", "verdict"), [(0, "expired"), (1, "expired"), (-1, "run")])
def test_a_job_whose_deadline_came_is_expired(
    admitter: Admitter, make_job: MakeJob, noon: float, late_s: float, verdict: str
) -> None:
    assert admitter.admit(make_job(deadline_at=noon - late_s), noon).verdict == verdict


def test_a_job_that_was_cancelled_before_it_came_does_not_run(
    admitter: Admitter, memory: JobMemory, make_job: MakeJob, noon: float
) -> None:
    memory.cancel("a")

    assert admitter.admit(make_job(id="a"), noon).verdict == "cancelled"


@pytest.mark.parametrize("key", [None, "k"])
def test_the_same_job_again_while_it_is_open_is_a_duplicate(
    admitter: Admitter, memory: JobMemory, make_open: MakeOpen, key: str | None, noon: float
) -> None:
    job = make_open(id="a", key=key)
    memory.hold(job)

    assert admitter.admit(job.job, noon).verdict == "duplicate"


def test_the_same_work_under_a_key_that_was_answered_is_a_duplicate_for_a_while(
    admitter: Admitter, memory: JobMemory, make_job: MakeJob, noon: float
) -> None:
    job = make_job(id="a", key="k", deadline_at=noon + 3600)
    memory.ended(job, noon)

    assert admitter.admit(job, noon + 100).verdict == "duplicate"
    assert admitter.admit(job, noon + 101).verdict == "run"


@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize(
    "change", [{"payload": Payload("", data=b"other")}, {"params": {"k": 1}}, {"model": "other"}]
)
def test_other_work_under_the_same_key_is_a_conflict(
    admitter: Admitter,
    memory: JobMemory,
    make_open: MakeOpen,
    make_job: MakeJob,
    noon: float,
    ended: bool,
    change: dict[str, object],
) -> None:
    first = make_open(id="a", key="k")
    memory.hold(first)
    if ended:
        memory.ended(first.job, noon)

    admission = admitter.admit(make_job(id="a", key="k", **change), noon)

    assert admission.verdict == "conflict"
    assert admission.error is not None
    assert admission.error.code == "idempotency_conflict"


def test_a_duplicate_is_one_even_when_it_is_late_or_cancelled(
    admitter: Admitter, memory: JobMemory, make_open: MakeOpen, noon: float
) -> None:
    """The job in hand ends in its own way; its double must not end it a second time."""
    job = make_open(id="a", deadline_at=noon - 1)
    memory.hold(job)
    memory.cancel("a")

    assert admitter.admit(job.job, noon).verdict == "duplicate"


def test_a_model_that_cannot_be_looked_up_is_no_verdict(
    admitter: Admitter, make_job: MakeJob, noon: float
) -> None:
    with pytest.raises(Transient):
        admitter.admit(make_job(model="away"), noon)


# ── proof of the tenant ──────────────────────────────────────────────────────────────────────────

KEYS = {"default": [b"k" * 32], "acme": [b"a" * 32]}


@pytest.fixture
def strict(card: ModelCard, memory: JobMemory) -> Admitter:
    return Admitter(lambda name, version: card, memory, max_deadline_s=7200, keys=KEYS)


def test_a_signed_job_runs_where_a_proof_is_asked_for(
    strict: Admitter, make_job: MakeJob, noon: float
) -> None:
    assert strict.admit(signed(make_job(), KEYS), noon).verdict == "run"


@pytest.mark.parametrize("deadline_at", [0.0, 1_900_000_000.0])
def test_a_job_that_claims_another_tenant_has_no_verdict(
    strict: Admitter, make_job: MakeJob, noon: float, deadline_at: float
) -> None:
    """Not even `expired`: an outcome would stand in the name of that tenant's own job."""
    own = signed(make_job(deadline_at=deadline_at), KEYS)
    forged = msgspec.structs.replace(own, tenant="acme")

    with pytest.raises(InvalidJob) as caught:
        strict.admit(forged, noon)

    assert caught.value.code == "tenant_unproven"


def test_a_forged_cancelled_job_has_no_verdict(
    strict: Admitter, memory: JobMemory, make_job: MakeJob, noon: float
) -> None:
    memory.cancel("a")

    with pytest.raises(InvalidJob):
        strict.admit(make_job(id="a"), noon)


def test_a_job_that_was_admitted_before_needs_no_second_proof(
    strict: Admitter, make_job: MakeJob, noon: float
) -> None:
    """Its key may have been withdrawn since; it was accepted, so it must end."""
    assert strict.admit(make_job(attempt=1), noon, returned=True).verdict == "run"
