"""``notellm pairs report``: a snapshot's pictures and tables as a page."""

from __future__ import annotations

from commands.console import out
from commands.pairs_show import DEFAULT_SNAPSHOT, SnapshotOption
from streams.report import write_report
from streams.snapshot import open_snapshot

__all__ = ["report"]


def report(snapshot: SnapshotOption = DEFAULT_SNAPSHOT) -> None:
    """Write a snapshot's report again, one HTML file with pictures, and print where it is.

    'pairs refresh' writes one for each snapshot.

    \b
    Examples:
      notellm pairs report
      notellm pairs report --snapshot build/snapshots/pairs/1795478400000-1a2b3c4d
    """  # noqa: D301 - the \\b is meant: it keeps the lines of the examples apart
    out.print(str(write_report(open_snapshot(snapshot))), markup=False, highlight=False)
