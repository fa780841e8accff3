"""How Apache Kafka is reached: addresses, security, the clients that everything else uses, and what its errors mean."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, NamedTuple

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka import errors as kafka_errors
from kafka.net.compat import KafkaNetClient
from kafka.structs import OffsetAndMetadata

from infra.settings import KafkaSettings
from schemas.errors import InvalidJob, PipelineError, Transient
from schemas.topics import TOPIC_BY_NAME

ANSWER_S = 10.0
"""How long one request may take."""

CONNECT_S = 5.0
"""How long to look for a server that answers."""

MAX_RECORD_BYTES = 1024 * 1024
"""Of one record with its key and headers; a little less than brokers take by default."""

OLDEST_BROKER = (2, 5)
"""The first that tells an offset whose transaction is still open from one that stands."""


REFUSALS = (
    kafka_errors.AuthorizationError,
    kafka_errors.SaslAuthenticationFailedError,
    kafka_errors.UnsupportedSaslMechanismError,
    kafka_errors.IllegalSaslStateError,
)


class Cluster(NamedTuple):
    """prefix: goes before the name of every topic, group and transactional id, so that several may share a cluster."""

    servers: tuple[str, ...]
    prefix: str
    settings: KafkaSettings

    def name(self, topic: str) -> str:
        return self.prefix + topic

    def topic(self, name: str) -> str:
        return name[len(self.prefix) :]

    # The client library carries no types: what these three return is the library's, and stays in this package.

    def producer(self, **options: object) -> Any:
        return self._connect(
            KafkaProducer,
            acks="all",
            metrics_enabled=False,
            enable_idempotence=True,
            allow_auto_create_topics=False,
            max_request_size=MAX_RECORD_BYTES,
            max_block_ms=_ms(ANSWER_S),
            delivery_timeout_ms=_ms(1.5 * ANSWER_S),
            batch_size=128 * 1024,
            # With the default of 100 a transaction that follows another waits that long.
            retry_backoff_ms=2,
            **options,
        )

    def consumer(self, **options: object) -> Any:
        return self._connect(
            KafkaConsumer,
            isolation_level="read_committed",
            metrics_enabled=False,
            auto_offset_reset="earliest",
            enable_auto_commit=False,
            allow_auto_create_topics=False,
            retry_backoff_ms=10,
            **options,
        )

    def admin(self) -> Any:
        return self._connect(KafkaAdminClient)

    def partitions(self, topics: Iterable[str]) -> dict[str, list[TopicPartition]]:
        """By topic. Raises PipelineError (unknown_topic)."""
        wanted = {self.name(topic): topic for topic in topics}
        for topic in wanted.values():
            check_declared(topic)
        if not wanted:
            return {}
        with kafka_trouble(), closing(self.admin()) as admin:
            found = {entry["name"]: entry for entry in admin.describe_topics(list(wanted))}
        for name, topic in wanted.items():
            if error := found[name]["error_code"]:
                raise self._trouble_with(topic, error)
        return {
            topic: sorted(
                TopicPartition(name, part["partition_index"]) for part in found[name]["partitions"]
            )
            for name, topic in wanted.items()
        }

    def _trouble_with(self, topic: str, code: int) -> Exception:
        error = kafka_errors.for_code(code)(self.name(topic))
        if isinstance(error, kafka_errors.UnknownTopicOrPartitionError):
            return PipelineError(
                "unknown_topic",
                f"The Kafka cluster has no topic {self.name(topic)!r}: create what is missing with "
                f"`headrace topics apply`.",
            )
        return translated(error)

    def _connect(self, make: Any, **options: object) -> Any:
        """Raises Transient if no server answers, PipelineError if they refuse us or are too old."""
        opened: list[_Net] = []

        def open_net(**config: Any) -> _Net:
            opened.append(_Net(**config))
            return opened[-1]

        try:
            client = make(
                bootstrap_servers=list(self.servers),
                client_id="headrace",
                bootstrap_timeout_ms=_ms(CONNECT_S),
                request_timeout_ms=_ms(ANSWER_S),
                reconnect_backoff_max_ms=1000,
                kafka_client=open_net,
                **_security(self.settings),
                **options,
            )
        except kafka_errors.KafkaError as error:
            for net in opened:
                net.close()
                if net.refusal and isinstance(error, kafka_errors.KafkaTimeoutError):
                    error = kafka_errors.SaslAuthenticationFailedError(net.refusal)
            raise translated(error) from error
        version = opened[0]._manager.broker_version
        if version < OLDEST_BROKER:
            client.close()
            raise PipelineError(
                "log_unsupported",
                f"Kafka {'.'.join(map(str, OLDEST_BROKER))} or newer is needed, the cluster has "
                f"{'.'.join(map(str, version))}.",
            )
        return client


class _Net(KafkaNetClient):  # type: ignore[misc]
    """Gives up where the first server asked refuses us. By itself the client tries on until its time is up,
    and forgets why it failed."""

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self.refusal: Exception | None = None
        self._connect = self._manager.get_connection
        self._manager.get_connection = self._get_connection

    def _get_connection(self, node: Any, **options: Any) -> Any:
        if not self._manager.cluster.is_bootstrap(node):
            return self._connect(node, **options)
        if isinstance(self.refusal, REFUSALS):
            raise self.refusal
        connection = self._connect(node, **options)
        connection.init_future.add_errback(lambda error: self._remember(connection, error))
        return connection

    def _remember(self, connection: Any, error: Exception) -> None:
        """Over TLS the server's last word is often lost: it spoke to us, then hung up when we said who we are."""
        hung_up = connection.broker_version is not None and connection.config["sasl_mechanism"]
        self.refusal = error if isinstance(error, REFUSALS) or hung_up else None


