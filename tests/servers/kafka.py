"""Apache Kafka, one broker, from Maven's jars. `HEADRACE_TEST_KAFKA_URL` names a running one instead."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from tests.servers.process import (
    ServerProcess,
    accepts_connections,
    cache_folder,
    free_port,
    only_one,
    unavailable,
)

VERSION = "4.1.1"
SCALA = "2.13"
LOG4J = "2.25.2"
REMEDY = (
    "install Java 17 or newer and Maven (on Debian: `apt-get install default-jre-headless maven`), or set "
    "HEADRACE_TEST_KAFKA_URL=kafka://host:9092"
)

POM = f"""\
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>headrace</groupId><artifactId>test-kafka</artifactId><version>1</version>
  <dependencies>
    <dependency>
      <groupId>org.apache.kafka</groupId><artifactId>kafka_{SCALA}</artifactId>
      <version>{VERSION}</version>
    </dependency>
    <dependency>
      <groupId>org.apache.logging.log4j</groupId><artifactId>log4j-slf4j-impl</artifactId>
      <version>{LOG4J}</version>
    </dependency>
  </dependencies>
</project>
"""

PROPERTIES = """\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
controller.listener.names=CONTROLLER
inter.broker.listener.name=PLAINTEXT
log.dirs={folder}/data
auto.create.topics.enable=false
num.partitions=1
default.replication.factor=1
min.insync.replicas=1
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
log.segment.delete.delay.ms=1000
"""
"""The last line: topics of tests that are over leave the disk soon."""


class KafkaServer:
    """A broker with its data in a folder. Started again, it has what it had."""

    def __init__(self, folder: Path, more: str = "") -> None:
        self.port = free_port()
        jars = _jars()
        properties = folder / "server.properties"
        text = PROPERTIES.format(port=self.port, controller=free_port(), folder=folder)
        properties.write_text(text + more)
        cluster = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        java = ["java", "-XX:TieredStopAtLevel=1", "-cp", f"{jars}/*"]
        subprocess.run(
            [*java, "kafka.tools.StorageTool", "format", "-t", cluster, "-c", str(properties)],
            cwd=folder,
            check=True,
            capture_output=True,
        )
        command = [java[0], "-Xmx512m", *java[1:], "kafka.Kafka", str(properties)]
        self.process = ServerProcess(command, folder, lambda: accepts_connections(self.port))

    @property
    def url(self) -> str:
        return f"kafka://127.0.0.1:{self.port}"


@contextmanager
def kafka_server(more: str = "") -> Iterator[KafkaServer]:
    """A broker of one's own, with more lines for its properties. Skips where there is no Java or Maven."""
    with tempfile.TemporaryDirectory(prefix="hr-kafka-", ignore_cleanup_errors=True) as folder:
        server = KafkaServer(Path(folder), more)
        server.process.start()
        try:
            yield server
        finally:
            server.process.kill()


@contextmanager
def kafka_address() -> Iterator[str]:
    """The address of a broker: of the environment, or one that runs inside the block."""
    if given := os.environ.get("HEADRACE_TEST_KAFKA_URL"):
        yield given
        return
    with kafka_server() as server:
        yield server.url


@contextmanager
def fresh_topics(address: str, topics: Sequence[str], partitions: int) -> Iterator[str]:
    """The same cluster under a prefix of its own, with these of the declared topics."""
    from infra.eventlog.kafka import cluster_at
    from infra.eventlog.kafka_topics import ensure_topics
    from infra.settings import KafkaSettings
    from schemas.topics import TOPIC_BY_NAME

    url = f"{address}?prefix=test-{uuid.uuid4().hex[:12]}."
    cluster = cluster_at(url, KafkaSettings(partitions=partitions))
    made = ensure_topics(cluster, [TOPIC_BY_NAME[topic] for topic in topics])
    try:
        yield url
    finally:
        with closing(cluster.admin()) as admin:
            admin.delete_topics([topic.name for topic in made])


def _jars() -> Path:
    """The folder with Kafka's jars, fetched on first use."""
    folder = cache_folder(f"kafka-{VERSION}")
    for program in ("java", "mvn"):
        if not shutil.which(program) and (program == "java" or not (folder / "lib").exists()):
            unavailable("Apache Kafka", f"there is no `{program}` on the PATH", REMEDY)
    with only_one(folder):
        if not (folder / "lib").exists():
            _fetch(folder)
    return folder / "lib"


def _fetch(folder: Path) -> None:
    (folder / "pom.xml").write_text(POM)
    shutil.rmtree(folder / "lib.new", ignore_errors=True)
    fetched = subprocess.run(
        ["mvn", "-q", "-B", "dependency:copy-dependencies", "-DoutputDirectory=lib.new"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    if fetched.returncode != 0:
        unavailable("Apache Kafka", f"Maven could not fetch it ({fetched.stdout[-500:]})", REMEDY)
    (folder / "lib.new").rename(folder / "lib")
