"""docker-compose.yml, as far as it can be judged where there is no Docker: its form, and what it tells the updater."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from jsonschema import Draft7Validator

from consumers.kafka_topics import TopicFacts, inspect_topic, topic_warnings
from notellm.settings import KafkaSettings, Settings, load_settings, variable_names
from tests.conftest import REPOSITORY
from tests.deploy.compose_file import COMPOSE_FILE, compose_file, variables
from tests.support.kafka_server import KafkaServer

COMPOSE = compose_file()
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
UPDATERS = ["updater", "updater-gpu"]
# They end when they have done their work.
ONE_SHOT = {"topics"}
# Their images have no user of their own; docker-compose.yml says more.
ROOT = {"etcd", "minio", "milvus"}

every_service = pytest.mark.parametrize("name", SERVICES)
every_updater = pytest.mark.parametrize("name", UPDATERS)


@pytest.fixture
def settings_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """What ``notellm update`` reads in a service's container."""

    def load(name: str, **environment: str) -> Settings:
        for variable, value in compose_file(environment)["services"][name]["environment"].items():
            monkeypatch.setenv(variable, value)
        monkeypatch.chdir(tmp_path)
        return load_settings()

    return load


def test_it_is_a_compose_file() -> None:
    schema = json.loads((Path(__file__).parent / "compose-spec.json").read_text("utf-8"))
    Draft7Validator.check_schema(schema)
    faults = [f"{fault.json_path}: {fault.message}" for fault in Draft7Validator(schema).iter_errors(COMPOSE)]
    assert faults == []


def test_the_schema_finds_faults() -> None:
    schema = json.loads((Path(__file__).parent / "compose-spec.json").read_text("utf-8"))
    broken = compose_file()
    broken["services"]["kafka"]["retart"] = "always"
    broken["services"]["updater"]["depends_on"]["kafka"] = {"condition": "service_green"}
    assert len(list(Draft7Validator(schema).iter_errors(broken))) >= 2


def test_every_variable_has_one_default_and_the_example_file_has_it_too() -> None:
    found = variables()
    assert {name: len(defaults) for name, defaults in found.items()} == dict.fromkeys(found, 1)
    lines = (REPOSITORY / ".env.example").read_text("utf-8").splitlines()
    example = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    assert example == {name: default for name, (default,) in found.items()}


def test_secrets_have_defaults_that_say_what_they_are_for() -> None:
    secrets = {name: defaults for name, defaults in variables().items() if "PASSWORD" in name or "SECRET" in name}
    assert len(secrets) == 2
    assert set().union(*secrets.values()) == {"for-development-only"}
    for service in SERVICES.values():
        for variable, value in service.get("environment", {}).items():
            if re.search("PASSWORD|SECRET|TOKEN", variable):
                assert value.removeprefix("root:") == "for-development-only", variable


@every_service
def test_image_has_an_exact_tag(name: str) -> None:
    image, _, tag = SERVICES[name]["image"].rpartition(":")
    assert image
    assert re.search(r"\d+\.\d+\.\d+|RELEASE\.\d{4}-\d\d-\d\d", tag), f"{SERVICES[name]['image']} may change under us"


@every_service
def test_ports_are_for_this_machine_only(name: str) -> None:
    for port in SERVICES[name].get("ports", []):
        assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port), f"{name}: {port} is open to the network"
    assert SERVICES[name].get("network_mode") is None


