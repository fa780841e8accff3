"""The asyncio client over the same fakes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from infra.redis_client import connect_redis
from producers.async_client import CALLS, WAITS, AsyncClient
from producers.client import Result
from schemas.errors import InvalidJob, JobFailed
from schemas.results import Outcome
from schemas.topics import CONTROL

Succeeded = Callable[..., Outcome]
PATIENCE_S = 20


@pytest.fixture
async def async_client(client: Any) -> AsyncIterator[AsyncClient]:
    """Closed by the fixture of the client it wraps."""
    wrapping = AsyncClient(settings=client.settings)
    wrapping._client.__dict__.update(client.__dict__)
    yield wrapping
    wrapping._calls.shutdown(wait=False)
    wrapping._waits.shutdown(wait=False)


async def test_a_job_is_submitted_and_its_result_awaited(
    async_client: AsyncClient, view: Any, succeeded: Succeeded
) -> None:
    handle = await async_client.submit("echo", "x", key="k", priority=3)
    view.end(succeeded(handle.id, fingerprint=handle.handle.fingerprint))

    result = await handle.result()

    assert (result.job_id, result.answer) == (handle.id, {"type": "echo"})


async def test_results_come_as_they_arrive(
    async_client: AsyncClient, view: Any, succeeded: Succeeded
) -> None:
    handles = await async_client.submit_many("echo", ["1", "2", "3"])
    view.end(succeeded(handles[1].id))
    view.on["wait"] = [
        lambda: view.end(succeeded(handles[2].id, status="failed", code="x", message="bad")),
        lambda: view.end(succeeded(handles[0].id)),
    ]

    results = [result async for result in async_client.results(handles)]

    assert [type(result) for result in results] == [Result, JobFailed, Result]


async def test_a_job_that_failed_raises(
    async_client: AsyncClient, view: Any, succeeded: Succeeded
) -> None:
    handle = await async_client.submit("echo", "x")
    view.end(succeeded(handle.id, status="failed", code="bad", message="It was bad."))

    with pytest.raises(JobFailed, match="It was bad"):
        await handle.result()


async def test_what_is_refused_is_refused_here_too(async_client: AsyncClient) -> None:
    with pytest.raises(InvalidJob):
        await async_client.submit("nothing", "x")
    with pytest.raises(InvalidJob):
        await async_client.status("no id")


async def test_status_cancel_and_models(async_client: AsyncClient, appended: Any) -> None:
    handle = await async_client.submit("echo", "x")

    assert (await handle.status()).status == "queued"
    assert [card.name for card in await async_client.models()] == ["echo"]
    await handle.cancel()
    assert appended()[-1].position.topic == CONTROL


async def test_a_timeout_is_raised(async_client: AsyncClient) -> None:
    handle = await async_client.submit("echo", "x")

    with pytest.raises(TimeoutError):
        await handle.result(timeout_s=0)


async def test_while_many_results_are_awaited_jobs_can_be_submitted_and_cancelled(
    async_client: AsyncClient, view: Any, succeeded: Succeeded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a program that awaits a few slow jobs can do nothing else, not even cancel them."""
    handles = await async_client.submit_many("echo", [str(i) for i in range(CALLS)])
    all_wait = threading.Barrier(CALLS + 1)
    go_on = threading.Event()

    def wait_once(seconds: float) -> None:
        if not go_on.is_set():
            all_wait.wait(PATIENCE_S)
            assert go_on.wait(PATIENCE_S)

    view.pass_s = lambda seconds: wait_once(seconds) if seconds else None
    waits = [asyncio.ensure_future(handle.result()) for handle in handles]
    await asyncio.to_thread(all_wait.wait, PATIENCE_S)
    try:
        await asyncio.wait_for(async_client.cancel(handles[0].id), timeout=5)
    finally:
        for handle in handles:
            view.end(succeeded(handle.id))
        go_on.set()
        await asyncio.gather(*waits)


async def test_two_waits_at_once_each_have_an_ear_of_their_own(
    async_client: AsyncClient, view: Any, succeeded: Succeeded
) -> None:
    """A connection to Redis is not to be read by two threads at once."""
    handles = await async_client.submit_many("echo", ["1", "2", "3", "4"])
    both_wait, used = threading.Barrier(2), list[int]()
    open_ear = view.notices

    def watched(client: str) -> Any:
        ear = open_ear(client)

        def wait(timeout_s: float) -> list[str]:
            if not timeout_s:
                return []
            used.append(id(ear))
            both_wait.wait(PATIENCE_S)
            for handle in handles:
                view.end(succeeded(handle.id))
            return [handle.id for handle in handles]

        ear.wait = wait
        return ear

    view.notices = watched
    one, other = async_client.results(handles[:2]), async_client.results(handles[2:])
    for first, results in ((handles[0], one), (handles[2], other)):
        view.end(succeeded(first.id))
        await anext(results)

    await asyncio.gather(anext(one), anext(other))

    assert len(set(used)) == len(used) == 2


async def test_there_is_a_connection_for_every_wait_and_call_at_once(
    async_client: AsyncClient,
) -> None:
    """A wait holds one for as long as it lasts; without one to spare nobody could look into the view."""
    redis: Any = connect_redis(async_client._client.settings)

    assert redis.connection_pool.max_connections >= 2 * WAITS + CALLS


async def test_results_that_are_left_half_way_leave_no_ear_taken(
    async_client: AsyncClient, view: Any, succeeded: Succeeded
) -> None:
    handles = await async_client.submit_many("echo", ["1", "2"])
    view.end(succeeded(handles[0].id))
    results = async_client.results(handles)
    await anext(results)
    await results.aclose()  # type: ignore[attr-defined]

    view.end(succeeded(handles[1].id))
    await handles[1].result()

    assert len(view.ears) == 1
