"""``notellm pairs diff``: how two snapshots of training pairs differ."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.markup import escape
from rich.table import Table

from commands.console import out
from commands.moments import say_moment
from streams.snapshot import open_snapshot
from streams.snapshot_diff import ChangedPair, SnapshotDiff, diff_snapshots

__all__ = ["diff"]

_MOMENTS = ("window.start", "window.end")


def diff(
    a: Annotated[Path, typer.Argument(help="A snapshot's folder.")],
    b: Annotated[Path, typer.Argument(help="Another, the later one as a rule.")],
    limit: Annotated[
        int,
        typer.Option(min=0, max=1000, help="Pairs of each kind to name, the largest.", envvar="NOTELLM_CLI_LIMIT"),
    ] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of tables.", envvar="NOTELLM_CLI_JSON")] = False,
) -> None:
    """Say how two snapshots differ: what they were made of, their counts, and pairs gained, lost and scored anew.

    The overlap is Jaccard's: of the partners that a note has in either snapshot, the share that it has in both.

    \b
    Examples:
      notellm pairs diff build/snapshots/pairs/1795478400000-* build/snapshots/pairs/1795564800000-*
      notellm pairs diff build/monday build/snapshots --limit 20 --json
    """  # noqa: D301 - the \\b is meant: it keeps the lines of the examples apart
    found = diff_snapshots(open_snapshot(a), open_snapshot(b), limit)
    if as_json:
        sys.stdout.write(msgspec.json.encode(found).decode() + "\n")
        return
    _print_made_of(found)
    _print_counts(found)
    _print_overlap(found)
    _print_pairs("gained", found.gained)
    _print_pairs("lost", found.lost)
    _print_pairs("scored anew", found.changed)


def _print_made_of(found: SnapshotDiff) -> None:
    if not found.made_of:
        out.print("made of the same, in the same way")
        return
    table = Table("made of", "A", "B", title=f"A {found.a}, B {found.b}", title_justify="left")
    for name, values in found.made_of.items():
        table.add_row(name, *(escape(_said(name, value)) for value in values))
    out.print(table)


def _said(name: str, value: Any) -> str:
    if value is None:
        return ""
    if name in _MOMENTS:
        return say_moment(value)
    if name == "notes.sha256":
        return str(value)[:16]
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _print_counts(found: SnapshotDiff) -> None:
    table = Table("", "A", "B", "change", title="counts", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, (before, after) in found.counts.items():
        change = f"{after - before:+,}" + (f" ({(after - before) / before:+.1%})" if before else "")
        table.add_row(name.replace("_", " "), f"{before:,}", f"{after:,}", change)
    out.print(table)


def _print_overlap(found: SnapshotDiff) -> None:
    table = Table("", "in both", "gained", "lost", "scored anew", "ranked anew", title="content", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    pairs, sources = found.pairs, found.sources
    counts = (pairs.both, pairs.gained, pairs.lost, pairs.rescored, pairs.reranked)
    table.add_row("pairs", *(f"{count:,}" for count in counts))
    table.add_row("sources", f"{sources.both:,}", f"{sources.gained:,}", f"{sources.lost:,}", "", "")
    out.print(table)
    overlap = found.overlap
    if overlap.mean is None:
        out.print("no source is in both")
        return
    width = 1 / len(overlap.bins)
    shares = [f"{place * width:.1f} to {(place + 1) * width:.1f}" for place in range(len(overlap.bins))]
    table = Table("mean", *shares, "equal", title="sources by the overlap of their partners", title_justify="left")
    table.add_row(f"{overlap.mean:.3f}", *(f"{count:,}" for count in overlap.bins), f"{overlap.equal:,}")
    out.print(table)


def _print_pairs(kind: str, pairs: list[ChangedPair]) -> None:
    if not pairs:
        return
    table = Table("from", "to", "A", "B", title=f"largest pairs {kind}", title_justify="left")
    for pair in pairs:
        table.add_row(
            escape(f"{pair.source_id} {pair.source_title}".strip()),
            escape(f"{pair.target_id} {pair.target_title}".strip()),
            _place(pair.score_a, pair.rank_a),
            _place(pair.score_b, pair.rank_b),
        )
    out.print(table)


def _place(score: float | None, rank: int | None) -> str:
    return "" if score is None else f"{score:.4f} (rank {rank})"
