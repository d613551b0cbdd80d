"""A run's curves: a picture that opens, with each part's own lines in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread

from training import loss_plot
from training.loss_plot import plot_losses

CURVES = ("contrastive", "generative", "recall_at_1", "learning_rate")


def line(part: str, step: int, value: float) -> dict[str, Any]:
    names = CURVES if part == "train" else CURVES[:3]
    return {"part": part, "step": step, **dict.fromkeys(names, value)}


TRAIN = [line("train", step, float(step**2)) for step in range(1, 31)]
VALIDATION = [line("validation", 10, 50.0), line("validation", 20, 300.0)]


def pixels(file: Path, colour: str) -> int:
    image = imread(file)[:, :, :3]
    return int((np.abs(image - np.array(to_rgb(colour))).max(axis=2) < 0.02).sum())


def test_the_picture_opens_and_is_as_large_as_it_says(tmp_path: Path) -> None:
    plot_losses([*TRAIN, *VALIDATION], tmp_path / "loss.png")
    assert imread(tmp_path / "loss.png").shape == (715, 1100, 4)
    assert [file.name for file in tmp_path.iterdir()] == ["loss.png"]
    assert pixels(tmp_path / "loss.png", "#2a6fbb") > 300
    assert pixels(tmp_path / "loss.png", "#d9822b") > 100


def test_without_a_validation_part_there_is_no_curve_of_it_and_a_new_picture_replaces_the_old(tmp_path: Path) -> None:
    (tmp_path / "loss.png").write_bytes(b"an old picture")
    plot_losses(TRAIN, tmp_path / "loss.png")
    assert pixels(tmp_path / "loss.png", "#2a6fbb") > 300
    assert pixels(tmp_path / "loss.png", "#d9822b") == 0


def test_a_run_that_has_just_begun_is_a_picture_too(tmp_path: Path) -> None:
    plot_losses([], tmp_path / "none.png")
    plot_losses(TRAIN[:1], tmp_path / "one.png")
    assert imread(tmp_path / "none.png").shape == imread(tmp_path / "one.png").shape == (715, 1100, 4)


def test_each_curve_is_drawn_as_measured_and_as_the_mean_of_the_last_twenty_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []

    class Kept(Figure):
        def savefig(self, *arguments: Any, **named: Any) -> None:
            figures.append(self)
            super().savefig(*arguments, **named)

    monkeypatch.setattr(loss_plot, "Figure", Kept)
    plot_losses([*TRAIN, *VALIDATION], tmp_path / "loss.png")
    panels = figures[0].axes
    assert [panel.get_title("left").split(",")[0] for panel in panels] == [
        "contrastive loss", "generative loss", "recall@1 within the batch", "learning rate"
    ]  # fmt: skip
    for panel in panels:
        measured, mean, *looks = [np.array(drawn.get_xydata()).tolist() for drawn in panel.get_lines()]
        assert measured == [[step, step**2] for step in range(1, 31)]
        assert [x for x, _ in mean] == list(range(1, 31))
        assert mean[0][1] == 1
        assert mean[2][1] == pytest.approx((1 + 4 + 9) / 3)
        # 11^2 + ... + 30^2 = 9455 - 385
        assert mean[29][1] == pytest.approx((9455 - 385) / 20)
        assert looks == ([] if panel is panels[3] else [[[10, 50], [20, 300]]])
