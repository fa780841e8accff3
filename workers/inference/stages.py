"""A batch's way through a worker: load and decode, compute, encode and store. Each item fails alone.

Several batches are under way at once, and the parts of one batch are spread over the executors, so one
is being loaded and decoded while another computes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import BoundedSemaphore
from typing import TypeVar

import msgspec

from infra.logs import get_logger
from infra.objects import ObjectStore
from pipelines.model import LoadedModel, Row
from schemas.batches import DEADLINE_PASSED, Batch, BatchItem, ItemOutcome
from schemas.errors import InferenceFailed, InvalidJob, PipelineError, Transient
from schemas.payloads import RESULT_INLINE_LIMIT_BYTES, Ref, result_key
from schemas.results import StageTimes

FETCH_THREADS = 8

T = TypeVar("T")
R = TypeVar("R")

logger = get_logger("worker.stages")


@dataclass(slots=True)
class _Run:
    """One item on its way. row: its arrays, input first, then output. error: why it went no further."""

    item: BatchItem
    data: bytes = b""
    row: Row | None = None
    error: PipelineError | None = None
    answer: bytes | None = None
    ref: Ref | None = None
    load_ms: float = 0.0
    decode_ms: float = 0.0
    run_ms: float = 0.0
    store_ms: float = 0.0


class Stages:
    """executors: engine runs at once. Shared by every batch of the process."""

    def __init__(self, objects: ObjectStore, executors: int) -> None:
        self._objects = objects
        self._executors = executors
        self._computing = BoundedSemaphore(executors)
        self._pool = ThreadPoolExecutor(executors, "stage")
        self._fetchers = ThreadPoolExecutor(FETCH_THREADS, "fetch")

    def run(self, batch: Batch, model: LoadedModel) -> list[ItemOutcome]:
        """One outcome per item, in order. Raises nothing for an item's sake."""
        started = time.time()
        runs = [_Run(item) for item in batch.items]
        live = [run for run in runs if run.item.deadline_at > started]
        self._load(live)
        self._spread(lambda part: self._decode(model, part), self._parts(live, len(live)))
        ready = sorted(
            (r for r in live if r.row is not None), key=lambda r: model.cost(r.row or {})
        )
        largest = model.bundle.config.batch.buckets[-1]
        self._spread(lambda part: self._compute(model, part), self._parts(ready, largest))
        self._spread(lambda part: self._encode(batch, model, part), self._parts(ready, len(ready)))
        return [_outcome(run, started) for run in runs]

    def close(self) -> None:
        self._pool.shutdown()
        self._fetchers.shutdown()

    def _parts(self, runs: Sequence[_Run], most: int) -> list[Sequence[_Run]]:
        """Even parts, one per executor or more, none larger than `most`."""
        if not runs:
            return []
        count = max(-(-len(runs) // most), min(self._executors, len(runs)))
        return [runs[len(runs) * i // count : len(runs) * (i + 1) // count] for i in range(count)]

    def _spread(self, work: Callable[[T], R], parts: Sequence[T]) -> None:
        """Do the parts side by side; a single one right here."""
        if len(parts) == 1:
            work(parts[0])
        else:
            for done in [self._pool.submit(work, part) for part in parts]:
                done.result()

    def _load(self, runs: Sequence[_Run]) -> None:
        """Wait here for what lies in the object store, so that no executor does."""
        began = time.perf_counter()
        fetching = {
            index: self._fetchers.submit(self._objects.fetch, run.item.payload.ref)
            for index, run in enumerate(runs)
            if run.item.payload.ref
        }
        for index, run in enumerate(runs):
            with _caught(run):
                fetched = fetching.get(index)
                run.data = fetched.result() if fetched else run.item.payload.data or b""
            run.load_ms = _ms_since(began)

    def _decode(self, model: LoadedModel, runs: Iterable[_Run]) -> None:
        for run in runs:
            if run.error:
                continue
            began = time.perf_counter()
            with _caught(run):
                run.row = model.decode(run.data, run.item.payload.content_type, run.item.params)
            run.data = b""
            run.decode_ms = _ms_since(began)

    def _compute(self, model: LoadedModel, runs: Sequence[_Run]) -> None:
        """Run a part; if that fails, its halves, so that in the end only the bad item fails."""
        began = time.perf_counter()
        try:
            with self._computing:
                rows = model.infer([run.row or {} for run in runs])
        except Exception as error:
            if len(runs) == 1:
                runs[0].error, runs[0].row = _as_pipeline_error(error), None
                return
            for part in (runs[: len(runs) // 2], runs[len(runs) // 2 :]):
                self._compute(model, part)
            return
        for run, row in zip(runs, rows, strict=True):
            run.row = row
            run.run_ms = _ms_since(began)

    def _encode(self, batch: Batch, model: LoadedModel, runs: Iterable[_Run]) -> None:
        for run in runs:
            if run.row is None:
                continue
            began = time.perf_counter()
            with _caught(run):
                answer = model.encode(run.row)
                if len(answer) <= RESULT_INLINE_LIMIT_BYTES:
                    run.answer = answer
                else:
                    key = result_key(run.item.tenant, run.item.job_id, batch.id)
                    run.ref = self._objects.put(key, answer)
            run.row = None
            run.store_ms = _ms_since(began)


@contextmanager
def _caught(run: _Run) -> Iterator[None]:
    """What goes wrong in the block is this item's error, and no other's."""
    try:
        yield
    except Exception as error:
        run.error, run.row = _as_pipeline_error(error), None


def failed(error: Exception) -> ItemOutcome:
    """An item that failed, as the dispatcher wants it. What is no error of ours is a bug in a step: it goes
    to the log with its traceback, and is the job's failure."""
    known = _as_pipeline_error(error)
    # A bare PipelineError is about this deployment (wrong credentials, a missing bucket), not about the job.
    passing = isinstance(known, Transient) or type(known) is PipelineError
    invalid = isinstance(known, InvalidJob)
    return ItemOutcome(code=known.code, message=known.message, retry=passing, invalid=invalid)


def _as_pipeline_error(error: Exception) -> PipelineError:
    if isinstance(error, PipelineError):
        return error
    logger.exception("step_failed", exc_info=error)
    return InferenceFailed(
        "step_failed", f"A step of the model raised {type(error).__name__}: {error}"
    )


def _outcome(run: _Run, started: float) -> ItemOutcome:
    times = StageTimes(
        max(0.0, (started - run.item.submitted_at) * 1000),
        run.load_ms,
        run.decode_ms,
        run.run_ms,
        run.store_ms,
    )
    if run.error is not None:
        return msgspec.structs.replace(failed(run.error), times=times)
    if run.answer is None and run.ref is None:
        return ItemOutcome(code=DEADLINE_PASSED, message="The deadline passed before the start.")
    return ItemOutcome(run.answer, run.ref, times=times)


def _ms_since(began: float) -> float:
    return (time.perf_counter() - began) * 1000
