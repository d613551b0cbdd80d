"""An evaluation as flat JSON, and as bars."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from training.evaluation.bootstrap import Interval, bootstrap_means
from training.evaluation.evaluation import Evaluation
from training.evaluation.plot import plot_evaluation
from training.evaluation.report import flat_report

BLUE, GREY = (0x2A, 0x6F, 0xBB), (0xC9, 0xCE, 0xD6)
HALF = Interval(0.5, 0.25, 1.0)


def evaluation(systems: Mapping[str, dict[str, Interval]]) -> Evaluation:
    return Evaluation(systems, {}, {})


def test_one_number_per_key() -> None:
    found = Evaluation(
        systems={"notellm": {"hashtags.f1": Interval(1 / 3, 0.2, 0.4), "hashtags.bleu4": Interval(0.5, 0.5, 0.5)}}
        | {"tfidf": {"hashtags.f1": HALF}},
        differences={"tfidf": {"i2i.mrr": Interval(-0.1, -0.2, 0.1)}},
        counts={"hashtags.notes": 7},
    )
    assert flat_report(found) == {
        "hashtags.f1": 0.333333,
        "hashtags.f1.low": 0.2,
        "hashtags.f1.high": 0.4,
        "hashtags.bleu4": 0.5,
        "baselines.tfidf.hashtags.f1": 0.5,
        "baselines.tfidf.hashtags.f1.low": 0.25,
        "baselines.tfidf.hashtags.f1.high": 1.0,
        "differences.tfidf.i2i.mrr": -0.1,
        "differences.tfidf.i2i.mrr.low": -0.2,
        "differences.tfidf.i2i.mrr.high": 0.1,
        "counts.hashtags.notes": 7,
    }


def pixels(file: Path) -> np.ndarray:
    return (matplotlib.image.imread(file)[:, :, :3] * 255).round().astype(int)


def bar(image: np.ndarray, colour: tuple[int, int, int]) -> int:
    """The length of the longest bar of that colour, in pixels."""
    return int((image == colour).all(axis=2).sum(axis=1).max())


def test_bars_are_as_long_as_their_values_and_the_model_is_blue(tmp_path: Path) -> None:
    point, thrice = Interval(0.2, 0.2, 0.2), Interval(0.6, 0.6, 0.6)
    systems = {"notellm": {"hashtags.f1": point}, "tfidf": {"hashtags.f1": thrice}}
    plot_evaluation(evaluation(systems), tmp_path / "e.png")
    image = pixels(tmp_path / "e.png")
    assert bar(image, GREY) == pytest.approx(3 * bar(image, BLUE), rel=0.05)
    assert [file.name for file in tmp_path.iterdir()] == ["e.png"]


def test_there_is_a_panel_for_what_was_asked(tmp_path: Path) -> None:
    heights = []
    asked = [["hashtags.f1"], ["hashtags.f1", "i2i.recall_at_10", "category.accuracy", "i2i.mrr"]]
    for number, names in enumerate(asked):
        plot_evaluation(evaluation({"notellm": dict.fromkeys(names, HALF)}), tmp_path / f"{number}.png")
        heights.append(len(pixels(tmp_path / f"{number}.png")))
    # One row of panels, and two: i2i.mrr is not drawn.
    assert heights == [int(2.9 * 110), int(5.2 * 110)]


def test_values_that_are_all_the_same_are_drawn(tmp_path: Path) -> None:
    # By rounding, the mean of twelve times 0.6 is a little less than all that was drawn.
    [interval] = bootstrap_means(np.full(12, 0.6), seed=0)
    assert interval is not None
    assert interval.value < interval.low
    plot_evaluation(evaluation({"notellm": {"hashtags.f1": interval}}), tmp_path / "e.png")
    assert bar(pixels(tmp_path / "e.png"), BLUE) > 100


def test_nothing_to_draw_is_an_empty_picture(tmp_path: Path) -> None:
    plot_evaluation(evaluation({"notellm": {}}), tmp_path / "e.png")
    assert (pixels(tmp_path / "e.png") == 255).all()
