"""The client for asyncio programs: the same words, awaited. Work is done in threads, a few at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

from producers.client import WAIT_S, Client, JobHandle, JobOptions, Result
from schemas.errors import JobFailed
from schemas.models import ModelCard
from schemas.results import Outcome

if TYPE_CHECKING:
    from producers.payloads import Submittable

T = TypeVar("T")

CALLS = 8
WAITS = 64
_END = object()


@dataclass(frozen=True, slots=True)
class AsyncJobHandle:
    """A job that was accepted."""

    handle: JobHandle
    client: AsyncClient = field(repr=False, compare=False)

    @property
    def id(self) -> str:
        return self.handle.id

    async def result(self, timeout_s: float = WAIT_S) -> Result:
        """As JobHandle.result."""
        return await self.client.waited(partial(self.handle.result, timeout_s))

    async def status(self) -> Outcome:
        return await self.client.status(self.id)

    async def cancel(self) -> None:
        await self.client.cancel(self.id)


class AsyncClient:
    """Takes what `Client` takes. At most CALLS calls and WAITS waits are under way at once, in threads;
    the others wait their turn. For results of many jobs at once, `results` is one wait."""

    def __init__(self, **options: Any) -> None:
        self._client = Client(**options)
        self._calls = ThreadPoolExecutor(CALLS, "headrace-call")
        self._waits = ThreadPoolExecutor(WAITS, "headrace-wait")

    async def submit(
        self,
        model: str,
        payload: Submittable,
        *,
        key: str | None = None,
        **options: Unpack[JobOptions],
    ) -> AsyncJobHandle:
        handle = await self._call(partial(self._client.submit, model, payload, key=key, **options))
        return AsyncJobHandle(handle, self)

    async def submit_many(
        self, model: str, payloads: Iterable[Submittable], **options: Unpack[JobOptions]
    ) -> list[AsyncJobHandle]:
        handles = await self._call(partial(self._client.submit_many, model, payloads, **options))
        return [AsyncJobHandle(handle, self) for handle in handles]

    async def results(
        self, jobs: Iterable[AsyncJobHandle], timeout_s: float = WAIT_S
    ) -> AsyncIterator[Result | JobFailed]:
        """As Client.results."""
        arriving = self._client.results([job.handle for job in jobs], timeout_s)
        while (result := await self.waited(partial(next, arriving, _END))) is not _END:
            yield result

    async def status(self, job_id: str) -> Outcome:
        return await self._call(partial(self._client.status, job_id))

    async def cancel(self, job_id: str) -> None:
        await self._call(partial(self._client.cancel, job_id))

    async def models(self) -> list[ModelCard]:
        return await self._call(self._client.models)

    async def close(self) -> None:
        await self._call(self._client.close)
        self._calls.shutdown(wait=False)
        self._waits.shutdown(wait=False, cancel_futures=True)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        await self.close()

    async def _call(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._calls, work)

    async def waited(self, work: Callable[[], T]) -> T:
        """Run what waits for jobs, apart from the calls, which must not queue behind it."""
        return await asyncio.get_running_loop().run_in_executor(self._waits, work)
