"""The encoder's thread: changes in, rows to write out. Runs the model only where the text is new."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from queue import Empty, Queue
from threading import Event, Lock

import numpy as np
from prometheus_client import Counter, Histogram

from consumers.backoff import until_available
from consumers.changes import Change, Outcome, Report, by_key
from consumers.protocols import DeadLetters, Encoder, Floats, Row, Sink, StoredRow
from notellm.encoder import Tags
from notellm.errors import NoteRefused
from notellm.messages import Note
from notellm.prompt import Prompt
from notellm.settings import UpdaterSettings

__all__ = ["EncodeStage", "Write"]

log = logging.getLogger(__name__)

ENCODED = Counter("notellm_notes_encoded_total", "Notes by how their row was made.", ["how"])
ENCODE_SECONDS = Histogram("notellm_encode_seconds", "Seconds the model took for one take of the queue.")


@dataclass(frozen=True)
class Write:
    """One row to upsert, or a deletion where ``row`` is None, and the versions of the note that it settles.

    ``first``: this write makes the version searchable. ``final``: once it is acknowledged, the versions are safe.
    """

    versions: list[Change]
    row: Row | None
    first: bool = True
    final: bool = True

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
            with self._model:
                prompts = {note_id: self._encoder.prompt(_note(versions[-1])) for note_id, versions in pending.items()}
            stored = self._stored(list(pending))
            reused = [
                Write(pending.pop(note_id), self._reuse(versions[-1], prompts[note_id], stored[note_id]))
                for note_id, versions in list(pending.items())
                if note_id in stored and stored[note_id].text_hash == prompts[note_id].text_hash
            ]
            ENCODED.labels("reused").inc(len(reused))
            put(reused)
            try:
                self._run_model(pending, prompts, stored, put)
            except NoteRefused as refused:
                self._refuse(pending, list(pending)[refused.index], refused)

    def _stored(self, note_ids: list[str]) -> Mapping[str, StoredRow]:
        if not note_ids:
            return {}
        return until_available(
            lambda: self._sink.stored(note_ids), stop=self._stop, longest_wait_s=self._settings.retry_max_s
        )

    def _run_model(
        self,
        pending: dict[str, list[Change]],
        prompts: Mapping[str, Prompt],
        stored: Mapping[str, StoredRow],
        put: Callable[[list[Write]], None],
    ) -> None:
        if not pending:
            return
        note_ids = list(pending)
        done: set[str] = set()
        try:
            with self._model, ENCODE_SECONDS.time():
                for batch in self._encoder.stream([prompts[note_id] for note_id in note_ids]):
                    _refuse_what_is_not_finite(batch.indices, batch.embeddings)
                    if batch.tags is None and not self._settings.vectors_first:
                        continue
                    writes: list[Write] = []
                    for place, index in enumerate(batch.indices):
                        note_id, embedding = note_ids[index], batch.embeddings[place]
                        versions = pending[note_id]
                        if batch.tags is None:
                            row = self._untagged(versions[-1], embedding, stored.get(note_id))
                            writes.append(Write(versions, row, final=False))
                        else:
                            row = self._row(versions[-1], embedding, batch.tags[place], prompts[note_id].text_hash)
                            writes.append(Write(versions, row, first=not self._settings.vectors_first))
                            done.add(note_id)
                    put(writes)
        except NoteRefused as refused:
            # The rows before it are on their way; the index must fit what is left.
            left = [note_id for note_id in note_ids if note_id not in done]
            raise NoteRefused(left.index(note_ids[refused.index]), str(refused)) from refused
        finally:
            for note_id in done:
                del pending[note_id]
            ENCODED.labels("model").inc(len(done))

    def _refuse(self, pending: dict[str, list[Change]], note_id: str, error: NoteRefused) -> None:
        versions = pending.pop(note_id)
        refused = versions[-1]
        log.warning("the model refuses note %r at offset %d: %s", note_id, refused.record.offset, error)
        self._dead_letters.send(
            refused.record,
            stage="TASK_PUT",
            reason="model_refused",
            error=error,
            delivered=lambda: self._report(Outcome(refused.lease, refused.record.offset, safe=True)),
        )
        if len(versions) > 1:
            pending[note_id] = versions[:-1]

    def _reuse(self, change: Change, prompt: Prompt, stored: StoredRow) -> Row:
        tags = Tags(stored.generated_hashtags, stored.generated_category)
        return self._row(change, stored.embedding, tags, prompt.text_hash)

    def _untagged(self, change: Change, embedding: Floats, stored: StoredRow | None) -> Row:
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
