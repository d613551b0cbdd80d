"""What the demo's model is worth: its hashtags, categories and neighbours on notes that it did not learn from."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from commands.console import err
from commands.encoders import load_encoder
from commands.evaluate import read_data, show, show_progress
from notellm.settings import EncoderSettings

__all__ = ["held_out_metrics"]


def held_out_metrics(settings: EncoderSettings, notes: Path, split: Path) -> dict[str, float | int]:
    """Prints a table, and returns it flat; nothing where there is no split of ``notes``, or no evaluation installed."""
    if not split.is_file():
        return {}
    try:
        from training.evaluation.evaluation import Systems, evaluate  # noqa: PLC0415 - takes seconds, and an extra
        from training.evaluation.report import flat_report  # noqa: PLC0415
    except ModuleNotFoundError as error:
        err.print(f"no metrics of the held-out notes: evaluation needs {error.name}", highlight=False)
        return {}
    encoder = load_encoder(settings)
    data = read_data(encoder.bundle.manifest.categories, notes, split=split)
    with show_progress() as tell:
        found = evaluate(Systems(encoder, baselines=False), data, seed=0, progress=partial(tell))
    show(found)
    return flat_report(found)
