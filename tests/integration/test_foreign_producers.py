"""Jobs from programs in other languages, over a real Kafka: read as if our own client had written them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from kafka.partitioner.default import murmur2

from infra.eventlog import Record
from infra.eventlog.open import open_log
from schemas.jobs import Job, job_headers, read_job
from schemas.proof import check_proof
from tests.servers.kafka import fresh_topics, kafka_server
from tests.servers.producers import LANGUAGES, produce_with

TEXT, IMAGE = "jobs.text.standard", "jobs.image.bulk"
PARTITIONS = 6
KEY = "the-key-that-acme-signs-with"
TEXTS = ["The river rose by two metres overnight.", "na\u00efve caf\u00e9 \u2014 \U0001f600", "{}"]
PIXELS = bytes(range(256)) * 8

Produce = Callable[..., list[Record]]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Any Kafka cluster on which everybody may do all."""
    if given := os.environ.get("HEADRACE_TEST_KAFKA_URL"):
        yield given
        return
    with kafka_server() as server:
        yield server.url


@pytest.fixture(scope="module")
def url(address: str) -> Iterator[str]:
    with fresh_topics(address, [TEXT, IMAGE], PARTITIONS) as url:
        yield url


@pytest.fixture
def produce(url: str, tmp_path: Path) -> Produce:
    """Submit payloads with the program of a language; returns the records they became, in that order."""
    server, prefix = url.removeprefix("kafka://").split("?prefix=")

    def run(language: str, mode: str, topic: str, payloads: list[bytes], content_type: str, **env):
        files = [tmp_path / str(number) for number in range(len(payloads))]
        for file, payload in zip(files, payloads, strict=True):
            file.write_bytes(payload)
        options = ["--brokers", server, "--topic", prefix + topic, "--model", "minilm-topics"]
        options += ["--mode", mode, "--content-type", content_type, "--deadline-s", "90"]
        ids = produce_with(language, *options, *map(str, files), TENANT="acme", **env)
        with closing(open_log(url)) as log:
            found = {record.key: record for record in log.read([topic], 0.0)}
        return [found[job_id] for job_id in ids]

    return run


def job_of(record: Record) -> Job:
    return read_job(record.position.topic, record.headers, record.value, record.time)


@pytest.mark.parametrize("mode", ["binary", "structured"])
@pytest.mark.parametrize("language", LANGUAGES)
def test_a_job_is_the_same_from_whatever_language_and_in_either_mode(
    produce: Produce, language: str, mode: str
) -> None:
    before = time.time()

    records = produce(language, mode, TEXT, [text.encode() for text in TEXTS], "text/plain")

    for record, text in zip(records, TEXTS, strict=True):
        job = job_of(record)
        assert (job.id, job.topic, job.tenant) == (record.key, TEXT, "acme")
        assert (job.model, job.version, job.key) == ("minilm-topics", None, None)
        assert (job.payload.data, job.payload.content_type) == (text.encode(), "text/plain")
        assert before - 1 <= job.submitted_at <= time.time()
        assert job.deadline_at == pytest.approx(job.submitted_at + 90, abs=0.001)
        assert job.foreign == {"ce_source": f"/examples/{language}"}
        again = read_job(TEXT, job_headers(job), text.encode(), record.time)
        assert again == job


@pytest.mark.parametrize("mode", ["binary", "structured"])
@pytest.mark.parametrize("language", LANGUAGES)
def test_bytes_that_are_no_text_come_whole(produce: Produce, language: str, mode: str) -> None:
    (record,) = produce(language, mode, IMAGE, [PIXELS], "image/png")

    assert job_of(record).payload.data == PIXELS


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_job_lies_where_kafkas_own_partitioner_puts_its_id(
    produce: Produce, language: str
) -> None:
    records = produce(language, "binary", TEXT, [b"x"] * 20, "text/plain")

    found = [record.position.partition for record in records]
    hashes = [murmur2(record.key.encode()) & 0x7FFFFFFF for record in records]
    assert found == [value % PARTITIONS for value in hashes]
    assert len(set(found)) > 1


@pytest.mark.parametrize("mode", ["binary", "structured"])
@pytest.mark.parametrize("language", LANGUAGES)
def test_a_proof_of_the_tenant_is_the_same_in_every_language(
    produce: Produce, language: str, mode: str
) -> None:
    payload = TEXTS[1].encode()

    (record,) = produce(language, mode, TEXT, [payload], "text/plain", TENANT_KEY=KEY)

    check_proof(job_of(record), {"acme": [KEY.encode()]})
