"""Servers of versions that are too old, as far as a client gets with them: they say who they are."""

from __future__ import annotations

import socketserver
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kafka.protocol.broker_version_data import BROKER_API_VERSIONS
from kafka.protocol.metadata import MetadataResponse

API_VERSIONS, METADATA = 18, 3
UNSUPPORTED_VERSION = 35
METADATA_VERSION = 8


@contextmanager
def outdated_kafka() -> Iterator[str]:
    """The address of a server with the answers of Kafka 2.4."""

    def serve(handler: socketserver.StreamRequestHandler) -> None:
        while head := handler.rfile.read(4):
            (size,) = struct.unpack(">i", head)
            request = handler.rfile.read(size)
            key, version, correlation = struct.unpack_from(">hhi", request)
            answer = _api_versions(version) if key == API_VERSIONS else _metadata(handler)
            if key in (API_VERSIONS, METADATA):
                body = struct.pack(">i", correlation) + answer
                handler.wfile.write(struct.pack(">i", len(body)) + body)

    with _serving(serve) as port:
        yield f"kafka://127.0.0.1:{port}"


@contextmanager
def outdated_redis() -> Iterator[str]:
    """The address of a server with the answers of Redis 6.2."""
    answers = {
        b"HELLO": b"%1\r\n" + _bulk(b"proto") + b":3\r\n",
        b"INFO": _bulk(b"redis_version:6.2.14\r\nmaxmemory_policy:noeviction\r\naof_enabled:1\r\n"),
        b"TIME": b"*2\r\n" + _bulk(b"%d" % time.time()) + _bulk(b"0"),
    }

    def serve(handler: socketserver.StreamRequestHandler) -> None:
        while count := handler.rfile.readline()[1:]:
            words = []
            for _ in range(int(count)):
                size = int(handler.rfile.readline()[1:])
                words.append(handler.rfile.read(size + 2)[:-2])
            handler.wfile.write(answers.get(words[0].upper(), b"-ERR unknown command\r\n"))

    with _serving(serve) as port:
        yield f"redis://127.0.0.1:{port}"


def _api_versions(version: int) -> bytes:
    """Of a request that is too new, only that it is."""
    known = {API_VERSIONS: (0, 0)}
    if version == 0:
        known = BROKER_API_VERSIONS[(2, 4)] | {METADATA: (0, METADATA_VERSION)}
    entries = [struct.pack(">hhh", key, least, most) for key, (least, most) in known.items()]
    error = UNSUPPORTED_VERSION if version else 0
    return struct.pack(">hi", error, len(entries)) + b"".join(entries)


def _metadata(handler: socketserver.StreamRequestHandler) -> bytes:
    """One broker, which is this one, and no topics."""
    host, port = handler.connection.getsockname()
    broker = MetadataResponse.MetadataResponseBroker(node_id=1, host=host, port=port)
    answer = MetadataResponse[METADATA_VERSION](
        brokers=[broker], cluster_id="old", controller_id=1, topics=[]
    )
    return bytes(answer.encode())


def _bulk(text: bytes) -> bytes:
    return b"$%d\r\n%s\r\n" % (len(text), text)


@contextmanager
def _serving(serve: Callable[[socketserver.StreamRequestHandler], None]) -> Iterator[int]:
    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            serve(self)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()
