"""A network that fails: a TCP proxy before a server that resets connections, delays, holds back or swallows
bytes, or loses answers.
"""

from __future__ import annotations

import asyncio
import random
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

Mode = Literal["pass", "reset", "blackhole", "hold"]
"""blackhole: bytes are lost, and their connection with them once that is over. hold: they come late."""

LOOK_S = 0.05
DELAYED_CHUNKS = 64


class Proxy:
    """host: where clients find the server instead of at its own address. accepted: connections so far.
    tls: what clients must speak; the server itself need not.

    What tests set takes effect on connections that are open, too.
    """

    def __init__(self, target: str, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self.host = ""
        self.accepted = 0
        self.mode: Mode = "pass"
        self.resets_left = 0
        """So many connections are reset, then the mode holds."""
        self.delay_s = 0.0
        """Of what is sent, each way."""
        self.resets_per_s = 0.0
        """Of each open connection."""
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

        server = await asyncio.start_server(connected, "127.0.0.1", 0, ssl=self._tls)
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
        lossy, swallowed = asyncio.Event(), asyncio.Event()
        ways = [
            asyncio.create_task(self._forward(reader, back, lossy, swallowed, asks=True)),
            asyncio.create_task(self._forward(answers, writer, lossy, swallowed, asks=False)),
            asyncio.create_task(self._doom(swallowed)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            writer.transport.abort()
            back.transport.abort()

    async def _forward(
        self,
        source: asyncio.StreamReader,
        target: asyncio.StreamWriter,
        lossy: asyncio.Event,
        swallowed: asyncio.Event,
        *,
        asks: bool,
    ) -> None:
        """Until one side closes or the connection is to be reset."""
        on_the_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(DELAYED_CHUNKS)
        delivery = asyncio.create_task(self._deliver(on_the_way, target))
        try:
            while chunk := await source.read(64 * 1024):
                if self.resets_left > 0:
                    self.resets_left -= 1
                    return
                if self.mode == "reset":
                    return
                if self.mode == "blackhole":
                    swallowed.set()
                    continue
                if asks and self.lose_answer_to and all(p in chunk for p in self.lose_answer_to):
                    self.lose_answer_to = ()
                    lossy.set()
                if not asks and lossy.is_set():
                    self.lost_answers += 1
                    return
                await on_the_way.put((self._loop.time() + self.delay_s, chunk))
            await on_the_way.put((0.0, b""))
            await delivery
        except OSError:
            return
        finally:
            delivery.cancel()

    async def _deliver(
        self, on_the_way: asyncio.Queue[tuple[float, bytes]], target: asyncio.StreamWriter
    ) -> None:
        """In order, each chunk at its time; an empty one is the end."""
        with suppress(OSError):
            while True:
                due, chunk = await on_the_way.get()
                if due > self._loop.time():
                    await asyncio.sleep(due - self._loop.time())
                while self.mode == "hold":
                    await asyncio.sleep(LOOK_S)
                if not chunk:
                    return
                target.write(chunk)
                await target.drain()

    async def _doom(self, swallowed: asyncio.Event) -> None:
        """Until this connection is to be reset: by chance, or because it lost bytes that TCP would not lose."""
        while random.random() >= self.resets_per_s * LOOK_S:
            if swallowed.is_set() and self.mode != "blackhole":
                return
            await asyncio.sleep(LOOK_S)


@contextmanager
def proxy_before(host: str, tls: ssl.SSLContext | None = None) -> Iterator[Proxy]:
    """host: with its port."""
    proxy = Proxy(host, tls)
    thread = threading.Thread(target=proxy.run)
    thread.start()
    proxy.wait_until_up()
    try:
        yield proxy
    finally:
        proxy.stop()
        thread.join()
