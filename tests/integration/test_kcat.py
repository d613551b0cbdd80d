"""A stranger's client: kcat shares no code with ours, plain MilvusClient knows nothing of us."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from pymilvus import MilvusClient

from notellm.encoder import NoteEncoder
from notellm.messages import Note
from tests.conftest import missing
from tests.support.processes import CommandProcess, wait_until

pytestmark = pytest.mark.integration


@pytest.fixture
def kcat() -> str:
    found = shutil.which("kcat")
    if found is None:
        missing("kcat is not installed (Debian: apt-get install kcat)")
    return str(found)


def produce(kcat: str, brokers: str, lines: bytes, *options: str) -> None:
    command = [kcat, "-P", "-b", brokers, "-t", "notes", "-X", "partitioner=murmur2_random", *options]
    subprocess.run(command, input=lines, check=True, timeout=30)


def consume_dead_letters(kcat: str, brokers: str) -> list[dict[str, Any]]:
    command = [kcat, "-C", "-b", brokers, "-t", "notes.dead-letter", "-o", "beginning", "-e", "-q", "-J"]
    done = subprocess.run(command, capture_output=True, check=True, timeout=60)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_notes_from_kcat_are_found_with_a_plain_client(tmp_path: Path, tiny_bundle: Path, kcat: str) -> None:
    dev = CommandProcess(tmp_path / "dev.log", "dev", "--data", str(tmp_path / "dev"), "--bundle", str(tiny_bundle))
    try:
        dev.wait_for("assigned 0 from")
        env = dict(
            line.removeprefix("export ").split("=", 1) for line in (tmp_path / "dev" / "env").read_text().splitlines()
        )
        brokers, milvus = env["NOTELLM_KAFKA_BOOTSTRAP_SERVERS"], env["NOTELLM_MILVUS_URI"]
        notes = {
            f"k{number}": {"note_id": f"k{number}", "title": f"kcat says {number}", "hashtags": ["kcat"]}
            for number in range(8)
        }
        lines = b"".join(f"{key}|{json.dumps(note)}\n".encode() for key, note in notes.items())
        produce(kcat, brokers, lines, "-K", "|")
        produce(kcat, brokers, b"k3|\n", "-K", "|", "-Z")
        produce(kcat, brokers, b'k4|{"note_id": "k4", "title"\n', "-K", "|")
        produce(kcat, brokers, b'{"note_id": "k9", "title": "no key"}\n')

        client = MilvusClient(milvus, timeout=10)
        live = set(notes) - {"k3"}
        wait_until(lambda: found_ids(client) == live and tagged(client), "the live notes, tagged, and no others")
        encoder = NoteEncoder.load(tiny_bundle, threads=1)
        for note_id in sorted(live):
            query = encoder.encode([Note(**notes[note_id])], embed_only=True)[0].embedding  # type: ignore[arg-type]
            hits = client.search("notes", data=[query.tolist()], limit=1, output_fields=["title"])[0]
            assert hits[0].id == note_id
            assert hits[0].get("title") == notes[note_id]["title"]

        wait_until(lambda: len(consume_dead_letters(kcat, brokers)) == 2, "two dead letters")
        letters = {letter["key"]: letter for letter in consume_dead_letters(kcat, brokers)}
        assert letters["k4"]["payload"] == '{"note_id": "k4", "title"'
        headers = headers_of(letters["k4"])
        assert headers["__connect.errors.topic"] == "notes"
        assert headers["__connect.errors.stage"] == "VALUE_CONVERTER"
        assert "JSON" in headers["__connect.errors.exception.message"]
        assert headers["notellm.reason"] == "not_json"
        assert headers["notellm.model_version"] == encoder.model_version
        assert headers_of(letters[None])["notellm.reason"] == "no_key"
    finally:
        assert dev.stop() == 0, dev.text()


def found_ids(client: MilvusClient) -> set[str]:
    if not client.has_collection("notes"):
        return set()
    return {str(row["note_id"]) for row in client.query("notes", filter='note_id != ""', output_fields=["note_id"])}


def tagged(client: MilvusClient) -> bool:
    return not client.query("notes", filter='text_hash == ""', output_fields=["note_id"])


def headers_of(letter: dict[str, Any]) -> dict[str, str]:
    flat = letter["headers"]
    return dict(zip(flat[::2], flat[1::2], strict=True))
