"""What a person types for a training, in the benchmarks that train."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from pydantic import ValidationError

from commands.train import parse_changes
from notellm.errors import NoteLLMError, SettingsError

__all__ = ["changes_but_the_seed", "check_rows", "one_line_errors"]


def changes_but_the_seed(given: Iterable[str]) -> dict[str, str]:
    """As ``notellm train`` reads --set; the seed has an option of its own. Raises :class:`SettingsError`."""
    changes = parse_changes(given)
    if "seed" in changes:
        raise SettingsError(f"--set: 'seed={changes['seed']}' is not allowed; give --seed")
    return changes


def check_rows(given: Iterable[str], allowed: Iterable[str]) -> None:
    if unknown := sorted(set(given) - set(allowed)):
        raise SystemExit(f"--row: {unknown[0]!r} is not allowed; allowed: {', '.join(allowed)}")


@contextmanager
def one_line_errors(*more: type[Exception]) -> Iterator[None]:
    """What a person can mend is said in one line."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        raise SystemExit(f"--set: {first['loc'][0]}={first['input']}: {first['msg']}") from None
    except (NoteLLMError, *more) as error:
        raise SystemExit(str(error)) from None
