"""Apache Kafka, one broker, from Maven's jars, and fresh topics on any cluster."""

from __future__ import annotations

import base64
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from infra.eventlog.kafka import cluster_at
from infra.eventlog.kafka_topics import ensure_topics
from infra.settings import KafkaSettings
from schemas.topics import TOPIC_BY_NAME
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
listeners=PLAINTEXT://127.0.0.1:{port},SECURE://127.0.0.1:{secure_port},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{port},SECURE://127.0.0.1:{secure_port}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,SECURE:SASL_SSL,CONTROLLER:PLAINTEXT
controller.listener.names=CONTROLLER
inter.broker.listener.name=PLAINTEXT
listener.name.secure.ssl.keystore.location={keystore}
listener.name.secure.ssl.keystore.type=PKCS12
listener.name.secure.ssl.keystore.password={password}
listener.name.secure.sasl.enabled.mechanisms=PLAIN
listener.name.secure.plain.sasl.jaas.config=\
  org.apache.kafka.common.security.plain.PlainLoginModule required \
  user_{operator}="{password}" user_{stranger}="{password}";
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
super.users=User:ANONYMOUS;User:{operator}
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

OPERATOR, STRANGER, PASSWORD = "operator", "stranger", "a-test-secret"
"""Who may do all, and who may do nothing, on the listener with TLS and passwords."""


class KafkaServer:
    """A broker with its data in a folder. Started again, it has what it had.

    At `url` everybody may do all. At `secure_url` it speaks TLS, by `ca_file`, and asks who one is.
    quick_start: with the compiler C1 alone, which is ready sooner and slower in the long run.
    """

    def __init__(self, folder: Path, more: str = "", *, quick_start: bool = True) -> None:
        classpath = f"{jars()}/*"
        self.port, self.secure_port = free_port(), free_port()
        self.ca_file = folder / "ca.pem"
        properties = folder / "server.properties"
        text = PROPERTIES.format(
            port=self.port,
            secure_port=self.secure_port,
            controller=free_port(),
            folder=folder,
            keystore=_certificate(folder, self.ca_file),
            operator=OPERATOR,
            stranger=STRANGER,
            password=PASSWORD,
        )
        properties.write_text(text + more)
        cluster = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        c1_alone = "-XX:TieredStopAtLevel=1"
        subprocess.run(
            [
                *("java", c1_alone, "-cp", classpath, "kafka.tools.StorageTool", "format"),
                *(f"--cluster-id={cluster}", "-c", str(properties)),
            ],
            cwd=folder,
            check=True,
            capture_output=True,
        )
        options = ["-Xmx512m", *([c1_alone] if quick_start else [])]
        command = ["java", *options, "-cp", classpath, "kafka.Kafka", str(properties)]
        self.process = ServerProcess(command, folder, lambda: accepts_connections(self.port))

    @property
    def url(self) -> str:
        return f"kafka://127.0.0.1:{self.port}"

    @property
    def secure_url(self) -> str:
        return f"kafka://127.0.0.1:{self.secure_port}"


@contextmanager
def kafka_server(more: str = "", *, quick_start: bool = True) -> Iterator[KafkaServer]:
    """A broker of one's own, with more lines for its properties. Skips where there is no Java or Maven."""
    with tempfile.TemporaryDirectory(prefix="hr-kafka-", ignore_cleanup_errors=True) as folder:
        server = KafkaServer(Path(folder), more, quick_start=quick_start)
        server.process.start()
        try:
            yield server
        finally:
            server.process.kill()


@contextmanager
def fresh_topics(address: str, topics: Sequence[str], partitions: int) -> Iterator[str]:
    """The same cluster under a prefix of its own, with these of the declared topics."""
    url = f"{address}?prefix=test-{uuid.uuid4().hex[:12]}."
    cluster = cluster_at(url, KafkaSettings(partitions=partitions))
    made = ensure_topics(cluster, [TOPIC_BY_NAME[topic] for topic in topics])
    try:
        yield url
    finally:
        with closing(cluster.admin()) as admin:
            admin.delete_topics([topic.name for topic in made])


def jars() -> Path:
    """The folder with Kafka's jars, fetched on first use."""
    folder = cache_folder(f"kafka-{VERSION}")
    for program in ("java", "mvn"):
        if not shutil.which(program) and (program == "java" or not (folder / "lib").exists()):
            unavailable("Apache Kafka", f"there is no `{program}` on the PATH", REMEDY)
    with only_one(folder):
        if not (folder / "lib").exists():
            _fetch(folder)
    return folder / "lib"


def _certificate(folder: Path, ca_file: Path) -> Path:
    """A key and its own certificate for 127.0.0.1, by Java's own tool."""
    keystore = folder / "keystore.p12"
    keytool = ["keytool", "-keystore", str(keystore), "-storepass", PASSWORD, "-alias", "broker"]
    make = ["-genkeypair", "-keyalg", "EC", "-validity", "30", "-dname", "CN=127.0.0.1"]
    for command in (
        [*keytool, *make, "-ext", "SAN=IP:127.0.0.1", "-storetype", "PKCS12"],
        [*keytool, "-exportcert", "-rfc", "-file", str(ca_file)],
    ):
        subprocess.run(command, check=True, capture_output=True)
    return keystore


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
