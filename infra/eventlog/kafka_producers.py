"""The two ways to write: appends, which must not get lost, and transactions, which must not happen twice."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from kafka import TopicPartition
from kafka import errors as kafka_errors
from kafka.structs import OffsetAndMetadata

from infra.eventlog import Fenced
from infra.eventlog.kafka_cluster import ANSWER_S, Cluster, kafka_trouble, translated
from infra.eventlog.kafka_records import Encoded
from infra.eventlog.tracker import METADATA_LIMIT
from schemas.errors import PipelineError

APPEND_S = 2 * ANSWER_S
OPEN_S = 15.0
"""How long the cluster lets a transaction stay open: so long a lost owner can hold back readers."""

TRANSACTION_S = 20.0
"""How long we wait for one. Longer than OPEN_S: what has not happened by then does not happen any more."""

Offsets = Mapping[TopicPartition, OffsetAndMetadata]


class StaleMember(Exception):
    """The group has been dealt out anew since this member last looked. Nothing was written."""


class Appender:
    """Idempotent appends. May be used from several threads."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._lock = threading.Lock()
        self._producer: Any = None

    def append(self, records: Sequence[Encoded]) -> None:
        """Durable on return. Raises InvalidJob, PipelineError, and Transient: then some may be there all the same."""
        producer = self._connected()
        try:
            with kafka_trouble():
                sent = [_send(producer, self._cluster, record) for record in records]
                for one in sent:
                    one.get(timeout=APPEND_S)
        except PipelineError:
            self._discard(producer)
            raise

    def close(self) -> None:
        with self._lock:
            producer, self._producer = self._producer, None
        if producer is not None:
            _close(producer, ANSWER_S)

    def _connected(self) -> Any:
        with self._lock:
            if self._producer is None:
                self._producer = self._cluster.producer()
            return self._producer

    def _discard(self, producer: Any) -> None:
        """It must not go on trying what was reported as failed, nor count what was refused."""
        with self._lock:
            if self._producer is producer:
                self._producer = None
        _close(producer, 0)


class Transactions:
    """Of one member of a group. The id stays with its slot: who takes the slot ends what an earlier owner began."""

    def __init__(self, cluster: Cluster, transactional_id: str) -> None:
        self._cluster = cluster
        self._transactional_id = transactional_id
        self._producer: Any = None
        self._connect()

    def run(self, records: Sequence[Encoded], offsets: Offsets, member: Any) -> None:
        """All of it or nothing. member: who it was in its group when it received what it completes.

        Raises StaleMember, InvalidJob, PipelineError and Transient: nothing was written, all goes on.
        Raises Fenced where another process has the slot, and where it cannot be known what was written:
        a process that starts anew learns it from the cluster.
        """
        try:
            _within(TRANSACTION_S, lambda: self._run(records, offsets, member))
        except TimeoutError:
            raise Fenced(
                f"The Kafka cluster has not answered for {TRANSACTION_S:g} s whether a transaction "
                f"was committed: start anew, and what is open will show."
            ) from None

    def close(self) -> None:
        self._discard(1)

    def _connect(self) -> None:
        producer = self._cluster.producer(
            transactional_id=self._transactional_id, transaction_timeout_ms=int(OPEN_S * 1000)
        )
        try:
            with kafka_trouble():
                producer.init_transactions()
        except BaseException:
            _close(producer, 1)
            raise
        self._producer = producer

    def _discard(self, patience_s: float) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            _close(producer, patience_s)

    def _run(self, records: Sequence[Encoded], offsets: Offsets, member: Any) -> None:
        if self._producer is None:
            self._connect()
        sent: list[Any] = []
        try:
            self._producer.begin_transaction()
            begun_as = self._epoch()
            sent += [_send(self._producer, self._cluster, record) for record in records]
            if offsets:
                self._producer.send_offsets_to_transaction(offsets, member)
            # The client may commit a transaction of which it gave up a record, or which it began anew in the
            # middle: what was in it before is not in it any more.
            for one in sent:
                one.get(timeout=TRANSACTION_S)
            if self._epoch() != begun_as:
                raise Fenced(
                    "The Kafka client has begun a transaction anew: nothing was written. Start anew."
                )
            self._producer.commit_transaction()
        except kafka_errors.KafkaError as error:
            refused = next((one.exception for one in sent if one.is_done and one.failed()), error)
            self._abort(refused)
            # Of no more use: it goes on counting refused records as if they had been taken, and would commit the
            # positions of this transaction with the next one.
            self._discard(0)
            if isinstance(refused, kafka_errors.CommitFailedError):
                raise StaleMember from refused
            raise translated(refused) from error

    def _epoch(self) -> Any:
        return self._producer._transaction_manager.producer_id_and_epoch

    def _abort(self, reason: kafka_errors.KafkaError) -> None:
        """Where even that fails, the producer is of no more use."""
        try:
            self._producer.abort_transaction()
        except kafka_errors.KafkaError as error:
            if kafka_errors.OffsetMetadataTooLargeError.__name__ in str(reason):
                raise PipelineError(
                    "commit_metadata_refused",
                    f"The Kafka cluster does not keep what is complete with a committed offset: set "
                    f"offset.metadata.max.bytes to {METADATA_LIMIT}, its default, on every broker, then start "
                    f"this process anew. Nothing was written; what is open will show.",
                ) from reason
            raise Fenced(
                f"The Kafka cluster takes no more transactions from this process ({reason}; {error}): "
                f"another one may have its slot. It must stop and start anew."
            ) from reason
        if isinstance(reason, kafka_errors.FencedInstanceIdError):
            raise Fenced("Another process has this member's slot in the group.") from reason


def _close(producer: Any, patience_s: float) -> None:
    """What could not be sent by then is given up. By itself the client stays open for it, and goes on trying."""
    try:
        producer.close(timeout=patience_s)
    except kafka_errors.KafkaError:
        producer._sender.force_close()


def _send(producer: Any, cluster: Cluster, record: Encoded) -> Any:
    return producer.send(
        cluster.name(record.topic), record.value, key=record.key, headers=record.headers
    )


def _within(seconds: float, call: Callable[[], None]) -> None:
    """For calls that have no time limit of their own. Raises TimeoutError and leaves them to themselves."""
    done: Future[None] = Future()

    def run() -> None:
        try:
            call()
            done.set_result(None)
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="kafka-transaction", daemon=True).start()
    done.result(seconds)
