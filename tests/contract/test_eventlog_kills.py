"""Writers and readers of an event log, killed with `kill -9` in the middle of things."""

from __future__ import annotations

import collections
import itertools
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("eventlog_process.py")
EXIT_FENCED = 3

SCALE = 10 if os.environ.get("HEADRACE_FAULTS") == "long" else 1
WRITERS = 2
READER_KILLS = 6 * SCALE
JOBS_EACH = 2500 * SCALE
ENDLESS = str(10**9)


@contextmanager
def process(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    running = subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        yield running
    finally:
        running.kill()
        running.communicate()


def lines_until_killed(running: subprocess.Popen[str], lines: int) -> list[int]:
    """Kill it after so many lines. What it had printed by then counts."""
    assert running.stdout is not None
    read = [running.stdout.readline() for _ in range(lines)]
    running.kill()
    return [int(line) for line in read + running.stdout.readlines()]


def run(*arguments: str) -> list[str]:
    with process(*arguments) as running:
        output, _ = running.communicate(timeout=100)
        assert running.returncode == 0
        return output.split()


def write_and_be_killed(url: str, writer: int, readers_killed: threading.Event) -> set[str]:
    """Every job that a writer said was accepted; goes on for as long as the readers need jobs."""
    chance, accepted = random.Random(writer), set[str]()
    for life in itertools.count():
        prefix = f"{writer}.{life}"
        with process("write", url, prefix, ENDLESS) as running:
            count = lines_until_killed(running, chance.randint(1, 60))[-1]
        accepted |= {f"{prefix}.{i}" for i in range(count)}
        if len(accepted) >= JOBS_EACH and readers_killed.is_set():
            break
    return accepted


def answer_and_be_killed(url: str, readers_killed: threading.Event) -> int:
    """How many jobs were answered by readers that were killed."""
    chance, answered = random.Random(99), 0
    try:
        for _ in range(READER_KILLS):
            with process("answer", url) as running:
                answered += sum(lines_until_killed(running, chance.randint(1, 12)))
    finally:
        readers_killed.set()
    return answered


@pytest.mark.timeout(120 * SCALE)
def test_whoever_is_killed_every_accepted_job_is_answered_once(log_url: str) -> None:
    readers_killed = threading.Event()
    with ThreadPoolExecutor() as pool:
        reading = pool.submit(answer_and_be_killed, log_url, readers_killed)
        writing = [
            pool.submit(write_and_be_killed, log_url, writer, readers_killed)
            for writer in range(WRITERS)
        ]
    run("drain", log_url)

    accepted = set[str]().union(*(writer.result() for writer in writing))
    answers = collections.Counter(run("results", log_url))
    assert len(accepted) >= WRITERS * JOBS_EACH
    assert reading.result() > 0
    assert accepted - answers.keys() == set()
    assert [key for key, times in answers.items() if times > 1] == []


def test_a_reader_that_is_replaced_while_it_works_answers_nothing_twice(log_url: str) -> None:
    jobs = run("write", log_url, "job", "3000")
    with process("answer", log_url) as first:
        assert first.stdout is not None
        first.stdout.readline()
        run("drain", log_url)
        first.stdout.readlines()
        assert first.wait() == EXIT_FENCED
    answers = collections.Counter(run("results", log_url))
    assert int(jobs[-1]) == len(answers) == answers.total() == 3000
