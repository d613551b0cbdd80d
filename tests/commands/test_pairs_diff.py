"""How two snapshots differ, against a plain reading of their pairs."""

from __future__ import annotations

import random
from pathlib import Path
from statistics import mean

import msgspec
import pytest

from streams.snapshot import Snapshot
from streams.snapshot_diff import ChangedPair, diff_snapshots
from tests.commands.handmade_snapshot import DAY_MS, END, STATISTICS_OF_A_WEEK, Pair, make_snapshot
from tests.commands.in_process import run_here

TITLES = {f"n{number}": f"Note {number}" for number in range(40)}


def random_pairs(seed: int) -> list[Pair]:
    """Up to ten partners of each of 40 notes."""
    draw = random.Random(seed)
    found: list[Pair] = []
    for source in draw.sample(sorted(TITLES), 35):
        targets = draw.sample([note for note in sorted(TITLES) if note != source], draw.randint(1, 10))
        scores = sorted((draw.randint(1, 8) / 8 for _ in targets), reverse=True)
        found += [
            (source, target, score, 1, n) for n, (target, score) in enumerate(zip(targets, scores, strict=True), 1)
        ]
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Snapshot, Snapshot]:
    out = tmp_path_factory.mktemp("out")
    later = msgspec.structs.replace(STATISTICS_OF_A_WEEK, clicks=1500, users=80)
    return (
        make_snapshot(out, random_pairs(1), TITLES),
        make_snapshot(out, random_pairs(2), {**TITLES, "n0": "New title"}, end=END + DAY_MS, statistics=later, top=9),
    )


def test_counts_equal_a_plain_reading(two: tuple[Snapshot, Snapshot]) -> None:
    a = {(source, target): (score, rank) for source, target, score, _, rank in random_pairs(1)}
    b = {(source, target): (score, rank) for source, target, score, _, rank in random_pairs(2)}
    found = diff_snapshots(*two, limit=10_000)
    both = a.keys() & b.keys()
    assert both
    assert found.pairs.both == len(both)
    assert found.pairs.gained == len(b.keys() - a.keys())
    assert found.pairs.lost == len(a.keys() - b.keys())
    assert found.pairs.rescored == sum(a[pair][0] != b[pair][0] for pair in both) > 0
    assert found.pairs.reranked == sum(a[pair][1] != b[pair][1] for pair in both) > 0
    sources_a, sources_b = {source for source, _ in a}, {source for source, _ in b}
    assert found.sources.both == len(sources_a & sources_b)
    assert found.sources.gained == len(sources_b - sources_a) > 0
    assert found.sources.lost == len(sources_a - sources_b) > 0
    assert {(one.source_id, one.target_id) for one in found.gained} == b.keys() - a.keys()
    assert {(one.source_id, one.target_id) for one in found.lost} == a.keys() - b.keys()
    assert {(one.source_id, one.target_id) for one in found.changed} == {
        pair for pair in both if a[pair][0] != b[pair][0]
    }
    for sizes in (
        [one.score_b for one in found.gained],
        [one.score_a for one in found.lost],
        [abs(a[one.source_id, one.target_id][0] - b[one.source_id, one.target_id][0]) for one in found.changed],
    ):
        assert sizes == sorted(sizes, key=lambda size: -(size or 0))
        assert len(set(sizes)) > 2


def test_overlap_equals_a_plain_reading(two: tuple[Snapshot, Snapshot]) -> None:
    a: dict[str, set[str]] = {}
    b: dict[str, set[str]] = {}
    for partners, pairs in ((a, random_pairs(1)), (b, random_pairs(2))):
        for source, target, *_ in pairs:
            partners.setdefault(source, set()).add(target)
    shares = [len(a[source] & b[source]) / len(a[source] | b[source]) for source in a.keys() & b.keys()]
    overlap = diff_snapshots(*two).overlap
    assert overlap.mean == pytest.approx(mean(shares), abs=1e-12)
    assert overlap.bins == [sum(low / 5 <= share < (low + 1) / 5 for share in shares) for low in range(5)]
    assert overlap.equal == 0
    assert sum(overlap.bins) == len(shares)


def test_what_they_were_made_of(two: tuple[Snapshot, Snapshot]) -> None:
    found = diff_snapshots(*two)
    assert {name: values for name, values in found.made_of.items() if not name.startswith("notes.")} == {
        "window.start": (END - 7 * DAY_MS, END - 6 * DAY_MS),
        "window.end": (END, END + DAY_MS),
        "settings.top": (10, 9),
    }
    assert found.made_of["notes.sha256"] == tuple(each.manifest.notes.sha256 for each in two)
    assert found.counts["clicks"] == (1000, 1500)
    assert found.counts["users"] == (90, 80)


def test_a_snapshot_does_not_differ_from_itself(two: tuple[Snapshot, Snapshot]) -> None:
    found = diff_snapshots(two[0], two[0])
    assert found.made_of == {}
    assert (found.pairs.gained, found.pairs.lost, found.pairs.rescored, found.pairs.reranked) == (0, 0, 0, 0)
    assert found.overlap.mean == 1.0
    assert found.overlap.equal == found.overlap.bins[-1] == found.sources.both
    assert found.gained == found.lost == found.changed == []
    done = run_here("pairs", "diff", str(two[0].path), str(two[0].path))
    assert done.returncode == 0
    assert done.stdout.startswith("made of the same, in the same way\n")


def test_an_empty_snapshot(tmp_path: Path) -> None:
    empty = make_snapshot(tmp_path, [], {})
    full = make_snapshot(tmp_path, [("a", "b", 0.5, 1, 1)], {"b": "B"})
    found = diff_snapshots(empty, full)
    assert (found.pairs.both, found.pairs.gained, found.overlap.mean) == (0, 1, None)
    assert found.gained == [ChangedPair("a", "", "b", "B", None, 0.5, None, 1)]
    done = run_here("pairs", "diff", str(empty.path), str(full.path))
    assert (done.returncode, "no source is in both" in done.stdout) == (0, True)


def test_people_see_the_largest_by_title(two: tuple[Snapshot, Snapshot]) -> None:
    done = run_here("pairs", "diff", str(two[0].path), str(two[1].path), "--limit", "3")
    assert done.returncode == 0
    assert "│ window.end   │ 2026-11-24 00:00:00 UTC │ 2026-11-25 00:00:00 UTC │" in done.stdout
    assert "│ clicks        │ 1,000 │ 1,500 │ +500 (+50.0%) │" in done.stdout
    for kind in ("gained", "lost", "scored anew"):
        table = done.stdout.split(f"largest pairs {kind}\n")[1].split("└")[0]
        assert table.count("Note ") + table.count("New title") == 6, "3 rows, two titles each"
    answer = run_here("pairs", "diff", str(two[0].path), str(two[1].path), "--limit", "3", "--json").stdout
    assert msgspec.json.decode(answer, type=dict)["pairs"] == msgspec.to_builtins(diff_snapshots(*two).pairs)


def test_a_folder_that_is_no_snapshot_is_a_clear_line(tmp_path: Path) -> None:
    done = run_here("pairs", "diff", str(tmp_path), str(tmp_path))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {tmp_path}: no snapshot there")