def test_no_two_services_publish_the_same_port() -> None:
    ports = [port.rsplit(":", 1)[0] for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(set(ports)) == len(ports)


@every_service
def test_no_service_has_more_rights_than_it_needs(name: str) -> None:
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    for right in ("privileged", "cap_add", "pid", "ipc", "devices", "userns_mode"):
        assert right not in service
    assert (service["user"] in ("0", "0:0", "root")) == (name in ROOT)
    assert service["user"] != ""


@every_service
def test_service_lives_with_the_machine(name: str) -> None:
    service = SERVICES[name]
    if name in ONE_SHOT:
        assert service["restart"] == "no"
        assert service["healthcheck"] == {"disable": True}
    else:
        assert service["restart"] == "unless-stopped"
        assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")
        assert {"interval", "timeout", "start_period", "retries"} <= set(service["healthcheck"])
    assert service["logging"]["options"] == {"max-size": "10m", "max-file": "3"}
    assert re.fullmatch(r"\d+[mg]", service["deploy"]["resources"]["limits"]["memory"])


@every_service
def test_what_a_service_names_is_there(name: str) -> None:
    service = SERVICES[name]
    for other, how in service.get("depends_on", {}).items():
        assert other in SERVICES
        ends = other in ONE_SHOT
        assert how == {"condition": "service_completed_successfully" if ends else "service_healthy"}
    for volume in service.get("volumes", []):
        if isinstance(volume, str):
            assert volume.split(":")[0] in COMPOSE["volumes"]
    for network in service.get("networks", []):
        assert network in COMPOSE["networks"]


def test_every_volume_and_network_is_used() -> None:
    volumes = {
        v.split(":")[0] for service in SERVICES.values() for v in service.get("volumes", []) if isinstance(v, str)
    }
    assert volumes == set(COMPOSE["volumes"])
    networks = {n for service in SERVICES.values() for n in service.get("networks", ["default"])}
    assert networks == set(COMPOSE["networks"])


@every_updater
def test_its_variables_are_settings_and_their_values_allowed(name: str, settings_of: Any) -> None:
    environment = SERVICES[name]["environment"]
    assert set(environment) <= set(variable_names().values())
    settings = settings_of(name, MILVUS_ROOT_PASSWORD="correct horse")
    assert settings.kafka.bootstrap_servers == "kafka:19092"
    assert settings.milvus.token.get_secret_value() == "root:correct horse"
    assert settings.encoder.provider == {"updater": "cpu", "updater-gpu": "cuda"}[name]


@every_updater
def test_it_reaches_what_the_other_services_offer(name: str, settings_of: Any) -> None:
    settings = settings_of(name)
    assert (
        f"INTERNAL://{settings.kafka.bootstrap_servers}"
        in SERVICES["kafka"]["environment"]["KAFKA_ADVERTISED_LISTENERS"]
    )
    host, port = settings.milvus.uri.removeprefix("http://").split(":")
    assert SERVICES["milvus"]["ports"][0].endswith(f":{port}")
    assert "default" in SERVICES[host]["networks"]
    milvus = SERVICES["milvus"]["environment"]
    assert milvus["COMMON_SECURITY_AUTHORIZATIONENABLED"] == "true"
    assert settings.milvus.token.get_secret_value() == f"root:{milvus['COMMON_SECURITY_DEFAULTROOTPASSWORD']}"
    minio = SERVICES["minio"]["environment"]
    assert milvus["MINIO_ACCESS_KEY_ID"] == minio["MINIO_ROOT_USER"]
    assert milvus["MINIO_SECRET_ACCESS_KEY"] == minio["MINIO_ROOT_PASSWORD"]


@every_updater
def test_it_is_looked_at_where_it_listens(name: str, settings_of: Any) -> None:
    operations = settings_of(name).operations
    assert operations.host == "0.0.0.0", "a container's loopback cannot be published"
    command = SERVICES[name]["healthcheck"]["test"]
    assert command[:3] == ["CMD", "python", "-c"]
    compile(command[3], "healthcheck", "exec")
    assert f"'127.0.0.1', {operations.port}" in command[3]
    assert SERVICES[name]["ports"][0].endswith(f":{operations.port}")


@every_updater
def test_it_may_write_to_tmp_alone(name: str, settings_of: Any) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert [mount.split(":")[0] for mount in service["tmpfs"]] == ["/tmp"]
    (bundle,) = service["volumes"]
    assert bundle["target"] == str(settings_of(name).encoder.bundle)
    assert bundle["read_only"] is True
    assert bundle["bind"] == {"create_host_path": False}, "an empty bundle would be made, and be root's"
    assert service["user"] == "10001:10001"


def test_the_bundle_is_the_one_that_make_makes() -> None:
    assert variables()["BUNDLE"] == {"./build/bundles/default"}
    assert "BUNDLE := build/bundles/default" in (REPOSITORY / "Makefile").read_text("utf-8")


@every_updater
def test_it_may_finish_what_is_in_flight(name: str, settings_of: Any) -> None:
    grace_s = int(SERVICES[name]["stop_grace_period"].removesuffix("s"))
    # The drain, and then the end of each of the two stages.
    assert grace_s > 3 * settings_of(name).updater.drain_timeout_s
    assert SERVICES[name]["init"] is True


@every_updater
def test_it_is_built_from_this_project(name: str) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    extra = SERVICES[name]["build"]["args"]["EXTRA"]
    assert extra in project["optional-dependencies"]
    assert SERVICES[name]["image"] == f"notellm-updater:{project['version']}-{extra}"


def test_the_gpu_is_asked_for_only_by_its_own_profile() -> None:
    with_gpu = {name for name, service in SERVICES.items() if "reservations" in service["deploy"]["resources"]}
    assert with_gpu == {name for name, service in SERVICES.items() if service.get("profiles") == ["gpu"]}
    assert with_gpu == {"updater-gpu"}


def topics_made(folder: Path) -> dict[str, tuple[int, dict[str, str]]]:
    """Runs the one-shot's script with tools that write down what they are told: topic -> (partitions, settings)."""
    told = folder / "told"
    for tool in ("kafka-topics.sh", "kafka-configs.sh"):
        script = folder / tool
        script.write_text(f"#!/bin/bash\nprintf '%s\\n' {tool} \"$@\" end >> {told}\n")
        script.chmod(0o755)
    service = SERVICES["topics"]
    (command,) = service["command"]
    subprocess.run(
        [*service["entrypoint"], command.replace("/opt/kafka/bin", str(folder))],
        env={"PATH": os.environ["PATH"], **service["environment"]},
        check=True,
        timeout=30,
    )
    made: dict[str, tuple[int, dict[str, str]]] = {}
    for call in told.read_text().removesuffix("end\n").split("\nend\n"):
        tool, *arguments = call.splitlines()
        flags = {a: b for a, b in zip(arguments, [*arguments[1:], ""], strict=True) if a.startswith("--")}
        assert flags["--bootstrap-server"] == "kafka:19092"
        if tool == "kafka-topics.sh":
            assert {"--create", "--if-not-exists"} <= set(flags)
            made[flags["--topic"]] = (int(flags["--partitions"]), {})
        else:
            assert (flags["--alter"], flags["--entity-type"]) == ("--entity-type", "topics")
            made[flags["--entity-name"]][1].update(pair.split("=") for pair in flags["--add-config"].split(","))
    return made


def test_the_topics_are_as_the_updater_wants_them(tmp_path: Path, settings_of: Any) -> None:
    kafka = settings_of("updater").kafka
    made = topics_made(tmp_path)
    assert set(made) == {kafka.notes_topic, kafka.dead_letter_topic}
    for topic, (partitions, config) in made.items():
        facts = TopicFacts(
            topic,
            partitions,
            cleanup_policy=config["cleanup.policy"],
            delete_retention_ms=int(config.get("delete.retention.ms", 86_400_000)),
            retention_ms=int(config.get("retention.ms", -1)),
        )
        assert topic_warnings(kafka, facts) == []
        assert facts.compacted is (topic == kafka.notes_topic)
    partitions, config = made[kafka.notes_topic]
    assert partitions == 12
    week_ms = 7 * 24 * 60 * 60 * 1000
    assert int(config["delete.retention.ms"]) >= week_ms
    # Kafka's own limit for a record; a dead letter carries one, and headers.
    assert int(made[kafka.dead_letter_topic][1]["max.message.bytes"]) > 1_048_588


@pytest.mark.integration
def test_a_real_kafka_takes_the_topics_settings(tmp_path: Path, kafka_server: KafkaServer) -> None:
    own = uuid4().hex[:8]
    kafka = KafkaSettings(
        bootstrap_servers=kafka_server.bootstrap_servers,
        notes_topic=f"notes-{own}",
        dead_letter_topic=f"notes.dead-letter-{own}",
    )
    for topic, (partitions, config) in topics_made(tmp_path).items():
        kafka_server.create_topic(f"{topic}-{own}", partitions, config)
        facts = inspect_topic(kafka, f"{topic}-{own}")
        assert facts.cleanup_policy == config["cleanup.policy"]
        assert topic_warnings(kafka, facts) == []


def test_the_file_says_how_it_is_used() -> None:
    """What its head and docs/operations.md name exists."""
    guide = (REPOSITORY / "docs" / "operations.md").read_text("utf-8")
    for page in (COMPOSE_FILE.read_text("utf-8"), guide):
        for named in re.findall(r"docker compose [^\n`#]*?(updater[\w-]*)", page):
            assert named in SERVICES
