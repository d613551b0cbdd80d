"""Which notes a step learns from: always the same, by score, and no false negative among them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from notellm.messages import Note
from notellm.settings import TrainingSettings
from tests.training import formula
from tests.training.tiny_set import CATEGORIES, NOTES, pair_table, tiny_batches
from training.base_model import Base, load_base
from training.batches import PairBatch, PairBatches
from training.note_rows import NO_LABEL, NoteRow, RowBuilder, Task
from training.note_table import NoteTable

Pair = tuple[int, int]


class Told(RowBuilder):
    """Builds rows that say which note and task they are: a note's number, then one answer token where there is one."""

    def __init__(self) -> None:
        self.prefix_ids = [1]

    def row(self, note: Note, task: Task | None, draw: np.random.Generator) -> NoteRow:
        ids = [int(note.note_id.removeprefix("note-")), {"hashtags": 1, "category": 2, None: 3}[task]]
        return NoteRow(ids, 0, 2 if task is None else 1)


class Listed(NoteTable):
    """Columns give a note in a fraction of a millisecond, and there are tens of thousands of them to draw here."""

    def __init__(self, notes: list[Note]) -> None:
        self.rows = {note.note_id: row for row, note in enumerate(notes)}
        self._notes = notes

    def __len__(self) -> int:
        return len(self._notes)

    def note(self, row: int) -> Note:
        return self._notes[row]


def told(
    pairs: list[Pair], scores: list[float] | None = None, *, notes: list[Note] = NOTES, **given: Any
) -> PairBatches:
    more = {name: given.pop(name) for name in ("rank", "processes", "redraw_partners") if name in given}
    return PairBatches(
        Listed(notes), pair_table(pairs, scores, notes=len(notes)), Told(),
        TrainingSettings(**given), categories=frozenset(CATEGORIES), **more,
    )  # fmt: skip


def notes_of(batch: PairBatch) -> list[int]:
    return [int(number) for number in batch.rows.ids[:, 0]]


def pairs_of(batch: PairBatch) -> list[Pair]:
    notes = notes_of(batch)
    return list(zip(notes[0::2], notes[1::2], strict=True))


def tasks_of(batch: PairBatch) -> list[int]:
    return [int(task) for task in batch.rows.ids[:, 1]]


def equal(one: PairBatch, other: PairBatch) -> bool:
    tensors = [
        [batch.partner, batch.not_negative, *vars(batch.rows).values()] for batch in (one, other)
    ]  # fmt: skip
    same = all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))
    return same and (one.first, one.answer_tokens, one.tokens) == (other.first, other.answer_tokens, other.tokens)


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Base:
    return load_base(str(tiny_base))


class TestSeedAndStep:
    def test_decide_everything(self, base: Base) -> None:
        chosen = TrainingSettings(batch_pairs=4, steps=3, seed=3, held_back="some", category_hashtags=0.5)
        forwards, backwards = tiny_batches(base, chosen), tiny_batches(base, chosen)
        there = [forwards[step] for step in range(3)]
        back = [backwards[step] for step in reversed(range(3))][::-1]
        assert all(equal(one, other) for one, other in zip(there, back, strict=True))
        assert len(forwards) == 3

    def test_are_two_numbers_and_not_their_sum(self) -> None:
        drawn = {
            (seed, step): tuple(pairs_of(told([(n, n + 12) for n in range(12)], batch_pairs=6, seed=seed)[step]))
            for seed in range(4)
            for step in range(4)
        }
        assert len(set(drawn.values())) == 16

    def test_what_is_drawn_elsewhere_changes_nothing(self) -> None:
        batches = told([(n, n + 12) for n in range(12)], batch_pairs=4)
        first = batches[0]
        np.random.default_rng().random()
        torch.manual_seed(99)
        assert equal(first, batches[0])


