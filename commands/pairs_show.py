"""``notellm pairs show``: a note's partners, with their titles."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.markup import escape
from rich.table import Table

from commands.console import out
from streams.errors import SnapshotError
from streams.snapshot import Snapshot, open_snapshot
from streams.snapshot_queries import Partner, partners, questions, sources_of, title_of

__all__ = ["DEFAULT_SNAPSHOT", "SnapshotOption", "show", "show_note"]

SnapshotOption = Annotated[
    Path,
    typer.Option(
        "--snapshot",
        help="A snapshot's folder, or the --out of 'pairs refresh', and then its newest.",
        envvar="NOTELLM_CLI_SNAPSHOT",
    ),
]
DEFAULT_SNAPSHOT = Path("build/snapshots")


class _Answer(msgspec.Struct):
    snapshot: str
    note_id: str
    title: str
    deleted: bool
    leads_to: list[Partner]
    led_to_by: list[Partner]


def show(
    note_id: Annotated[str, typer.Argument(help="A note.")],
    snapshot: SnapshotOption = DEFAULT_SNAPSHOT,
    limit: Annotated[
        int, typer.Option(min=1, max=1000, help="Rows of each table, at most.", envvar="NOTELLM_CLI_LIMIT")
    ] = 10,
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON instead of tables, and all of it.", envvar="NOTELLM_CLI_JSON")
    ] = False,
) -> None:
    """Show which notes a note leads to, and which lead to it, in a snapshot of training pairs.

    A note that is deleted, so not in the snapshot's notes file, is marked: training skips its pairs.

    \b
    Examples:
      notellm pairs show travel-001
      notellm pairs show travel-001 --snapshot build/snapshots --json
    """  # noqa: D301 - the \\b is meant: it keeps the lines of the examples apart
    show_note(open_snapshot(snapshot), note_id, limit, as_json=as_json)


def show_note(snapshot: Snapshot, note_id: str, limit: int, *, as_json: bool = False) -> None:
    """Raises :class:`SnapshotError` for a note that has no pairs."""
    with questions({"the": snapshot}) as connection:
        title = title_of(connection, note_id)
        leads_to, led_to_by = partners(connection, note_id), sources_of(connection, note_id)
    if not leads_to and not led_to_by:
        why = "is not in its notes file" if title is None else "is a live note that too few users clicked"
        raise SnapshotError(f"NOTE_ID: {note_id!r} has no pairs in {snapshot.path}; it {why}")
    if as_json:
        answer = _Answer(snapshot.name, note_id, title or "", title is None, leads_to, led_to_by)
        sys.stdout.write(msgspec.json.encode(answer).decode() + "\n")
        return
    out.print(f"{escape(note_id)} {'[red]deleted[/]' if title is None else escape(title)}", highlight=False)
    _print("leads to", leads_to, limit, rank="rank")
    _print("is led to by", led_to_by, limit, rank="its rank there")


def _print(heading: str, found: list[Partner], limit: int, rank: str) -> None:
    if not found:
        out.print(f"{heading}: none")
        return
    table = Table(rank, "score", "users", "note_id", "title", title=f"{heading}: {len(found):,}", title_justify="left")
    for column in table.columns[:3]:
        column.justify = "right"
    table.columns[3].overflow = table.columns[4].overflow = "fold"
    for one in found[:limit]:
        title = "[red]deleted[/]" if one.deleted else escape(one.title)
        table.add_row(str(one.rank), f"{one.score:.4f}", f"{one.users:,}", escape(one.note_id), title)
    if len(found) > limit:
        table.caption = f"and {len(found) - limit:,} more"
    out.print(table)
