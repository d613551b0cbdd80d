"""publish, similar and embed against a running ``notellm dev``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from pymilvus import MilvusClient

from commands.embedded import free_port
from notellm.bundle import ParityReport, ParityRow, read_manifest, record_parity
from tests.conftest import REPOSITORY
from tests.support.pipeline import short_notes
from tests.support.processes import CommandProcess, run_command, wait_until

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path) -> Iterator[dict[str, str]]:
    """``notellm dev`` with 20 notes; yields the environment for other commands."""
    folder = tmp_path_factory.mktemp("dev")
    process = CommandProcess(folder / "log", "dev", "--data", str(folder / "dev"), "--bundle", str(tiny_bundle))
    try:
        process.wait_for("assigned 0 from")
        lines = (folder / "dev" / "env").read_text().splitlines()
        env = dict(line.removeprefix("export ").split("=", 1) for line in lines)
        env["NOTELLM_ENCODER_BUNDLE"] = str(tiny_bundle)
        notes = folder / "notes.jsonl"
        notes.write_bytes(b"".join(json.dumps(as_json(note)).encode() + b"\n" for note in short_notes(20)))
        done = run_command("publish", str(notes), env=env)
        assert done.returncode == 0, done.stderr
        wait_until(lambda: settled(env) == 20, "20 rows with tags")
        yield env
    finally:
        assert process.stop() == 0, process.text()


def as_json(note: object) -> dict[str, object]:
    return {name: getattr(note, name) for name in ("note_id", "title", "content", "hashtags", "category", "attributes")}


def settled(env: dict[str, str]) -> int:
    client = MilvusClient(env["NOTELLM_MILVUS_URI"])
    if not client.has_collection("notes"):
        return 0
    count = client.query("notes", filter='text_hash != ""', output_fields=["count(*)"])[0]["count(*)"]
    client.close()
    return int(count)


def test_similar_by_id_leaves_the_note_itself_out(dev: dict[str, str]) -> None:
    done = run_command("similar", "note-0003", "--limit", "4", "--json", env=dev)
    assert done.returncode == 0, done.stderr
    hits = json.loads(done.stdout)
    assert len(hits) == 4
    assert "note-0003" not in {hit["note_id"] for hit in hits}
    similarities = [hit["similarity"] for hit in hits]
    assert similarities == sorted(similarities, reverse=True)
    assert {"title", "category", "hashtags", "generated_hashtags", "generated_category"} <= set(hits[0])


def test_similar_by_id_obeys_a_filter(dev: dict[str, str]) -> None:
    where = 'attributes["author_id"] == "a1"'
    done = run_command("similar", "note-0003", "--json", "--filter", where, env=dev)
    assert {hit["note_id"] for hit in json.loads(done.stdout)} == {"note-0001", "note-0008", "note-0015"}


def test_similar_by_text_finds_the_note_with_that_text(dev: dict[str, str]) -> None:
    note = short_notes(20)[0]
    done = run_command("similar", "--text", note.content, "--limit", "20", env=dev)
    assert done.returncode == 0, done.stderr
    assert "note-0000" in done.stdout
    assert note.title in done.stdout


def test_embed_gives_the_stored_vector(dev: dict[str, str]) -> None:
    note = short_notes(20)[5]
    done = run_command("embed", note.content, "--title", note.title, "--hashtag", note.hashtags[0], env=dev)
    answer = json.loads(done.stdout)
    client = MilvusClient(dev["NOTELLM_MILVUS_URI"])
    row = client.query("notes", filter='note_id == "note-0005"', output_fields=["embedding", "model_version"])[0]
    client.close()
    assert answer["model_version"] == row["model_version"]
    assert answer["embedding"] == pytest.approx(row["embedding"], abs=1e-4)


def test_similar_refuses_another_models_bundle(dev: dict[str, str], other_bundle: Path) -> None:
    done = run_command("similar", "--text", "anything", "--bundle", str(other_bundle), env=dev)
    assert done.returncode == 1
    assert "vectors of two models cannot be compared" in done.stderr


def test_similar_says_what_is_not_there(dev: dict[str, str]) -> None:
    done = run_command("similar", 'no"such', env=dev)
    assert done.returncode == 1
    assert "is not in 'notes'" in done.stderr
    assert "Traceback" not in done.stderr


def test_publish_names_lines_that_are_no_notes_and_publishes_the_rest(dev: dict[str, str]) -> None:
    lines = b'{"note_id": "p1", "title": "good"}\n{"note_id": "p2", "title": 7}\nnonsense\n{"title": "no id"}\n'
    done = run_command("publish", "-", env=dev, stdin=lines)
    assert done.returncode == 1
    assert "line 2 left out: title: Expected `str`, got `int`" in done.stderr
    assert "line 3 left out: value: not UTF-8 JSON" in done.stderr
    assert "line 4 left out: note_id: missing" in done.stderr
    wait_until(lambda: settled(dev) == 21, "the good line's row")
    gone = run_command("publish", "--delete", "p1", env=dev)
    assert gone.returncode == 0
    wait_until(lambda: settled(dev) == 20, "its deletion")


def test_publish_needs_something_to_publish() -> None:
    done = run_command("publish")
    assert done.returncode == 1
    assert "FILE: missing" in done.stderr


def test_publish_names_what_it_cannot_reach_or_read(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    away = run_command("publish", "data/notes.jsonl", "--kafka", address, cwd=REPOSITORY)
    assert away.returncode == 1
    assert f"kafka.bootstrap_servers: '{address}' cannot be reached" in away.stderr
    assert "Traceback" not in away.stderr
    unreadable = run_command("publish", str(tmp_path / "nowhere.jsonl"), "--kafka", address)
    assert unreadable.returncode == 1
    assert "nowhere.jsonl cannot be read: No such file" in unreadable.stderr


def test_check_settles_a_parity_that_was_unproven(tmp_path: Path, tiny_bundle: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    record_parity(bundle, ParityReport("cpu", [], "unproven"))
    done = run_command("check", "--bundle", str(bundle), "--kafka", "127.0.0.1:1", "--milvus", "http://127.0.0.1:1")
    assert "proven on cpu" in done.stdout
    report = read_manifest(bundle).parity_on("cpu")
    assert report is not None
    assert report.passed
    assert len(report.rows) > 3


def test_check_finds_a_bundle_that_is_not_its_checkpoint_any_more(tmp_path: Path, tiny_bundle: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    record_parity(bundle, ParityReport("cpu", [ParityRow("embeddings", 0.5, 1e-5, passed=False)]))
    done = run_command("check", "--bundle", str(bundle), "--kafka", "127.0.0.1:1", "--milvus", "http://127.0.0.1:1")
    assert "not within its bounds on cpu: embeddings: 0.5; export it again" in done.stdout
