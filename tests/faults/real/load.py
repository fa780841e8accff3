"""Jobs for one run: by a submitting process, or by hand; and which of them were accepted."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

from headrace import Client
from infra.settings import load_settings
from tests.conftest import ROOT
from tests.faults.real.keeper import until
from tests.faults.real.stack import RealStack

ACCEPT_S = 120.0
STOP_S = 60.0
LOOK_S = 0.5
NUMBERS = 10_000_000
"""So far apart are the numbers of two submitters' jobs."""


class Load:
    """file: a line per accepted job. marks: a line per run of a job, its number."""

    def __init__(self, stack: RealStack, name: str) -> None:
        self._stack = stack
        self.file = stack.folder / f"jobs-{name}"
        self.file.touch()
        self.marks = stack.folder / f"marks-{name}"
        self._submitter: subprocess.Popen[bytes] | None = None
        self._command: list[str] = []
        self._rate = 0.0
        self._lives = 0
        self._numbered = 0
        self._client: Client | None = None

    # ── by a process ─────────────────────────────────────────────────────────────────────────────

    def start(self, rate: float, **options: float) -> None:
        self._rate = rate
        words = {"rate": rate, **options}
        self._command = [sys.executable, "-m", "tests.faults.real.submitter"]
        self._command += [str(self.file), str(self.marks)]
        for name, value in words.items():
            self._command += [f"--{name.replace('_', '-')}", str(value)]
        self._spawn()

    def crash(self) -> None:
        """Kill the submitter, and let another one go on."""
        assert self._submitter is not None
        self._submitter.kill()
        self._submitter.wait()
        self._spawn()

    def stop(self) -> None:
        self.close()
        if self._submitter is not None:
            self._submitter.send_signal(signal.SIGTERM)
            try:
                self._submitter.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._submitter.kill()
                self._submitter.wait()

    def until_accepted(self, jobs: int) -> None:
        patience_s = ACCEPT_S + 2 * jobs / self._rate
        until(lambda: len(self.accepted) >= jobs, patience_s, f"{jobs} jobs are accepted", LOOK_S)

    def _spawn(self) -> None:
        self._lives += 1
        first = ["--first", str(self._lives * NUMBERS), "--seed", str(self._lives)]
        with (self._stack.folder / "submitter.log").open("ab") as out:
            self._submitter = subprocess.Popen(
                self._command + first,
                cwd=ROOT,
                env=self._stack.environment("client"),
                stdout=out,
                stderr=out,
            )

    # ── by hand ──────────────────────────────────────────────────────────────────────────────────

    def submit(self, model: str, payloads: Sequence[Any], **options: Any) -> list[str]:
        handles = self.client.submit_many(model, payloads, **options)
        with self.file.open("a") as file:
            file.writelines(f"{handle.id} -\n" for handle in handles)
        return [handle.id for handle in handles]

    def submit_marked(self, model: str, count: int, *, tier: str, **words: Any) -> list[str]:
        """Jobs that leave a mark each time they are begun with. words: more for their orders."""
        numbers = range(self._numbered, self._numbered + count)
        self._numbered += count
        orders = [{"mark": str(self.marks), "name": str(n), **words} for n in numbers]
        handles = self.client.submit_many(
            model, [json.dumps(o).encode() for o in orders], tier=tier
        )
        with self.file.open("a") as file:
            file.writelines(f"{h.id} {n}\n" for h, n in zip(handles, numbers, strict=True))
        return [handle.id for handle in handles]

    @property
    def client(self) -> Client:
        """Goes to the servers straight."""
        if self._client is None:
            stack, s3 = self._stack, self._stack.servers.minio.s3
            self._client = Client(
                settings=load_settings(
                    data_dir=stack.folder,
                    log_url=f"kafka://{stack.kafka_address}?prefix={stack.prefix}",
                    objects_url=s3.url(stack.servers.bucket),
                    redis_url=stack.servers.redis.url,
                    s3={"access_key": s3.access_key, "secret_key": s3.secret_key},
                )
            )
        return self._client

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    # ── what became of it ────────────────────────────────────────────────────────────────────────

    @property
    def accepted(self) -> list[str]:
        return [job_id for job_id, _ in self._lines()]

    def runs(self) -> Counter[str]:
        """How often each number was begun with."""
        return Counter(self.marks.read_text().split("\n")[:-1] if self.marks.exists() else ())

    def in_hand(self) -> list[str]:
        """Accepted jobs that a worker has begun with and that have no outcome yet."""
        runs = self.runs()
        begun = [job_id for job_id, number in self._lines() if runs[number]]
        return self._stack.watcher.unseen(begun)

    def recomputed(self) -> int:
        runs = self.runs()
        return sum(max(0, runs[number] - 1) for _, number in self._lines() if number != "-")

    def _lines(self) -> list[list[str]]:
        """Whole lines only: one may just be being written."""
        return [line.split() for line in self.file.read_text().split("\n")[:-1]]