class TestDrawing:
    @pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
    def test_is_by_score_to_the_power(self, power: float) -> None:
        scores = [1.0, 2.0, 4.0, 0.5]
        batches = told([(0, 1), (2, 3), (4, 5), (6, 7)], scores, batch_pairs=2, score_power=power, seed=1)
        # Of each batch the first pair alone is a free draw: the second may not be the same again.
        first = Counter(pairs_of(batches[step])[0] for step in range(1000))
        whole = sum(score**power for score in scores)
        for place, score in enumerate(scores):
            share = score**power / whole
            spread = (1000 * share * (1 - share)) ** 0.5
            assert abs(first[(2 * place, 2 * place + 1)] - 1000 * share) < 4 * spread

    def test_gives_no_note_twice_where_that_can_be_helped(self) -> None:
        # Two of the star's never stand in one batch, nor do two that share a note at either end.
        pairs = [(0, 1), (0, 2), (3, 0), (4, 5), (5, 6), (8, 9), (10, 11), (12, 13), (14, 15), (16, 17), (18, 19)]
        batches = told(pairs, batch_pairs=3)
        for step in range(100):
            notes = notes_of(batches[step])
            assert len(set(notes)) == len(notes) == 6
            assert all(pair in pairs for pair in pairs_of(batches[step]))

    def test_fills_a_batch_with_what_there_is(self) -> None:
        batch = told([(0, 1), (2, 3)], batch_pairs=5)[0]
        assert set(pairs_of(batch)) == {(0, 1), (2, 3)}
        assert batch.pairs == len(pairs_of(batch)) == 5

    def test_takes_only_pairs_that_there_are(self) -> None:
        pairs = [(n, n + 12) for n in range(12)]
        batches = told(pairs, batch_pairs=4)
        assert {pair for step in range(100) for pair in pairs_of(batches[step])} == set(pairs)

    def test_with_redrawn_partners_has_nothing_to_learn(self) -> None:
        pairs = [(n, n + 12) for n in range(12)]
        batches = told(pairs, batch_pairs=4, redraw_partners=True)
        drawn = [pair for step in range(300) for pair in pairs_of(batches[step])]
        assert {source for source, _ in drawn} == set(range(12))
        targets = Counter(target for source, target in drawn if source == 3)
        # About 100 draws over 24 notes: no target stands out, and the true one least of all.
        assert len(targets) > 18
        assert max(targets.values()) < 14
        assert equal(batches[5], told(pairs, batch_pairs=4, redraw_partners=True)[5])


class TestFalseNegatives:
    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(
        pairs=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)).filter(lambda p: p[0] != p[1]), min_size=1),
        step=st.integers(0, 1000),
        redraw=st.booleans(),
    )
    def test_are_those_of_the_three_rules(self, pairs: list[Pair], step: int, redraw: bool) -> None:
        batch = told(pairs, notes=NOTES[:6], batch_pairs=4, steps=2000, redraw_partners=redraw)[step]
        notes, partner = notes_of(batch), batch.partner.tolist()
        assert batch.not_negative.tolist() == formula.not_negative(notes, partner, set(pairs))

    def test_are_found_whichever_way_round_a_pair_stands(self) -> None:
        # 0 and 2 are partners as well, in a pair that this batch did not draw.
        batch = told([(0, 1), (2, 3), (2, 0)], [1.0, 1.0, 1e-12], batch_pairs=2)[0]
        notes = notes_of(batch)
        place = {note: notes.index(note) for note in notes}
        assert batch.not_negative[place[0], place[2]]
        assert batch.not_negative[place[2], place[0]]
        assert not batch.not_negative[place[0], place[3]]
        assert not batch.not_negative[place[1], place[2]]

    def test_stay_negatives_where_that_is_set(self) -> None:
        batch = told([(0, 1), (1, 0), (0, 2)], batch_pairs=4, mask_false_negatives=False)[0]
        assert torch.equal(batch.not_negative, torch.eye(8).bool())

    def test_partners_stand_side_by_side(self) -> None:
        assert told([(0, 1), (2, 3)], batch_pairs=2)[0].partner.tolist() == [1, 0, 3, 2]