def committed(consumer: Any, partitions: Sequence[TopicPartition]) -> dict[Any, OffsetAndMetadata]:
    """What the consumer's group has committed, without partitions where it has not yet.

    Waits for a transaction that is being ended. In one request; the public method makes one per partition.
    """
    found: dict[Any, OffsetAndMetadata] = consumer._coordinator.fetch_committed_offsets(
        list(partitions), timeout_ms=_ms(ANSWER_S)
    )
    return found


def check_declared(topic: str) -> None:
    if topic not in TOPIC_BY_NAME:
        raise PipelineError(
            "unknown_topic",
            f"The event log has no topic {topic!r}: use one that schemas/topics.py declares.",
        )


@contextmanager
def kafka_trouble() -> Iterator[None]:
    """Translates what the client library raises."""
    try:
        yield
    except kafka_errors.KafkaError as error:
        raise translated(error) from error


def translated(error: Exception) -> Exception:
    """Ours for one of the client library's. Misuse of the library is a bug and stays as it is."""
    match error:
        case (
            kafka_errors.IllegalStateError()
            | kafka_errors.IllegalArgumentError()
            | kafka_errors.KafkaConfigurationError()
        ) as bug:
            unchanged: Exception = bug
            return unchanged
        case kafka_errors.MessageSizeTooLargeError() | kafka_errors.RecordListTooLargeError():
            return InvalidJob(
                "record_too_large",
                f"A record is larger than the Kafka cluster takes ({error}): send large payloads by "
                f"reference, or raise the topic's max.message.bytes to {MAX_RECORD_BYTES}.",
            )
        case _ if isinstance(error, REFUSALS):
            return PipelineError(
                "log_forbidden",
                f"The Kafka cluster refuses us ({_short(error)}): check HEADRACE_KAFKA__USERNAME, "
                f"HEADRACE_KAFKA__PASSWORD, HEADRACE_KAFKA__SASL, and what its ACLs allow this user.",
            )
        case kafka_errors.UnsupportedCodecError():
            return PipelineError(
                "log_unreadable",
                f"A record is compressed in a way that cannot be read here ({_short(error)}): install "
                f"`headrace[kafka]` with all it asks for.",
            )
        case kafka_errors.UnsupportedVersionError():
            return PipelineError(
                "log_unsupported",
                f"The Kafka cluster is too old or too new for this client ({_short(error)}).",
            )
    return Transient(
        "log_unavailable",
        f"The Kafka cluster does not answer as it should ({_short(error)}): check that it runs, that the "
        f"address is right, and HEADRACE_KAFKA__TLS.",
    )


def _short(error: Exception) -> str:
    return (str(error) or type(error).__name__)[:300]


def _security(settings: KafkaSettings) -> dict[str, object]:
    protocol = ("SASL_" if settings.sasl else "") + ("SSL" if settings.tls else "PLAINTEXT")
    options: dict[str, object] = {"security_protocol": protocol}
    if settings.tls:
        options |= {
            "ssl_cafile": settings.ca_file,
            "ssl_certfile": settings.cert_file,
            "ssl_keyfile": settings.key_file,
            "ssl_password": settings.key_password.get_secret_value() or None,
        }
    if settings.sasl:
        options |= {
            "sasl_mechanism": settings.sasl,
            "sasl_plain_username": settings.username,
            "sasl_plain_password": settings.password.get_secret_value(),
        }
    return options


def _ms(seconds: float) -> int:
    return int(seconds * 1000)
