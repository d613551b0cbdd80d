"""A snapshot's report: one HTML file with pictures and tables, which needs nothing but itself.

It lies beside the snapshots, ``OUT/reports/<snapshot>.html``: it can be made again at any time from what the snapshot
holds, so it is no part of it, and its manifest does not list it.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from streams.errors import EngineError, StreamsError
from streams.snapshot import MANIFEST, ChangelogSource, FilesSource, NotesTopic, OffsetRange, Snapshot, TopicSource
from streams.snapshot_queries import best_pairs, hubs, new_notes_by_day, questions
from streams.statistics import RULES, Statistics

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

__all__ = ["refresh_reports", "report_path", "write_report"]

log = logging.getLogger(__name__)

_TEMPLATES = Path(__file__).resolve().parent / "templates"
_FOLDER = "reports"
_ROWS = 15
_DEGREES = 12


class _Picture(NamedTuple):
    title: str
    how: str
    svg: Any = ""
    head: tuple[str, ...] = ()
    rows: Sequence[Sequence[str]] = ()


def report_path(snapshot: Snapshot) -> Path:
    return snapshot.path.parent.parent / _FOLDER / f"{snapshot.name}.html"


def refresh_reports(snapshot: Snapshot) -> None:
    """Write the report of a snapshot that is new; those of pruned ones go.

    A report that cannot be written is a warning: the snapshot is whole without it.
    """
    try:
        path = write_report(snapshot)
        for other in path.parent.iterdir():
            if not (snapshot.path.parent / other.stem / MANIFEST).exists():
                other.unlink()
    except (StreamsError, OSError) as error:
        log.warning("no report of %s: %s", snapshot.name, error)


def write_report(snapshot: Snapshot) -> Path:
    """Returns where it is. A page that stands there already is replaced as a whole.

    Raises :class:`EngineError` where the extra is not installed, :class:`streams.errors.SnapshotError` for a snapshot
    that cannot be read.
    """
    try:
        import jinja2  # noqa: PLC0415 - an extra, as matplotlib is, which takes a second to load

        from streams import pictures  # noqa: PLC0415
    except ImportError as error:
        raise EngineError(f"{error.name} is not installed; install the extra: pip install 'notellm[pairs]'") from None
    with questions({"the": snapshot}) as connection:
        best, most = best_pairs(connection, _ROWS), hubs(connection, _ROWS)
        window = snapshot.manifest.window
        published = new_notes_by_day(connection, window.start, window.end)
    # Titles are what strangers wrote: all is escaped but the pictures, which hold none of it.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("report.html").render(
        name=snapshot.name,
        window=_window(snapshot),
        s=snapshot.statistics,
        facts=_facts(snapshot),
        pictures=_pictures(snapshot.statistics, published, pictures),
        best=best,
        hubs=most,
    )
    path = report_path(snapshot)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(page, "utf-8")
    partial.replace(path)
    return path


def _pictures(s: Statistics, published: list[tuple[str, int, int]], pictures: ModuleType) -> list[_Picture]:
    return [
        _Picture(
            "Day by day",
            "Clicks that count, each once, and the users who made them. The window's first and last day may be parts "
            "of days; another that is much lower than its neighbours was not read as a whole.",
            pictures.days_picture(s.days) if s.days else "",
            ("day", "clicks", "users"),
            [(each.day, f"{each.clicks:,}", f"{each.users:,}") for each in s.days[-_ROWS:]],
        ),
        _drops(s, pictures),
        _Picture(
            "Scores",
            "How many pairs have which score. One user of N notes adds 1/N to a pair: what stands at the left was made "
            "by one user or two, what stands at the right by many.",
            pictures.scores_picture(s.scores) if s.scores else "",
            ("of the ordered pairs", "pairs"),
            [
                ("made by any user", f"{s.ordered_pairs:,}"),
                ("below min_score", f"{s.below_min:,}"),
                ("above max_score", f"{s.above_max:,}"),
                ("beyond the top of their source", f"{s.beyond_top:,}"),
                ("kept", f"{s.pairs:,}"),
                ("kept, with a deleted note (training skips them)", f"{s.pairs_with_deleted_notes:,}"),
            ],
        ),
        _Picture(
            "Partners",
            "Of each note that leads to others, how many it leads to; of each that others lead to, how many do. The "
            "first end at the top of a source; a note far at the right of the second is one that everybody sees.",
            pictures.degrees_picture(s.partners, s.partner_of) if s.partners else "",
            ("number of partners", "sources", "targets"),
            _degrees(s),
        ),
        _Picture(
            "New notes",
            f"Of {s.new_notes.published:,} live notes that were published within the window, "
            f"{s.new_notes.with_pair:,} stand in a pair{_share(s.new_notes.with_pair, s.new_notes.published)}. "
            "Those of the last day had the least time.",
            pictures.coverage_picture(published) if published else "",
        ),
    ]


def _drops(s: Statistics, pictures: ModuleType) -> _Picture:
    bars = [("counted", s.clicks), *((rule.replace("_", " "), count) for rule, count in s.dropped.items())]
    bars += [("forgets", s.forgets)] if s.forgets else []
    rows = [("read", f"{s.read:,}", ""), ("counted", f"{s.clicks:,}", _percent(s.clicks, s.read))]
    rows += [
        (f"{rule.replace('_', ' ')}: {RULES.get(rule, '')}", f"{count:,}", _percent(count, s.read))
        for rule, count in s.dropped.items()
    ]
    rows.append(("forgets: a user's clicks go", f"{s.forgets:,}", _percent(s.forgets, s.read)))
    return _Picture(
        "What became of the records",
        "Every record, row or line that was read, once. A rule that is not listed was applied before, by the app.",
        pictures.bars_picture(bars, "records"),
        ("", "records", "share"),
        rows,
    )


def _degrees(s: Statistics) -> list[tuple[str, str, str]]:
    """Few rows; the picture has all."""
    sources = {(each.low, each.high): each.notes for each in s.partners}
    targets = {(each.low, each.high): each.notes for each in s.partner_of}
    ranges = sorted({*sources, *targets})[:_DEGREES]
    return [
        (
            str(low) if low == high else f"{low} to {high}",
            f"{sources.get((low, high), 0):,}",
            f"{targets.get((low, high), 0):,}",
        )
        for low, high in ranges
    ]


def _facts(snapshot: Snapshot) -> list[tuple[str, str]]:
    manifest, s = snapshot.manifest, snapshot.statistics
    options = manifest.settings
    asked = [f"{options.min_score:g} ≤ score ≤ {options.max_score:g}", f"top {options.top} of each source"]
    asked += [f"at most {options.max_distance} clicks apart"] if options.max_distance else []
    asked += [f"sessions end after {options.session_gap_ms / 60_000:g} min"] if options.session_gap_ms else []
    asked += ["symmetric"] if options.symmetric else []
    asked += (
        [f"without the {s.power_users:,} users of more than {options.max_notes_per_user:,} notes"]
        if options.max_notes_per_user
        else []
    )
    notes = manifest.notes
    return [
        ("Made at", _moment(manifest.created_at)),
        ("Engine", f"{manifest.engine.name} {manifest.engine.version}"),
        ("Clicks from", _source(manifest.source)),
        ("Notes from", f"{_source(notes.source)}: {s.notes.live:,} live, {s.notes.deleted:,} deleted"),
        ("Asked for", ", ".join(asked)),
        ("Notes clicked", f"{s.clicked_notes:,}"),
        ("Sources, targets", f"{s.sources:,} notes lead to others, {s.targets:,} are led to"),
    ]


def _source(source: FilesSource | TopicSource | ChangelogSource | NotesTopic) -> str:
    match source:
        case FilesSource(files):
            return ", ".join(each.path for each in files)
        case TopicSource():
            return (
                f"topic {source.topic}, {_records(source.partitions)}; late after {source.allowed_lateness_s:,} s, of "
                f"the future from {source.future_tolerance_s:,} s, {source.clicks_per_day:,} clicks of a user and day"
            )
        case ChangelogSource():
            return f"the app's table, topic {source.topic}, {_records(source.partitions)}"
        case NotesTopic():
            return f"topic {source.topic}, {_records(source.partitions)}"


def _records(partitions: Sequence[OffsetRange]) -> str:
    return f"{sum(each.end - each.start for each in partitions):,} offsets of {len(partitions)} partitions"


def _window(snapshot: Snapshot) -> str:
    window = snapshot.manifest.window
    return f"{_moment(window.start)} to {_moment(window.end)} ({window.length})"


def _moment(moment_ms: int) -> str:
    return f"{datetime.fromtimestamp(moment_ms / 1000, UTC):%Y-%m-%d %H:%M} UTC"


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.2%}" if whole else ""


def _share(part: int, whole: int) -> str:
    return f" ({part / whole:.1%})" if whole else ""
