"""The set to try a machine with: 16 pairs that no text gives away."""

from __future__ import annotations

from pathlib import Path

from notellm.categories import default_categories
from notellm.settings import TrainingSettings
from training.smoke import SMOKE_SETTINGS, write_smoke_data
from training.training_data import read_training_data


def test_sixteen_pairs_of_which_no_two_share_a_note(tmp_path: Path) -> None:
    data = read_training_data(write_smoke_data(tmp_path / "new" / "folder"))
    pairs, notes = data.train.pairs, data.train.notes
    assert (len(pairs), pairs.skipped, len(notes), data.validation) == (16, 0, 32, None)
    assert sorted([*pairs.sources.tolist(), *pairs.targets.tolist()]) == list(range(32))


def test_every_note_can_be_told_from_the_others_and_asked_for_both_answers(tmp_path: Path) -> None:
    notes = read_training_data(write_smoke_data(tmp_path)).train.notes
    found = [notes.note(row) for row in range(len(notes))]
    assert len({note.title for note in found}) == 32
    assert all(note.hashtags and note.category in default_categories() for note in found)


def test_no_pair_shares_more_words_than_two_notes_that_are_none(tmp_path: Path) -> None:
    data = read_training_data(write_smoke_data(tmp_path)).train
    words = [{*data.notes.note(row).title.split(), *data.notes.note(row).hashtags} for row in range(32)]
    pairs = list(zip(data.pairs.sources.tolist(), data.pairs.targets.tolist(), strict=True))
    shared = sum(len(words[a] & words[b]) for a, b in pairs)
    # 6 of 64 words each: two notes drawn at random have about half a word in common, 16 pairs of them about 9.
    assert shared < 18


def test_it_is_always_the_same(tmp_path: Path) -> None:
    first, second = write_smoke_data(tmp_path / "a"), write_smoke_data(tmp_path / "b")
    assert read_training_data(first).sha256 == read_training_data(second).sha256


def test_its_settings_are_settings_of_a_training_and_a_batch_is_the_whole_set() -> None:
    chosen = TrainingSettings(**SMOKE_SETTINGS)
    assert chosen.batch_pairs == 16
    assert chosen.model_dump(include=set(SMOKE_SETTINGS)) == dict(SMOKE_SETTINGS)
