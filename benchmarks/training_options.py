"""What a person types for a training, in the benchmarks that train."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from pydantic import ValidationError

from notellm.errors import NoteLLMError
from notellm.settings import TrainingSettings

__all__ = ["check_rows", "one_line_errors", "parse_changes"]


def parse_changes(given: Iterable[str]) -> dict[str, str]:
    """``name=value`` of --set; the seed has an option of its own."""
    allowed = [name for name in TrainingSettings.model_fields if name != "seed"]
    changes = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or name not in allowed:
            raise SystemExit(f"--set: {text!r} is not allowed; allowed is name=value with one of {', '.join(allowed)}")
        changes[name] = value
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
