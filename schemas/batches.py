"""What dispatcher and worker say to each other: a batch goes out, a completion comes back (MessagePack)."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from schemas.payloads import Payload, Ref
from schemas.results import StageTimes

RUN_BATCH = "headrace.run_batch.v1"
"""Wire name of the Celery task. Its arguments: the batch id, and the slot it was given to."""


DEADLINE_PASSED = "deadline_passed"
"""Code of an item that was not run because its deadline had come."""


class BatchItem(Struct, frozen=True, array_like=True):
    """One job of a batch: what its worker needs, no more. deadline_at: seconds since the epoch.
    attempt: failed attempts before this one."""

    job_id: str
    tenant: str
    payload: Payload
    params: dict[str, Any]
    submitted_at: float
    deadline_at: float
    trace_id: str | None = None
    attempt: int = 0


class Batch(Struct, frozen=True, array_like=True):
    """Jobs of one model version for one worker. id: random, the fencing token of its lease.
    reply_to: the dispatcher slot whose inbox takes the completion.
    alone: run with nothing beside it, because a worker died on it before."""

    id: str
    model: str
    version: int
    reply_to: int
    lease_s: float
    max_run_s: float
    alone: bool
    items: list[BatchItem]


class Assignment(Struct, frozen=True, array_like=True):
    """Which attempts at which jobs a batch is, for a dispatcher that becomes the owner of such a job
    while the batch is out. job_ids, attempts: in the order of the batch's items."""

    batch_id: str
    worker: str
    version: int
    job_ids: list[str]
    attempts: list[int]


class ItemOutcome(Struct, frozen=True, array_like=True):
    """What became of one item: answer (JSON) or ref, else code and message. retry: it may pass next time.
    invalid: the job itself is wrong, whatever the model."""

    answer: bytes | None = None
    ref: Ref | None = None
    code: str | None = None
    message: str | None = None
    retry: bool = False
    times: StageTimes = StageTimes()
    invalid: bool = False


class Completion(Struct, frozen=True, array_like=True):
    """items: in the order of the batch's items, as many; or none, when the worker gives the batch back unrun."""

    batch_id: str
    worker: str
    items: list[ItemOutcome]


encode = msgspec.msgpack.Encoder().encode
decode_assignment = msgspec.msgpack.Decoder(Assignment).decode
decode_batch = msgspec.msgpack.Decoder(Batch).decode
decode_completion = msgspec.msgpack.Decoder(Completion).decode
