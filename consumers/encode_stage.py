"""The encoder's thread: changes in, rows to write out. Runs the model only where the text is new."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from queue import Empty, Queue
from threading import Event, Lock

import numpy as np
from prometheus_client import Counter, Histogram

from consumers.backoff import Patience
from consumers.changes import Change, Outcome, Report, by_key
from consumers.protocols import DeadLetters, Encoder, Floats, Row, Sink
from notellm.encoder import Tags
from notellm.errors import NoteRefused
from notellm.messages import Note
from notellm.prompt import Prompt
from notellm.settings import UpdaterSettings

__all__ = ["EncodeStage", "Refusal", "Write", "without_tags"]

log = logging.getLogger(__name__)

ENCODED = Counter("notellm_notes_encoded_total", "Notes by how their row was made.", ["how"])
ENCODE_SECONDS = Histogram("notellm_encode_seconds", "Seconds the model took for one take of the queue.")


@dataclass(frozen=True)
class Refusal:
    """Who would not have a version, as a dead letter's reason, and why."""

    reason: str
    error: Exception


@dataclass(frozen=True)
class Write:
    """One row to upsert, or a deletion where ``row`` is None, and the versions of the note that it settles.

    ``first``: this write makes the version searchable. ``final``: once it is acknowledged, the versions are safe.
    ``refused``: why the newest version has a vector but no tags; it becomes a dead letter once it is written.
    """

    versions: list[Change]
    row: Row | None
    first: bool = True
    final: bool = True
    refused: Refusal | None = None

    @property
    def newest(self) -> Change:
        return self.versions[-1]


