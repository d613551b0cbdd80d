"""Whatever is wrong, ``check`` and an updater told to run say it in one clear line, and never with a traceback."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from pymilvus import DataType, MilvusClient

from commands.embedded import EmbeddedKafka, MilvusLite, free_port
from notellm.bundle import read_manifest
from tests.support.processes import CommandProcess, run_command

pytestmark = pytest.mark.integration


@dataclass
class Setup:
    """A setup in which an updater would run, for one thing to be broken in it."""

    folder: Path
    kafka: str
    milvus: MilvusLite
    bundle: Path
    env: dict[str, str] = field(default_factory=dict)

    @property
    def options(self) -> list[str]:
        return ["--kafka", self.kafka, "--milvus", self.milvus.uri, "--bundle", str(self.bundle)]


@pytest.fixture
def setup(tmp_path: Path, embedded_kafka: EmbeddedKafka, milvus_lite: MilvusLite, tiny_bundle: Path) -> Setup:
    env = {"NOTELLM_MILVUS_TIMEOUT_S": "3"}
    return Setup(tmp_path, embedded_kafka.bootstrap_servers, milvus_lite, tiny_bundle, env)


def no_bundle(setup: Setup) -> list[str]:
    setup.bundle = setup.folder / "nowhere"
    return [f"bundle {setup.bundle}", "no notellm.json there", "export/to_onnx.py"]


def damaged_bundle(setup: Setup) -> list[str]:
    copy = setup.folder / "damaged"
    shutil.copytree(setup.bundle, copy)
    weights = copy / "model.onnx.data"
    weights = weights if weights.exists() else copy / "model.onnx"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    setup.bundle = copy
    return [f"{weights.name} is damaged", "export it again"]


def kafka_away(setup: Setup) -> list[str]:
    setup.kafka = f"127.0.0.1:{free_port()}"
    return ["kafka.bootstrap_servers", setup.kafka, "cannot be reached"]


def milvus_away(setup: Setup) -> list[str]:
    setup.milvus.stop()
    return ["milvus.uri", setup.milvus.uri, "cannot be reached"]


def wrong_dimension(setup: Setup) -> list[str]:
    version = read_manifest(setup.bundle).model_version
    client = MilvusClient(setup.milvus.uri)
    schema = client.create_schema()
    schema.add_field("note_id", DataType.VARCHAR, max_length=64, is_primary=True)
    schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=3)
    properties = {"notellm.model_version": version, "notellm.fill": "00000000"}
    client.create_collection(f"notes_{version}", schema=schema, properties=properties)
    client.close()
    return [f"collection notes_{version}", "its dimension is 3", "drop it, or choose another"]


def wrong_model_version(setup: Setup) -> list[str]:
    version = read_manifest(setup.bundle).model_version
    client = MilvusClient(setup.milvus.uri)
    client.create_collection(f"notes_{version}", dimension=8)
    client.close()
    return [f"collection notes_{version}", "its model_version is", version, "drop it, or choose another"]


def unknown_setting(setup: Setup) -> list[str]:
    setup.env["NOTELLM_UPDATER_QUEUE_NOTE"] = "7"
    return ["NOTELLM_UPDATER_QUEUE_NOTE", "unknown setting"]


def wrong_setting(setup: Setup) -> list[str]:
    setup.env["NOTELLM_UPDATER_QUEUE_NOTES"] = "many"
    return ["updater.queue_notes", "'many'", "valid integer"]


def no_onnxruntime(setup: Setup) -> list[str]:
    """An onnxruntime.py that cannot be imported stands in front of the real one."""
    (setup.folder / "without").mkdir()
    (setup.folder / "without" / "onnxruntime.py").write_text("raise ImportError('not installed')\n")
    setup.env["PYTHONPATH"] = str(setup.folder / "without")
    return ["onnxruntime is not installed", "notellm[cpu]", "notellm[gpu]"]


FAULTS = [
    no_bundle, damaged_bundle, kafka_away, milvus_away, wrong_dimension, wrong_model_version, unknown_setting,
    wrong_setting, no_onnxruntime,
]  # fmt: skip


@pytest.mark.parametrize("command", ["check", "update"])
@pytest.mark.parametrize("break_it", FAULTS, ids=lambda fault: fault.__name__)
def test_one_clear_line(setup: Setup, break_it: Callable[[Setup], list[str]], command: str) -> None:
    expected = break_it(setup)
    done = run_command(command, *setup.options, env=setup.env, seconds=90)
    output = done.stdout + done.stderr
    assert done.returncode == 1, output
    assert "Traceback" not in output
    naming = [line for line in output.splitlines() if all(words in line for words in expected)]
    assert len(naming) == 1, f"{expected} not in one line of:\n{output}"


@pytest.mark.parametrize("command", ["check", "update"])
def test_second_writer_on_lite(setup: Setup, command: str) -> None:
    first = CommandProcess(setup.folder / "first.log", "update", *setup.options)
    try:
        first.wait_for("assigned 0 from")
        done = run_command(command, *setup.options, env=setup.env)
        output = done.stdout + done.stderr
        assert done.returncode == 1
        assert "Traceback" not in output
        line = next(line for line in output.splitlines() if "Milvus Lite" in line and "one writer" in line)
        assert str(first.pid) in line
    finally:
        assert first.stop() == 0


def test_all_is_well(setup: Setup) -> None:
    done = run_command("check", *setup.options, env=setup.env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAULT" not in done.stdout
