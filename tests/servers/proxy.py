"""A network that fails: a TCP proxy before a server that resets connections, swallows bytes or loses answers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

Mode = Literal["pass", "reset", "blackhole"]


class Proxy:
    """host: where clients find the server instead of at its own address. accepted: connections so far.

    What tests set takes effect on connections that are open, too.
    """

    def __init__(self, target: str) -> None:
        self.host = ""
        self.accepted = 0
        self.mode: Mode = "pass"
        self.resets_left = 0
        """So many connections are reset, then the mode holds."""
        self.lose_answer_to: tuple[bytes, ...] = ()
        """The next request that holds all of these is carried out, its answer is lost."""
        self.lost_answers = 0
        self._target, _, port = target.rpartition(":")
        self._target_port = int(port)
        self._done = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._up = threading.Event()

    def run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    def wait_until_up(self) -> None:
        assert self._up.wait(10)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._done.set)

    async def _serve(self) -> None:
        tasks: set[asyncio.Task[None]] = set()

        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.accepted += 1
            task = asyncio.create_task(self._serve_one(reader, writer))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        self.host = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._up.set()
        await self._done.wait()
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            answers, back = await asyncio.open_connection(self._target, self._target_port)
        except OSError:
            writer.transport.abort()
            return
        lossy = asyncio.Event()
        ways = [
            asyncio.create_task(self._forward(reader, back, lossy, asks=True)),
            asyncio.create_task(self._forward(answers, writer, lossy, asks=False)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            writer.transport.abort()
            back.transport.abort()

    async def _forward(
        self,
        source: asyncio.StreamReader,
        target: asyncio.StreamWriter,
        lossy: asyncio.Event,
        *,
        asks: bool,
    ) -> None:
        """Until one side closes or the connection is to be reset."""
        with suppress(OSError):
            while chunk := await source.read(64 * 1024):
                if self.resets_left > 0:
                    self.resets_left -= 1
                    return
                if self.mode == "reset":
                    return
                if self.mode == "blackhole":
                    continue
                if asks and self.lose_answer_to and all(p in chunk for p in self.lose_answer_to):
                    self.lose_answer_to = ()
                    lossy.set()
                if not asks and lossy.is_set():
                    self.lost_answers += 1
                    return
                target.write(chunk)
                await target.drain()


@contextmanager
def proxy_before(host: str) -> Iterator[Proxy]:
    """host: with its port."""
    proxy = Proxy(host)
    thread = threading.Thread(target=proxy.run)
    thread.start()
    proxy.wait_until_up()
    try:
        yield proxy
    finally:
        proxy.stop()
        thread.join()