class TestTasks:
    FULL: ClassVar = [replace(note, hashtags=["autumn"], category="art", title="words") for note in NOTES]
    PAIRS: ClassVar = [(n, n + 12) for n in range(12)]

    def share(self, notes: list[Note], **given: Any) -> dict[int, float]:
        """Of each task (1 hashtags, 2 category, 3 none), over 100 batches of 16 notes."""
        batches = told(self.PAIRS, notes=notes, batch_pairs=8, **given)
        counts = Counter(task for step in range(100) for task in tasks_of(batches[step]))
        return {task: counts[task] / 1600 for task in (1, 2, 3)}

    @pytest.mark.parametrize("hashtag_share", [0.0, 0.25, 0.4, 1.0])
    def test_are_hashtags_as_often_as_is_set(self, hashtag_share: float) -> None:
        shares = self.share(self.FULL, hashtag_share=hashtag_share)
        # Four standard deviations of a share of 1600 draws are 0.05 at most; of 0 and 1 there is none.
        assert abs(shares[1] - hashtag_share) <= (0.05 if 0 < hashtag_share < 1 else 0)
        assert shares[1] + shares[2] == 1

    def test_are_the_other_one_where_a_note_has_no_answer(self) -> None:
        no_tags = [replace(note, hashtags=[]) for note in self.FULL]
        unknown = [replace(note, category="unheard of") for note in self.FULL]
        assert self.share(no_tags, hashtag_share=1.0) == {1: 0, 2: 1, 3: 0}
        assert self.share(unknown, hashtag_share=0.0) == {1: 1, 2: 0, 3: 0}

    def test_never_leave_a_note_without_a_word_to_read(self) -> None:
        bare = [replace(note, title=" ", content="\n") for note in self.FULL]
        assert self.share(bare, hashtag_share=1.0) == {1: 0, 2: 1, 3: 0}

    def test_are_none_where_there_is_no_answer_at_all(self) -> None:
        mute = [replace(note, hashtags=[], category="") for note in self.FULL]
        assert self.share(mute) == {1: 0, 2: 0, 3: 1}

    @pytest.mark.parametrize("asked_share", [0.0, 0.4])
    def test_are_asked_of_as_many_notes_as_is_set(self, asked_share: float) -> None:
        shares = self.share(self.FULL, asked_share=asked_share, hashtag_share=0.5)
        assert abs(shares[3] - (1 - asked_share)) <= (0.05 if asked_share else 0)
        assert abs(shares[1] - shares[2]) < 0.07

    def test_are_none_where_generation_is_not_trained(self) -> None:
        assert self.share(self.FULL, generative_weight=0) == {1: 0, 2: 0, 3: 1}


class TestProcesses:
    @pytest.mark.parametrize("processes", [2, 3])
    def test_share_one_batch_out(self, base: Base, processes: int) -> None:
        few = TrainingSettings(batch_pairs=2, seed=5, held_back="some")
        joined = tiny_batches(base, few.model_copy(update={"batch_pairs": 2 * processes}))[7]
        parts = [tiny_batches(base, few, rank=rank, processes=processes)[7] for rank in range(processes)]
        assert [part.first for part in parts] == [4 * rank for rank in range(processes)]
        assert joined.rows.labels is not None
        for part in parts:
            assert torch.equal(part.partner, joined.partner)
            assert torch.equal(part.not_negative, joined.not_negative)
            assert (part.answer_tokens, part.tokens) == (joined.answer_tokens, joined.tokens)
            own = slice(part.first, part.first + 4)
            longest = part.rows.ids.shape[1]
            assert torch.equal(part.rows.ids, joined.rows.ids[own, :longest])
            assert torch.equal(part.rows.mask, joined.rows.mask[own, :longest])
            assert torch.equal(part.rows.embed_at, joined.rows.embed_at[own])
            assert part.rows.labels is not None
            assert torch.equal(part.rows.labels, joined.rows.labels[own, :longest])
            assert not joined.rows.mask[own, longest:].any()
        assert sum(part.rows.answer_tokens for part in parts) == joined.answer_tokens

    def test_counts_are_those_of_the_rows(self, base: Base) -> None:
        batch = tiny_batches(base, TrainingSettings(batch_pairs=4))[0]
        assert batch.rows.labels is not None
        assert batch.answer_tokens == int((batch.rows.labels != NO_LABEL).sum()) > 0
        assert batch.tokens == int(batch.rows.mask.sum())
