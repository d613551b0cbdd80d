"""``notellm publish``: notes from a file or standard input to Kafka."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, BinaryIO

import msgspec
import typer
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from commands.console import err, fail
from commands.options import ConfigOption, KafkaOption, settings_from
from commands.publisher import NotePublisher
from notellm.decoding import check_id
from notellm.errors import InvalidMessage, NoteLLMError
from notellm.messages import parse_record

__all__ = ["publish"]


class _Identity(msgspec.Struct):
    note_id: str


_identity = msgspec.json.Decoder(_Identity)


def publish(
    file: Annotated[Path | None, typer.Argument(help="JSON Lines, one note a line; '-' is standard input.")] = None,
    delete: Annotated[
        list[str] | None,
        typer.Option("--delete", help="Delete this note: a tombstone. May be repeated.", envvar="NOTELLM_CLI_DELETE"),
    ] = None,
    config: ConfigOption = None,
    kafka: KafkaOption = None,
) -> None:
    """Publish notes, or delete some. A line that is no note is named and left out; the exit status is then 1.

    \b
    Examples:
      notellm publish data/notes.jsonl
      echo '{"note_id": "n1", "title": "Two days in Kyoto"}' | notellm publish -
      notellm publish --delete n1 --delete n2
    """  # noqa: D301 - the \\b is meant: it keeps the lines of the examples apart
    if file is None and not delete:
        fail("FILE: missing; give a file, '-' for standard input, or --delete NOTE_ID")
    for note_id in delete or []:
        check_id(note_id, "--delete")
    stream = _open(file) if file is not None else None
    publisher = NotePublisher(settings_from(config, kafka=kafka).kafka)
    published = wrong = 0
    with _progress() as progress:
        for number, line in _lines(stream, progress) if stream is not None else ():
            try:
                publisher.publish(_key_of(line), line)
                published += 1
            except InvalidMessage as error:
                wrong += 1
                err.print(f"[yellow]line {number} left out:[/] {escape(str(error))}", highlight=False)
        for note_id in delete or []:
            publisher.publish(note_id.encode(), None)
        publisher.flush()
    err.print(f"published {published} notes" + (f", deleted {len(delete)}" if delete else ""))
    if wrong:
        fail(f"{wrong} lines are no notes and were left out; see above")


def _key_of(line: bytes) -> bytes:
    """The record's key, once the line has passed the same door as on the other side."""
    try:
        key = _identity.decode(line).note_id.encode()
    except msgspec.MsgspecError:
        key = b"?"  # the door finds the better words
    parse_record(key, line, int(time.time() * 1000))
    return key


def _open(file: Path) -> BinaryIO:
    if str(file) == "-":
        return sys.stdin.buffer
    try:
        return file.open("rb")
    except OSError as error:
        raise NoteLLMError(f"FILE: {file} cannot be read: {error.strerror}") from None


def _lines(stream: BinaryIO, progress: Progress) -> Iterator[tuple[int, bytes]]:
    """Line by line, however large the file is; blank ones are skipped."""
    size = None if stream is sys.stdin.buffer else os.fstat(stream.fileno()).st_size
    task = progress.add_task("publishing", total=size)
    with stream:
        for number, line in enumerate(stream, 1):
            progress.advance(task, len(line))
            if line.strip():
                yield number, line.rstrip(b"\r\n")


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    return Progress(*columns, console=err, transient=True)
