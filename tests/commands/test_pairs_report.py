"""The report says what the snapshot says, and what strangers wrote is text in it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from streams.report import refresh_reports, report_path, write_report
from streams.snapshot import Snapshot, latest_snapshot
from streams.statistics import RULES
from tests.commands.handmade_snapshot import STATISTICS_OF_NOTHING, make_snapshot
from tests.commands.in_process import run_here
from tests.support.processes import run_command

HOSTILE = '<script>alert("1")</script><img src=x onerror=alert(1)>{{ 7 * 7 }}'
PAIRS = [("a", "b", 2.5, 7, 1), ("a", "<i>c</i>", 1.25, 5, 2), ("b", "a", 0.5, 2, 1), ("b", "<i>c</i>", 0.25, 2, 2)]


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    titles = {"a": HOSTILE, "b": "京都红叶", "alone": "published, and in no pair"}
    return make_snapshot(tmp_path_factory.mktemp("out"), PAIRS, titles)


@pytest.fixture(scope="module")
def page(snapshot: Snapshot) -> str:
    return write_report(snapshot).read_text("utf-8")


class _Elements(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_it_lies_beside_the_snapshots_which_stay_whole(snapshot: Snapshot, page: str) -> None:
    del page
    path = report_path(snapshot)
    assert path == snapshot.path.parent.parent / "reports" / f"{snapshot.name}.html"
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert {file.name for file in snapshot.path.iterdir()} == {"manifest.json", "pairs.parquet", "statistics.json"}


def test_it_has_a_picture_of_each_thing_and_they_are_well_formed(page: str) -> None:
    pictures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(pictures) == 5
    texts = [" ".join(ElementTree.fromstring(picture).itertext()) for picture in pictures]
    for words, text in zip(
        ["day (UTC)", "records, logarithmic", "score s(A→B)", "number of partners", "day of publication"],
        texts,
        strict=True,
    ):
        assert words in re.sub(r"\s+", " ", text)


def test_it_needs_nothing_from_elsewhere(page: str) -> None:
    for tag, attributes in _Elements(page).found:
        assert tag not in {"script", "link", "img", "iframe", "image", "object"}
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href"):
                assert str(value).startswith("#")
    assert "url(http" not in page
    assert "@import" not in page


def test_what_strangers_wrote_is_text(page: str) -> None:
    assert "<script" not in page
    assert "<i>" not in page
    assert "&lt;script&gt;alert(&#34;1&#34;)&lt;/script&gt;" in page
    assert "{{ 7 * 7 }}" in page
    assert "京都红叶" in page


def test_it_says_the_numbers(snapshot: Snapshot, page: str) -> None:
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL)))
    for rule, count in snapshot.statistics.dropped.items():
        assert f"{rule.replace('_', ' ')}: {RULES[rule]} {count:,} {count / 1200:.2%}".replace("'", "&#39;") in text
    for words in ("read 1,200", "counted 1,000 83.33%", "2026-11-23 123 23", "kept 370", "below min_score 30"):
        assert words in text
    assert "2.5000 7 a" in text
    assert "2026-11-17 00:00 UTC to 2026-11-24 00:00 UTC (7d)" in text


def test_a_snapshot_of_nothing_has_a_report_too(tmp_path: Path) -> None:
    page = write_report(make_snapshot(tmp_path, [], {}, statistics=STATISTICS_OF_NOTHING)).read_text("utf-8")
    assert page.count("<svg") == 1
    assert "0 pairs of 0 notes" in page


def test_the_command_writes_it_again(snapshot: Snapshot) -> None:
    report_path(snapshot).unlink(missing_ok=True)
    done = run_here("pairs", "report", "--snapshot", str(snapshot.path))
    assert done.returncode == 0
    assert done.stdout.strip() == str(report_path(snapshot))
    assert report_path(snapshot).is_file()


def test_a_refresh_writes_one_and_takes_those_of_pruned_snapshots_away(tmp_path: Path) -> None:
    clicks = tmp_path / "clicks.jsonl"
    clicks.write_text('{"user_id":"u","note_id":"a","clicked_at":1}\n{"user_id":"u","note_id":"b","clicked_at":2}\n')
    notes = tmp_path / "notes.jsonl"
    notes.write_text('{"note_id":"a","title":"A"}\n{"note_id":"b","title":"B"}\n')
    out = tmp_path / "out"
    flags = ("--clicks", str(clicks), "--notes", str(notes), "--out", str(out), "--window", "all", "--keep", "1")
    names = []
    for end in ("10", "20"):
        done = run_command("pairs", "refresh", *flags, "--as-of", end)
        assert done.returncode == 0, done.stderr
        newest = latest_snapshot(out)
        names.append(newest.name)
        assert [report.name for report in (out / "reports").iterdir()] == [f"{newest.name}.html"]
    assert len(set(names)) == 2


def test_a_report_that_cannot_be_written_costs_a_warning_not_the_snapshot(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    snapshot = make_snapshot(tmp_path, PAIRS, {"a": "A"})
    (tmp_path / "reports").write_text("a file where the folder should be")
    refresh_reports(snapshot)
    assert f"no report of {snapshot.name}: " in caplog.text