class EncodeStage:
    """Takes what the queue holds, up to a batch; the last value of a key wins inside it."""

    def __init__(
        self,
        encoder: Encoder,
        sink: Sink,
        dead_letters: DeadLetters,
        settings: UpdaterSettings,
        *,
        source_epoch: str,
        report: Report,
        patience: Patience,
        stop: Event,
    ) -> None:
        # Both are bounded by the poller, which pauses its partitions. A bound on the outbox would let this thread wait
        # for the writer with the model in its hands, while the writer waits for the model in settle().
        self.inbox: Queue[Change] = Queue()
        self.outbox: Queue[list[Write]] = Queue()
        self._model = Lock()
        self._encoder = encoder
        self._sink = sink
        self._dead_letters = dead_letters
        self._settings = settings
        self._source_epoch = source_epoch
        self._report = report
        self._patience = patience
        self._stop = stop

    def run(self) -> None:
        """Until ``stop`` is set."""
        while not self._stop.is_set():
            taken = self._take()
            if taken:
                self._encode(by_key(taken), self._put)

    def settle(self, versions: list[Change]) -> list[Write]:
        """What to write for one note, whose newest version was refused and taken off. The writer's thread calls it."""
        writes: list[Write] = []
        self._encode({versions[-1].note_id: versions}, writes.extend)
        return [replace(write, first=True) for write in writes if write.final]

    def _take(self) -> list[Change]:
        taken: list[Change] = []
        try:
            taken.append(self.inbox.get(timeout=0.1))
            while len(taken) < self._settings.batch_notes:
                taken.append(self.inbox.get_nowait())
        except Empty:
            pass
        kept: list[Change] = []
        for change in taken:
            # Asked once per change: the poller may set it at any moment, and a change is either begun or abandoned.
            if change.lease.draining:
                self._report(Outcome(change.lease, change.record.offset, safe=False))
            else:
                kept.append(change)
        return kept

    def _put(self, writes: list[Write]) -> None:
        if writes:
            self.outbox.put(writes)

    def _encode(self, pending: dict[str, list[Change]], put: Callable[[list[Write]], None]) -> None:
        """Make the writes for every note in ``pending``; a version that is refused gives way to the one before it."""
        while pending:
            put([Write(pending.pop(note_id), None) for note_id in _deletions(pending)])
            embedded: dict[str, Floats] = {}
            try:
                prompts = self._prompts(pending)
                stored = self._stored(list(pending))
                put(self._reuse_what_has_not_changed(pending, prompts, stored))
                self._patience.until_available(lambda: self._run_model(pending, prompts, stored, embedded, put))  # noqa: B023
            except NoteRefused as refused:
                put(self._refuse(pending, list(pending)[refused.index], refused, embedded))

    def _prompts(self, pending: Mapping[str, list[Change]]) -> dict[str, Prompt]:
        notes = [_note(versions[-1]) for versions in pending.values()]

        def build() -> list[Prompt]:
            with self._model:
                return self._encoder.build_prompts(notes)

        return dict(zip(pending, self._patience.until_available(build), strict=True)) if notes else {}

    def _stored(self, note_ids: list[str]) -> Mapping[str, Row]:
        return self._patience.until_available(lambda: self._sink.stored(note_ids)) if note_ids else {}

    def _reuse_what_has_not_changed(
        self, pending: dict[str, list[Change]], prompts: Mapping[str, Prompt], stored: Mapping[str, Row]
    ) -> list[Write]:
        reused = [
            Write(pending.pop(note_id), self._reuse(versions[-1], stored[note_id]))
            for note_id, versions in list(pending.items())
            if note_id in stored and stored[note_id].text_hash == prompts[note_id].text_hash
        ]
        ENCODED.labels("reused").inc(len(reused))
        return reused

    def _run_model(
        self,
        pending: dict[str, list[Change]],
        prompts: Mapping[str, Prompt],
        stored: Mapping[str, Row],
        embedded: dict[str, Floats],
        put: Callable[[list[Write]], None],
    ) -> None:
        """Encode what is pending, and take off it what is done."""
        if not pending:
            return
        note_ids = list(pending)
        done: set[str] = set()
        try:
            with self._model, ENCODE_SECONDS.time():
                for batch in self._encoder.stream([prompts[note_id] for note_id in note_ids]):
                    _refuse_what_is_not_finite(batch.indices, batch.embeddings)
                    writes: list[Write] = []
                    for place, index in enumerate(batch.indices):
                        note_id, embedding = note_ids[index], batch.embeddings[place]
                        versions = pending[note_id]
                        if batch.tags is not None:
                            row = self._row(versions[-1], embedding, batch.tags[place], prompts[note_id].text_hash)
                            writes.append(Write(versions, row, first=not self._settings.vectors_first))
                            done.add(note_id)
                        elif note_id not in embedded:
                            embedded[note_id] = embedding
                            row = self._untagged(versions[-1], embedding, stored.get(note_id))
                            writes += [Write(versions, row, final=False)] if self._settings.vectors_first else []
                    put(writes)
        except NoteRefused as refused:
            # The rows before it are on their way; the index must fit what is left.
            left = [note_id for note_id in note_ids if note_id not in done]
            raise NoteRefused(left.index(note_ids[refused.index]), str(refused)) from refused
        finally:
            for note_id in done:
                del pending[note_id]
            ENCODED.labels("model").inc(len(done))

    def _refuse(
        self, pending: dict[str, list[Change]], note_id: str, error: NoteRefused, embedded: Mapping[str, Floats]
    ) -> list[Write]:
        """The newest version becomes a dead letter. One that has its vector stays searchable, only without tags."""
        versions = pending.pop(note_id)
        refused = versions[-1]
        log.warning("the model refuses note %r at offset %d: %s", note_id, refused.record.offset, error)
        if note_id in embedded:
            row = self._row(refused, embedded[note_id], Tags([], ""), text_hash="")
            first = not self._settings.vectors_first
            return [Write(versions, row, first=first, refused=Refusal(reason="tags_refused", error=error))]
        self._dead_letters.send(
            refused.record,
            stage="TASK_PUT",
            reason="model_refused",
            error=error,
            delivered=lambda: self._report(Outcome(refused.lease, refused.record.offset, safe=True)),
        )
        if len(versions) > 1:
            pending[note_id] = versions[:-1]
        return []

    def _reuse(self, change: Change, stored: Row) -> Row:
        tags = Tags(stored.generated_hashtags, stored.generated_category)
        return self._row(change, stored.embedding, tags, stored.text_hash)

    def _untagged(self, change: Change, embedding: Floats, stored: Row | None) -> Row:
        """The row while its tags are being written: it keeps the last version's, and no text_hash vouches for them."""
        tags = Tags(stored.generated_hashtags, stored.generated_category) if stored else Tags([], "")
        return self._row(change, embedding, tags, text_hash="")

    def _row(self, change: Change, embedding: Floats, tags: Tags, text_hash: str) -> Row:
        note, record = _note(change), change.record
        return Row(
            note_id=note.note_id,
            embedding=embedding,
            title=note.title,
            hashtags=note.hashtags,
            category=note.category,
            generated_hashtags=tags.hashtags,
            generated_category=tags.category,
            published_at=note.published_at,
            model_version=self._encoder.model_version,
            text_hash=text_hash,
            source_epoch=self._source_epoch,
            source_partition=record.partition,
            source_offset=record.offset,
            attributes=note.attributes,
        )


def without_tags(row: Row) -> Row:
    """As it is kept where its tags cannot be had; no text_hash, so that the note's next edit is tried again."""
    return replace(row, generated_hashtags=[], generated_category="", text_hash="")


def _deletions(pending: Mapping[str, list[Change]]) -> list[str]:
    return [note_id for note_id, versions in pending.items() if versions[-1].note is None]


def _note(change: Change) -> Note:
    assert change.note is not None
    return change.note


def _refuse_what_is_not_finite(indices: Iterable[int], embeddings: Floats) -> None:
    """Milvus Lite takes NaN without a word, and such a row can never be found."""
    for embedding, index in zip(embeddings, indices, strict=True):
        if not np.isfinite(embedding).all():
            raise NoteRefused(index, "the model's embedding is not finite")
