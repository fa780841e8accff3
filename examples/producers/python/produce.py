"""Submit files as jobs to headrace over Kafka, with kafka-python and nothing of headrace.

    python produce.py --topic jobs.text.standard --model minilm-topics --content-type text/plain FILE...

Prints the id of each job once the cluster has it. Environment: BROKERS (localhost:9092), TENANT
(default), and TENANT_KEY, the tenant's secret where the dispatcher asks for a proof.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import hmac
import json
import os
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path

from kafka import KafkaProducer


def main() -> None:
    parser = argparse.ArgumentParser(description="Submit files as jobs to headrace.")
    parser.add_argument("--brokers", default=os.environ.get("BROKERS", "localhost:9092"))
    parser.add_argument("--topic", required=True, help="jobs.<modality>.<lane>")
    parser.add_argument("--model", required=True)
    parser.add_argument("--tenant", default=os.environ.get("TENANT", "default"))
    parser.add_argument("--content-type", default="application/octet-stream")
    parser.add_argument("--deadline-s", type=float, default=3600)
    parser.add_argument("--mode", choices=["binary", "structured"], default="binary")
    parser.add_argument("files", nargs="+", type=Path)
    options = parser.parse_args()

    # Keyed records go to the partition that murmur2 says, as headrace's own do: the library's default.
    producer = KafkaProducer(
        bootstrap_servers=options.brokers.split(","), acks="all", enable_idempotence=True
    )
    for file in options.files:
        job_id = new_job_id()
        headers, value = record(options, job_id, file.read_bytes())
        encoded = [(name, text.encode()) for name, text in headers.items()]
        # The job is accepted once this returns.
        producer.send(options.topic, value, job_id.encode(), headers=encoded).get(timeout=30)
        print(job_id, flush=True)
    producer.close()


def record(
    options: argparse.Namespace, job_id: str, payload: bytes
) -> tuple[dict[str, str], bytes]:
    """Headers and value of a job."""
    sent_us = time.time_ns() // 1000
    deadline_us = sent_us + int(options.deadline_s * 1_000_000)
    event = {
        "specversion": "1.0",
        "type": "io.headrace.job.v1",
        "source": "/examples/python",
        "id": job_id,
        "time": rfc3339(sent_us),
        "tenant": options.tenant,
        "model": options.model,
        "deadline": rfc3339(deadline_us),
    }
    headers = {}
    if key := os.environ.get("TENANT_KEY"):
        digest = hashlib.sha256(payload).hexdigest()
        text = "\n".join([options.tenant, job_id, str(deadline_us), digest, options.model])
        proof = hmac.new(key.encode(), text.encode(), hashlib.sha256).hexdigest()
        headers["x-headrace-signature"] = f"v1={proof}"
    if options.mode == "binary":
        headers |= {f"ce_{name}": text for name, text in event.items()}
        return headers | {"content-type": options.content_type}, payload
    if options.content_type.startswith("text/"):
        data = {"data": payload.decode()}
    else:
        data = {"data_base64": base64.b64encode(payload).decode()}
    value = json.dumps(event | {"datacontenttype": options.content_type} | data)
    return headers | {"content-type": "application/cloudevents+json; charset=utf-8"}, value.encode()


def new_job_id() -> str:
    """A UUIDv7: its first 48 bits are the time, which is what makes a job quick to find by its id."""
    raw = bytearray((time.time_ns() // 1_000_000).to_bytes(6, "big") + os.urandom(10))
    raw[6] = raw[6] & 0x0F | 0x70
    raw[8] = raw[8] & 0x3F | 0x80
    return str(uuid.UUID(bytes=bytes(raw)))


def rfc3339(microseconds: int) -> str:
    seconds, rest = divmod(microseconds, 1_000_000)
    return datetime.fromtimestamp(seconds, UTC).strftime(f"%Y-%m-%dT%H:%M:%S.{rest:06}Z")


if __name__ == "__main__":
    main()
