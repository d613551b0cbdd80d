"""Who looks on while a training runs. No torch: a command may import it at once."""

from __future__ import annotations

from typing import Any

__all__ = ["Watch"]


class Watch:
    """Who looks on. The default is nobody; a command shows lines and bars."""

    def say(self, line: str) -> None:
        """Something happened."""

    def metrics(self, line: dict[str, Any]) -> None:
        """A line of metrics.jsonl was written."""

    def wants_to_stop(self) -> bool:
        """Asked after every step; True ends the training with a state to go on from."""
        return False
