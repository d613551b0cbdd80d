"""How many notes go through the model at a time: never more than fit, and a line where not even two do."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training import memory
from training.errors import TrainingError
from training.memory import bytes_per_note, free_bytes, notes_that_fit

CONFIG = SimpleNamespace(
    hidden_size=10, num_hidden_layers=3, intermediate_size=20, num_attention_heads=2, vocab_size=100
)
# One layer of one token: 20 * 10 + 8 * 20 + 4 * 2 * 7 tokens = 416 numbers. Logits: 3 * 48 * 100 floats.
LAYER, LOGITS = 416, 57_600


def test_a_note_needs_every_layer_or_with_checkpointing_one_and_the_seams() -> None:
    assert bytes_per_note(CONFIG, 7, checkpointing=False, bytes_per_number=4) == 7 * 3 * LAYER * 4 + LOGITS
    assert bytes_per_note(CONFIG, 7, checkpointing=True, bytes_per_number=4) == 7 * (3 * 10 + LAYER) * 4 + LOGITS
    assert bytes_per_note(CONFIG, 7, checkpointing=False, bytes_per_number=2) == 7 * 3 * LAYER * 2 + LOGITS


@settings(deadline=None)
@given(per_note=st.integers(1, 10**10), free=st.integers(0, 10**12), batch=st.integers(4, 100_000))
def test_what_goes_through_fits_into_what_is_free_with_room_to_spare(per_note: int, free: int, batch: int) -> None:
    try:
        fit = notes_that_fit(per_note, free, batch)
    except TrainingError:
        # There was no room for four.
        assert 4 * per_note > free
        return
    assert 2 <= fit <= batch
    assert fit * per_note <= 0.8 * free
    assert fit == batch or (fit + 1) * per_note > 0.5 * free


def test_where_two_do_not_fit_the_line_says_what_to_change() -> None:
    with pytest.raises(TrainingError) as caught:
        notes_that_fit(3_000_000_000, 4_100_000_000, 64)
    assert str(caught.value) == (
        "memory: a note needs about 3.0 GB and 4.1 GB are free; lower training.note_tokens, "
        'set training.gradient_checkpointing = true or training.method = "lora", or take a smaller base'
    )


def test_what_is_free_is_what_the_kernel_calls_available(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "meminfo"
    file.write_text("MemTotal:       16384256 kB\nMemFree:          700000 kB\nMemAvailable:    1234567 kB\n", "ascii")
    monkeypatch.setattr(memory, "_MEMINFO", file)
    assert free_bytes(torch.device("cpu")) == 1_234_567 * 1024
    file.unlink()
    assert free_bytes(torch.device("cpu")) == 8 * 2**30


def test_this_machine_has_some_and_not_more_than_all() -> None:
    everything = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < free_bytes(torch.device("cpu")) <= max(everything, 8 * 2**30)
