"""DuckDB's pairs against an obvious reading of the formula, to the last digit."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable
from pathlib import Path

import duckdb
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from notellm.errors import SettingsError
from streams import duckdb_engine
from streams.cooccurrence import Found, PairOptions, scores_sql
from streams.duckdb_engine import DuckDBEngine, engine_errors
from streams.errors import EngineError
from tests.streams.formula import Click, Pair, formula, read_pairs, write_clicks
from tests.streams.logs import NOTES, OVERFLOWING, all_options, many_logs

DAY = 86_400_000
# One folder serves all the examples: each begins by emptying it.
in_one_folder = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


def run(folder: Path, clicks: Iterable[Click], options: PairOptions | None = None) -> tuple[Found, list[Pair]]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    file = write_clicks(clicks, folder / "clicks.parquet")
    found = DuckDBEngine(folder, threads=2).find_pairs(file, options or PairOptions(), folder / "pairs")
    return found, read_pairs(folder / "pairs")


class TestFormula:
    @in_one_folder
    @given(log=many_logs(), options=all_options())
    @example(log=[], options=PairOptions())
    @example(log=[("u1", "a", 1), ("u1", "b", 1)], options=PairOptions())
    def test_equals_the_obvious_reading(self, tmp_path: Path, log: list[Click], options: PairOptions) -> None:
        assert run(tmp_path / "run", log, options)[1] == formula(log, options)

    @in_one_folder
    @given(log=many_logs(), options=all_options(), candidates=st.sampled_from([200, 1000]))
    def test_is_the_same_in_parts(
        self, tmp_path: Path, log: list[Click], options: PairOptions, candidates: int
    ) -> None:
        whole = run(tmp_path / "run", log, options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(duckdb_engine, "_CANDIDATES", candidates)
            assert run(tmp_path / "run", log, options) == whole

    def test_there_and_back_counts_both_ways_once(self, tmp_path: Path) -> None:
        log = [("u", "a", 1), ("u", "b", 2), ("u", "a", 3), ("u", "b", 4), ("u", "a", 5)]
        assert run(tmp_path / "run", log)[1] == [("a", "b", 0.5, 1, 1), ("b", "a", 0.5, 1, 1)]

    def test_ties_at_the_border_go_to_the_smaller_id_by_code_points(self, tmp_path: Path) -> None:
        targets = [note for note in NOTES if note != "a"]
        log = [("u", "a", 0), *(("u", note, 1) for note in targets)]
        pairs = run(tmp_path / "run", log)[1]
        assert [target for _, target, *_ in pairs] == sorted(targets)[:10]
        assert len(targets) > 10

    def test_a_sixth_is_cut_to_twelve_digits_and_summed_exactly(self, tmp_path: Path) -> None:
        log = [(f"u{user}", note, at) for user in range(3) for at, note in enumerate("abcdef")]
        assert run(tmp_path / "run", log)[1][0] == ("a", "b", 0.499999999998, 3, 1)

    def test_bounds_are_themselves_kept(self, tmp_path: Path) -> None:
        log = [("u", "a", 0), ("u", "b", 1)]
        assert len(run(tmp_path / "run", log, PairOptions(min_score=0.5, max_score=0.5))[1]) == 1
        assert run(tmp_path / "run", log, PairOptions(min_score=0.500000000001))[1] == []
        assert run(tmp_path / "run", log, PairOptions(max_score=0.499999999999))[1] == []

    def test_a_bot_of_hundreds_of_notes(self, tmp_path: Path) -> None:
        log = [("bot", f"n{place:05}", place) for place in range(700)]
        log += [("u", "n00000", 5), ("u", "n00699", 6)]
        found, pairs = run(tmp_path / "run", log, PairOptions(min_score=0))
        assert found.ordered_pairs == 700 * 699 // 2
        assert pairs[0] == ("n00000", "n00699", (10**12 // 700 + 10**12 // 2) / 10**12, 2, 1)
        assert run(tmp_path / "run", log, PairOptions(max_notes_per_user=699))[1] == formula(log[700:])


class TestCounts:
    @in_one_folder
    @given(log=many_logs(), options=all_options())
    def test_add_up(self, tmp_path: Path, log: list[Click], options: PairOptions) -> None:
        found, pairs = run(tmp_path / "run", log, options)
        assert len(log) == found.clicks + found.duplicates + found.power_clicks
        assert found.clicks == sum(day.clicks for day in found.days)
        assert found.users + found.power_users == len({user for user, _, _ in log})
        no_bounds = PairOptions(
            min_score=0, max_score=1000, top=1000, max_distance=options.max_distance, symmetric=options.symmetric,
            session_gap_ms=options.session_gap_ms, max_notes_per_user=options.max_notes_per_user,
        )  # fmt: skip
        everything = formula(log, no_bounds)
        assert found.ordered_pairs == len(everything)
        assert found.below_min == sum(pair[2] < options.min_score for pair in everything)
        assert found.above_max == sum(pair[2] > options.max_score for pair in everything)
        assert len(pairs) <= found.ordered_pairs - found.below_min - found.above_max

    def test_days_are_utc(self, tmp_path: Path) -> None:
        log = [("u", "a", DAY - 1), ("u", "b", DAY), ("v", "b", DAY), ("v", "a", DAY + 1)]
        days = [(day.day, day.clicks, day.users) for day in run(tmp_path / "run", log)[0].days]
        assert days == [("1970-01-01", 1, 1), ("1970-01-02", 3, 2)]


class TestEngine:
    def test_a_sum_beyond_64_bits_is_an_error(self) -> None:
        with duckdb.connect() as connection:
            connection.execute(f"CREATE TABLE moments AS {OVERFLOWING}")
            with pytest.raises(EngineError, match="duckdb gave up"), engine_errors():
                connection.execute(scores_sql(PairOptions()))

    def test_progress_ends_at_one(self, tmp_path: Path) -> None:
        shares: list[float] = []
        file = write_clicks([("u", "a", 1), ("u", "b", 2)], tmp_path / "clicks.parquet")
        DuckDBEngine(tmp_path).find_pairs(file, PairOptions(), tmp_path / "pairs", shares.append)
        assert shares[-1] == 1.0

    def test_leaves_only_the_pairs(self, tmp_path: Path) -> None:
        file = write_clicks([("u", "a", 1), ("u", "b", 2)], tmp_path / "clicks.parquet")
        DuckDBEngine(tmp_path).find_pairs(file, PairOptions(), tmp_path / "pairs")
        assert {path.name for path in tmp_path.iterdir()} == {"clicks.parquet", "pairs"}

    def test_spills_under_a_memory_limit(self, tmp_path: Path) -> None:
        log = [(f"u{user}", f"n{(user * 7 + at) % 5000}", at) for user in range(2000) for at in range(40)]
        file = write_clicks(log, tmp_path / "clicks.parquet")
        begin = time.monotonic()
        DuckDBEngine(tmp_path, threads=1, memory_limit="120MB").find_pairs(file, PairOptions(), tmp_path / "little")
        assert time.monotonic() - begin < 60
        DuckDBEngine(tmp_path).find_pairs(file, PairOptions(), tmp_path / "much")
        assert read_pairs(tmp_path / "little") == read_pairs(tmp_path / "much")

    def test_too_little_memory_says_what_helps(self, tmp_path: Path) -> None:
        log = [(f"u{user}", f"n{(user * 7 + at) % 5000}", at) for user in range(2000) for at in range(40)]
        file = write_clicks(log, tmp_path / "clicks.parquet")
        with pytest.raises(EngineError, match="--memory-limit"):
            DuckDBEngine(tmp_path, threads=1, memory_limit="2MB").find_pairs(file, PairOptions(), tmp_path / "pairs")

    @pytest.mark.parametrize("limit", ["4", "GB", "-4GB", "4GB; DROP", ""])
    def test_refuses_a_memory_limit_that_is_no_size(self, tmp_path: Path, limit: str) -> None:
        with pytest.raises(SettingsError, match=r"memory_limit.*is not allowed"):
            DuckDBEngine(tmp_path, memory_limit=limit).find_pairs(tmp_path / "x", PairOptions(), tmp_path / "pairs")


class TestOptions:
    @pytest.mark.parametrize(
        ("name", "value", "allowed"),
        [
            ("min_score", -0.1, "from 0"),
            ("min_score", float("nan"), "from 0"),
            ("max_score", float("inf"), "from 0"),
            ("max_score", 1e9, "from 0 to 9223372"),
            ("min_score", 1e-13, "12 decimals"),
            ("max_score", 0.001, "min_score is 0.01, above it"),
            ("top", 0, "at least 1"),
            ("max_distance", 0, "at least 1"),
            ("session_gap_ms", -1, "at least 0"),
            ("max_notes_per_user", 1, "at least 2"),
        ],
    )
    def test_say_what_is_allowed(self, name: str, value: float, allowed: str) -> None:
        with pytest.raises(SettingsError, match=f"{name}: .*is not allowed: .*{allowed}"):
            PairOptions(**{name: value})

    def test_scores_are_read_as_they_are_written(self) -> None:
        assert PairOptions(min_score=0.07).min_units == 70_000_000_000
