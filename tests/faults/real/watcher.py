"""Looks on as outcomes become visible, as any consumer would: a plain `read_committed` one."""

from __future__ import annotations

import threading
import time
import zlib
from bisect import bisect_right
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError

PAUSE_S = 0.2


class Watcher:
    """servers: of Kafka. topic: with its prefix. Times are monotonic."""

    def __init__(self, servers: str, topic: str) -> None:
        self._servers = servers
        self._topic = topic
        self._positions: dict[TopicPartition, int] = {}
        self._seen: dict[str, tuple[float, int]] = {}
        self._times: list[float] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watcher")
        self._thread.start()

    @property
    def count(self) -> int:
        return len(self._times)

    def when(self, job_id: str) -> float | None:
        """When its first outcome was seen."""
        found = self._seen.get(job_id)
        return found[0] if found else None

    def unseen(self, job_ids: Iterable[str]) -> list[str]:
        return [job_id for job_id in job_ids if job_id not in self._seen]

    def first_after(self, since: float) -> float | None:
        """When the first outcome after a time was seen."""
        times = self._times
        at = bisect_right(times, since)
        return times[at] if at < len(times) else None

    def write(self, path: Path, job_ids: Iterable[str]) -> None:
        """What was seen first of each job: its id and a digest of its outcome."""
        with path.open("w") as file:
            for job_id in job_ids:
                if found := self._seen.get(job_id):
                    file.write(f"{job_id} {found[1]}\n")

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            with suppress(KafkaError):
                self._watch()
            self._stop.wait(PAUSE_S)

    def _watch(self) -> None:
        consumer = KafkaConsumer(
            bootstrap_servers=self._servers,
            isolation_level="read_committed",
            enable_auto_commit=False,
            reconnect_backoff_max_ms=500,
            metrics_enabled=False,
        )
        try:
            partitions = [
                TopicPartition(self._topic, number)
                for number in consumer.partitions_for_topic(self._topic) or ()
            ]
            consumer.assign(partitions)
            for partition in partitions:
                consumer.seek(partition, self._positions.get(partition, 0))
            while partitions and not self._stop.is_set():
                for partition, batch in consumer.poll(timeout_ms=100).items():
                    self._note(batch)
                    self._positions[partition] = batch[-1].offset + 1
        finally:
            consumer.close(timeout_ms=1000)

    def _note(self, batch: list[Any]) -> None:
        now = time.monotonic()
        for record in batch:
            self._times.append(now)
            self._seen.setdefault(record.key.decode(), (now, zlib.crc32(record.value)))
