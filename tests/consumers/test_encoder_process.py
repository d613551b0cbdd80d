"""The encoder's process against notes that kill it: they are found, their neighbours are encoded."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from consumers.encoder_process import EncoderProcess
from consumers.errors import EncoderUnavailable, Stopped, UpdaterError
from consumers.in_memory import HashEncoder
from notellm.errors import EncoderError, NoteRefused
from notellm.messages import Note
from tests.conftest import REPOSITORY
from tests.support.encoders import HOSTILE


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("TEST_MARKER", str(tmp_path / "segfaulted once"))


def process(arguments: dict[str, Any] | None = None, **options: Any) -> EncoderProcess:
    return EncoderProcess(HOSTILE, arguments or {}, **options)


@pytest.fixture
def encoder() -> Iterator[EncoderProcess]:
    with process() as started:
        yield started


def notes(*titles: str) -> list[Note]:
    return [Note(note_id=f"n{number}", title=title, published_at=1) for number, title in enumerate(titles)]


def encode(encoder: EncoderProcess, given: Sequence[Note]) -> dict[int, str]:
    """By index, the titles of notes that came back embedded and tagged, each checked against the encoder in here."""
    prompts = encoder.build_prompts(given)
    here = HashEncoder()
    embedded: set[int] = set()
    tagged: dict[int, str] = {}
    for batch in encoder.stream(prompts):
        for place, index in enumerate(batch.indices):
            np.testing.assert_array_equal(batch.embeddings[place], here.embed(prompts[index].text))
            if batch.tags is None:
                embedded.add(index)
            else:
                assert index in embedded, "the vector comes first"
                assert index not in tagged, "and the tags once"
                tagged[index] = given[index].title
    return tagged


def encode_what_can_be(encoder: EncoderProcess, given: Sequence[Note]) -> tuple[set[str], dict[str, str]]:
    """As the encode stage does: a refused note is taken off and the rest tried again."""
    left, done, refused = list(given), set[str](), dict[str, str]()
    while left:
        found: dict[int, str] = {}
        try:
            prompts = encoder.build_prompts(left)
            for batch in encoder.stream(prompts):
                if batch.tags is not None:
                    found.update({index: left[index].note_id for index in batch.indices})
            done.update(found.values())
            return done, refused
        except NoteRefused as error:
            refused[left[error.index].note_id] = str(error)
            done.update(found.values())
            left = [note for note in left if note.note_id not in done | refused.keys()]
    return done, refused


def test_it_encodes_as_the_encoder_in_this_process_does(encoder: EncoderProcess) -> None:
    titles = [f"title {number}" for number in range(20)]
    assert encoder.model_version == HashEncoder().model_version
    assert encoder.embedding_dim == 8
    assert encode(encoder, notes(*titles)) == dict(enumerate(titles))
    assert encode(encoder, []) == {}


@pytest.mark.parametrize(
    ("title", "reason"),
    [
        ("segfault", "was killed by SIGSEGV, twice over this note alone"),
        ("kill the tokenizer", "was killed by SIGSEGV, twice over this note alone"),
        ("raise", "failed: RuntimeError: CUDA error: an illegal memory access was encountered, twice"),
        ("refuse", "no, thank you"),
    ],
)
def test_the_note_to_blame_is_found_and_its_neighbours_are_encoded(
    encoder: EncoderProcess, title: str, reason: str
) -> None:
    given = notes(*[title if number == 5 else f"title {number}" for number in range(12)])
    done, refused = encode_what_can_be(encoder, given)
    assert list(refused) == ["n5"]
    assert reason in refused["n5"]
    assert done == {note.note_id for note in given} - {"n5"}


def test_a_note_that_takes_all_memory_meets_the_process_own_limit() -> None:
    with process(memory_limit_mb=1024) as encoder:
        done, refused = encode_what_can_be(encoder, notes("a", "take all memory", "c"))
    assert list(refused) == ["n1"]
    assert "MemoryError" in refused["n1"]
    assert done == {"n0", "n2"}


def test_a_note_that_hangs_is_found_by_the_time_it_takes() -> None:
    with process(answer_timeout_s=0.5) as encoder:
        done, refused = encode_what_can_be(encoder, notes("hang", "b"))
    assert list(refused) == ["n0"]
    assert "did not answer" in refused["n0"]
    assert done == {"n1"}


def test_a_crash_that_does_not_come_again_costs_nobody_a_note(encoder: EncoderProcess) -> None:
    before = restarts("SIGSEGV")
    assert encode(encoder, notes("segfault once")) == {0: "segfault once"}
    assert restarts("SIGSEGV") == before + 1


def test_killed_from_outside_while_idle_it_is_back_for_the_next_note(encoder: EncoderProcess) -> None:
    assert encoder.ready
    assert encoder.pid is not None
    os.kill(encoder.pid, signal.SIGKILL)
    while encoder.ready:
        time.sleep(0.01)
    assert encode(encoder, notes("a", "b")) == {0: "a", 1: "b"}
    assert encoder.ready


def test_a_vector_that_came_before_the_crash_is_not_told_twice(encoder: EncoderProcess) -> None:
    prompts = encoder.build_prompts(notes("a", "segfault at the tags"))
    told: list[int] = []

    def listen() -> None:
        for batch in encoder.stream(prompts):
            told.extend(batch.indices if batch.tags is None else [])

    with pytest.raises(NoteRefused) as refused:
        listen()
    assert refused.value.index == 1
    assert told == [0, 1]


def test_a_stream_that_was_left_leaves_nothing_behind(encoder: EncoderProcess) -> None:
    prompts = encoder.build_prompts(notes(*[f"title {number}" for number in range(40)]))
    left_open = encoder.stream(prompts)
    next(left_open)
    assert encode(encoder, notes("a", "b")) == {0: "a", 1: "b"}
    del left_open
    gc.collect()
    assert encode(encoder, notes("c")) == {0: "c"}


@given(st.lists(st.sampled_from(["fine", "fine", "fine", "segfault", "refuse"]), max_size=10))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_the_mix_only_the_notes_to_blame_are_refused(encoder: EncoderProcess, titles: list[str]) -> None:
    given = notes(*titles)
    done, refused = encode_what_can_be(encoder, given)
    assert set(refused) == {note.note_id for note in given if note.title != "fine"}
    assert done == {note.note_id for note in given if note.title == "fine"}


def test_a_model_that_cannot_be_loaded_says_why_at_the_first_start(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.touch()
    with pytest.raises(EncoderError, match=r"^bundle: its disk is away$"), process({"broken_while": str(broken)}):
        pass


def test_a_model_that_cannot_be_loaded_again_refuses_no_note(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    with process({"broken_while": str(broken)}) as encoder:
        broken.touch()
        with pytest.raises(EncoderUnavailable, match="its disk is away"):
            encode(encoder, notes("a", "segfault"))
        assert not encoder.ready
        broken.unlink()
        assert encode(encoder, notes("a")) == {0: "a"}


def test_a_model_that_is_broken_for_every_note_refuses_none() -> None:
    """It does not get past the harmless note that it has to encode first."""
    with process() as encoder:
        encoder._command[1] = '{"seconds_per_note": "not a number"}'
        assert encoder.pid is not None
        os.kill(encoder.pid, signal.SIGKILL)
        with pytest.raises(EncoderUnavailable, match="TypeError"):
            encode(encoder, notes("a"))


def test_another_model_in_the_same_place_ends_the_updater(encoder: EncoderProcess) -> None:
    encoder._command[1] = '{"model_version": "another"}'
    assert encoder.pid is not None
    os.kill(encoder.pid, signal.SIGKILL)
    with pytest.raises(UpdaterError, match="0123456789abcdef and is now another"):
        encode(encoder, notes("a"))


def test_closing_it_ends_a_call_that_waits() -> None:
    errors: list[Exception] = []
    with process() as encoder:
        prompts = encoder.build_prompts(notes("hang"))
        pid = encoder.pid

        def stream() -> None:
            try:
                list(encoder.stream(prompts))
            except Exception as error:  # noqa: BLE001 - looked at below
                errors.append(error)

        thread = threading.Thread(target=stream)
        thread.start()
        time.sleep(0.3)
    thread.join(5)
    assert not thread.is_alive()
    assert [type(error) for error in errors] == [Stopped]
    assert pid is not None
    assert not Path(f"/proc/{pid}").exists()


def test_it_ends_with_the_updater(encoder: EncoderProcess) -> None:
    """Whose end closes its side of the connection, even by kill -9."""
    assert encoder._connection is not None
    assert encoder._process is not None
    encoder._connection.close()
    assert encoder._process.wait(5) == 0


def test_its_memory_is_among_the_metrics(encoder: EncoderProcess) -> None:
    resident = REGISTRY.get_sample_value("notellm_encoder_process_resident_memory_bytes")
    assert resident is not None
    assert resident > 10e6
    assert REGISTRY.get_sample_value("notellm_encoder_ready") == 1
    encoder.close()
    assert REGISTRY.get_sample_value("notellm_encoder_ready") == 0
    assert REGISTRY.get_sample_value("notellm_encoder_process_resident_memory_bytes") is None


def restarts(cause: str) -> float:
    return REGISTRY.get_sample_value("notellm_encoder_restarts_total", {"cause": cause}) or 0.0
