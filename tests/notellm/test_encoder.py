"""The encoder, on tiny exported models: one vector and one set of tags per note, whatever it runs with."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from notellm.bundle import Bundle, Capabilities, TagLimits, describe_files, open_bundle, read_manifest
from notellm.bundle import bundle_id as id_of
from notellm.encoder import NoteEncoder
from notellm.errors import BundleError, ProviderMissing, RuntimeMissing
from notellm.graph_session import GraphOutput, GraphSession, Ints
from notellm.messages import Note
from tests.export.tiny import CATEGORIES, Tiny

BOUND = 1e-4
WORDS = ["kyoto", "旅行", "🍁", "a", "the maple leaves", '"', "\\", "\n", "[EMB]", "<|im_end|>", "é", " "]

contents = st.integers(0, 120).flatmap(lambda n: st.lists(st.sampled_from(WORDS), min_size=n, max_size=n)).map(" ".join)
notes = st.builds(
    Note,
    note_id=st.just("n1"),
    title=st.one_of(st.just(""), st.text(max_size=30), st.sampled_from(WORDS)),
    content=st.one_of(contents, st.text(max_size=80)),
    hashtags=st.lists(st.text(min_size=1, max_size=12), max_size=4),
)
batches = st.lists(notes, min_size=1, max_size=8)

FIXED = [
    Note(note_id="n0", title="Two days in Kyoto", content="Rent a bike.", hashtags=["kyoto"]),
    Note(note_id="n1", content="short"),
    Note(note_id="n2", title="旧书店", content="在城南的小巷里找到一家开了四十年的旧书店。" * 5, hashtags=["书店"]),
    Note(note_id="n3", hashtags=["only", "hashtags"]),
    Note(note_id="n4", title="long", content="every staircase feels like an insult. " * 40),
    Note(note_id="n5"),
]


@pytest.fixture(scope="session")
def bundle(untied: Tiny) -> Bundle:
    return open_bundle(untied.bundle)


@pytest.fixture(scope="session")
def session(bundle: Bundle) -> GraphSession:
    return GraphSession(bundle, "cpu", threads=1)


@pytest.fixture(scope="session")
def encoder(bundle: Bundle, session: GraphSession) -> NoteEncoder:
    return NoteEncoder(bundle, session, token_budget=2048, max_rows=32)


def with_manifest(bundle: Bundle, **changes: Any) -> Bundle:
    """The same model, read with another manifest."""
    return Bundle(bundle.path, msgspec.structs.replace(bundle.manifest, **changes))


# The traced graph can do everything, so it can also be driven as one that can do less.
LESS = [
    Capabilities(prefix_cache=False),
    Capabilities(multi_token_past=False),
    Capabilities(prefix_cache=False, multi_token_past=False),
]


def stacked(encoder: NoteEncoder, notes: Sequence[Note], *, embed_only: bool = True) -> np.ndarray[Any, Any]:
    return np.stack([note.embedding for note in encoder.encode(notes, embed_only=embed_only)])


# Embeddings


@settings(deadline=None, max_examples=25)
@given(batch=batches, token_budget=st.integers(1, 1500), max_rows=st.integers(1, 9), embed_only=st.booleans())
def test_a_note_has_the_same_embedding_in_any_batch_as_alone_and_in_its_own_place(
    bundle: Bundle,
    session: GraphSession,
    encoder: NoteEncoder,
    batch: list[Note],
    token_budget: int,
    max_rows: int,
    embed_only: bool,
) -> None:
    batching = NoteEncoder(bundle, session, token_budget=token_budget, max_rows=max_rows)
    together = stacked(batching, batch, embed_only=embed_only)
    alone = np.concatenate([stacked(encoder, [note]) for note in batch])
    np.testing.assert_allclose(together, alone, atol=BOUND)


@pytest.mark.parametrize("capabilities", LESS)
@settings(deadline=None, max_examples=10)
@given(batch=batches, token_budget=st.integers(1, 1500), embed_only=st.booleans())
def test_the_embedding_is_the_same_from_a_graph_that_can_do_less(
    bundle: Bundle,
    session: GraphSession,
    encoder: NoteEncoder,
    capabilities: Capabilities,
    batch: list[Note],
    token_budget: int,
    embed_only: bool,
) -> None:
    less = NoteEncoder(with_manifest(bundle, capabilities=capabilities), session, token_budget=token_budget, max_rows=9)
    alone = np.concatenate([stacked(encoder, [note]) for note in batch])
    np.testing.assert_allclose(stacked(less, batch, embed_only=embed_only), alone, atol=BOUND)


@settings(deadline=None, max_examples=25)
@given(order=st.permutations(range(len(FIXED))))
def test_results_come_in_the_order_of_the_notes(encoder: NoteEncoder, order: list[int]) -> None:
    straight = stacked(encoder, FIXED)
    shuffled = stacked(encoder, [FIXED[index] for index in order])
    np.testing.assert_allclose(shuffled, straight[order], atol=BOUND)


def test_notes_that_differ_have_embeddings_that_differ_by_far_more_than_the_bound(encoder: NoteEncoder) -> None:
    embeddings = stacked(encoder, FIXED)
    distances = np.abs(embeddings[:, None] - embeddings[None]).max(axis=2)
    assert distances[~np.eye(len(FIXED), dtype=bool)].min() > 100 * BOUND


@settings(deadline=None, max_examples=25)
@given(batch=batches)
def test_embeddings_are_finite_unit_vectors(encoder: NoteEncoder, batch: list[Note]) -> None:
    embeddings = stacked(encoder, batch)
    assert embeddings.shape == (len(batch), encoder.embedding_dim)
    assert embeddings.dtype == np.float32
    assert np.isfinite(embeddings).all()
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)


def test_embed_only_gives_the_full_embedding_and_no_tags(encoder: NoteEncoder) -> None:
    full = encoder.encode(FIXED)
    short = encoder.encode(FIXED, embed_only=True)
    assert all(note.tags is None for note in short)
    assert all(note.tags is not None for note in full)
    for one, other in zip(full, short, strict=True):
        np.testing.assert_allclose(one.embedding, other.embedding, atol=1e-6)


@pytest.mark.parametrize("embed_only", [True, False])
def test_no_notes_give_no_results(encoder: NoteEncoder, embed_only: bool) -> None:
    assert encoder.encode([], embed_only=embed_only) == []


def test_prompts_are_built_in_the_order_of_the_notes(encoder: NoteEncoder) -> None:
    assert encoder.build_prompts(FIXED) == [encoder.prompt(note) for note in FIXED]
    assert encoder.build_prompts([]) == []


def test_a_note_of_a_megabyte_is_read_as_far_as_its_budget_goes(encoder: NoteEncoder) -> None:
    text = "The maple leaves of Kyoto 红叶 " * 40_000
    whole, beginning = Note(note_id="n1", content=text), Note(note_id="n1", content=text[:5000])
    assert len(text.encode()) > 1_000_000
    assert encoder.prompt(whole) == encoder.prompt(beginning)
    np.testing.assert_array_equal(stacked(encoder, [whole]), stacked(encoder, [beginning]))


def test_a_megabyte_without_a_blank_fits_the_budget_too(encoder: NoteEncoder) -> None:
    note = Note(note_id="n1", title="x" * 512, content="叶" * 400_000, hashtags=["y" * 64] * 32)
    (encoded,) = encoder.encode([note])
    assert np.isfinite(encoded.embedding).all()


def test_a_stream_gives_every_note_first_its_embedding_and_then_its_tags(
    bundle: Bundle, session: GraphSession, encoder: NoteEncoder
) -> None:
    small = NoteEncoder(bundle, session, token_budget=2048, max_rows=2)
    streamed = list(small.stream([small.prompt(note) for note in FIXED]))
    first, second = streamed[::2], streamed[1::2]
    assert all(batch.tags is None for batch in first)
    assert [batch.indices for batch in first] == [batch.indices for batch in second]
    assert sorted(index for batch in first for index in batch.indices) == list(range(len(FIXED)))
    expected = encoder.encode(FIXED)
    for batch in second:
        assert batch.tags == [expected[index].tags for index in batch.indices]
        assert batch.embeddings.shape == (len(batch.indices), small.embedding_dim)


def test_threads_may_share_an_encoder(encoder: NoteEncoder) -> None:
    expected = [note.tags for note in encoder.encode(FIXED)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: encoder.encode(FIXED), range(8)))
    assert [[note.tags for note in result] for result in results] == [expected] * 8


# Tags


def test_tags_do_not_depend_on_the_batch(tied: Tiny, encoder: NoteEncoder) -> None:
    for one in (encoder, NoteEncoder.load(tied.bundle, "cpu", threads=1)):
        together = [note.tags for note in one.encode(FIXED)]
        assert together == [one.encode([note])[0].tags for note in FIXED]


@pytest.mark.parametrize("capabilities", LESS)
def test_tags_are_the_same_from_a_graph_that_can_do_less(
    bundle: Bundle, session: GraphSession, encoder: NoteEncoder, capabilities: Capabilities
) -> None:
    limited = with_manifest(bundle, capabilities=capabilities)
    less = NoteEncoder(limited, session, token_budget=2048, max_rows=32)
    assert [note.tags for note in less.encode(FIXED)] == [note.tags for note in encoder.encode(FIXED)]


def test_notes_whose_answer_ends_early_leave_the_others_as_they_were(bundle: Bundle, session: GraphSession) -> None:
    ids = bundle.manifest.token_ids
    # With every eleventh token ending an answer, the rows of a batch end at different steps.
    ends = msgspec.structs.replace(ids, special=sorted({*ids.special, *range(0, 400, 11)}))
    encoder = NoteEncoder(with_manifest(bundle, token_ids=ends), session, token_budget=4096, max_rows=32)
    several = [Note(note_id=f"n{number}", content=f"{WORDS[number % 7]} {number}") for number in range(24)]
    together = [note.tags for note in encoder.encode(several)]
    assert together == [encoder.encode([note])[0].tags for note in several]
    lengths = {sum(map(len, tags.hashtags)) for tags in together if tags is not None}
    assert len(lengths) > 2


@settings(deadline=None, max_examples=25)
@given(
    batch=batches,
    categories=st.lists(st.text(alphabet="ab 旅é🍁", min_size=1, max_size=6), min_size=1, max_size=12, unique=True),
)
def test_the_category_is_always_one_of_the_bundles(
    bundle: Bundle, session: GraphSession, batch: list[Note], categories: list[str]
) -> None:
    encoder = NoteEncoder(with_manifest(bundle, categories=categories), session, token_budget=2048, max_rows=32)
    for note in encoder.encode(batch):
        assert note.tags is not None
        assert note.tags.category in categories


@settings(deadline=None, max_examples=25)
@given(batch=batches)
def test_generated_hashtags_keep_to_their_limits(encoder: NoteEncoder, batch: list[Note]) -> None:
    for note, encoded in zip(batch, encoder.encode(batch), strict=True):
        assert encoded.tags is not None
        assert_hashtags_keep_to_their_limits(encoded.tags.hashtags, note.hashtags, most=5)


def assert_hashtags_keep_to_their_limits(tags: Sequence[str], author: Sequence[str], most: int) -> None:
    folded = [tag.casefold() for tag in tags]
    assert len(set(folded)) == len(tags) <= most
    assert not {tag.casefold() for tag in author} & set(folded)
    assert all(0 < len(tag) <= 64 and tag == tag.strip() and not tag.startswith("#") for tag in tags)


class Scribe(GraphSession):
    """The real graph, except that it writes given answers: after a guidance, one of its tokens at each step."""

    def __init__(self, graph: GraphSession, answers: Mapping[tuple[int, ...], Sequence[int]], end: int) -> None:
        self._graph = graph
        self._answers = answers
        self._end = end
        self._writing: list[int] = []
        self.runs = 0

    def empty_cache(self, rows: int) -> Any:
        return self._graph.empty_cache(rows)

    def run(self, input_ids: Ints, *args: Any, **options: Any) -> GraphOutput:
        self.runs += 1
        output = self._graph.run(input_ids, *args, **options)
        guidance = tuple(int(token) for token in input_ids[0])
        if guidance in self._answers:
            self._writing = list(self._answers[guidance])
        if output.logits is None:
            return output
        logits = output.logits.copy()
        logits[:, self._writing.pop(0) if self._writing else self._end] = 1000
        return replace(output, logits=logits)


def scribe(bundle: Bundle, session: GraphSession, *, hashtags: str = "", category: str = "") -> NoteEncoder:
    """An encoder whose model answers as told. All rows of a batch must be at the same step: give it one note."""
    manifest, prompts = bundle.manifest, NoteEncoder(bundle, session, token_budget=1, max_rows=1).prompts
    answers = {
        tuple(prompts.hashtags_ids): prompts.encode_answer(hashtags),
        tuple(prompts.category_ids): prompts.encode_answer(manifest.template.answer_prefix + category),
    }
    graph = Scribe(session, answers, manifest.token_ids.eos[0])
    return NoteEncoder(bundle, graph, token_budget=2048, max_rows=32)


@pytest.mark.parametrize("category", CATEGORIES)
def test_every_category_can_be_chosen_also_one_that_begins_another(
    bundle: Bundle, session: GraphSession, category: str
) -> None:
    (encoded,) = scribe(bundle, session, category=category).encode([FIXED[0]])
    assert encoded.tags is not None
    assert encoded.tags.category == category


@pytest.mark.parametrize("category", ["nothing of the kind", "artful", ""])
def test_a_model_that_wants_another_category_gets_one_of_the_bundles(
    bundle: Bundle, session: GraphSession, category: str
) -> None:
    (encoded,) = scribe(bundle, session, category=category).encode([FIXED[0]])
    assert encoded.tags is not None
    assert encoded.tags.category in CATEGORIES


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (" autumn, maple leaves", ["autumn", "maple leaves"]),
        (" #autumn #maple\nThe category is: travel", ["autumn", "maple"]),
        (" #ＫＹＯＴＯ!, autumn", ["autumn"]),
        (' autumn, maple". The category is: travel', ["autumn", "maple"]),
        ("：秋天、红叶，京都。", ["秋天", "红叶", "京都"]),
        (" Autumn, maple, AUTUMN, never read", ["Autumn", "maple"]),
        (f" {'x' * 65}, short", ["short"]),
        (" one, two, three, four, five, six, seven", ["one", "two", "three", "four", "five"]),
        ("", []),
        (" , ,, #, ##", []),
    ],
)
def test_what_the_model_writes_becomes_hashtags(
    bundle: Bundle, session: GraphSession, answer: str, expected: list[str]
) -> None:
    patient = with_manifest(bundle, tag_limits=TagLimits(hashtag_tokens=200))
    (encoded,) = scribe(patient, session, hashtags=answer).encode([FIXED[0]])
    assert encoded.tags is not None
    assert encoded.tags.hashtags == expected


@pytest.mark.parametrize("end", ["eos", "emb"])
def test_a_special_token_ends_the_answer(bundle: Bundle, session: GraphSession, end: str) -> None:
    ids, prompts = bundle.manifest.token_ids, NoteEncoder(bundle, session, token_budget=1, max_rows=1).prompts
    token = ids.eos[0] if end == "eos" else ids.emb
    answer = [*prompts.encode_answer("autumn"), token, *prompts.encode_answer(", never")]
    graph = Scribe(session, {tuple(prompts.hashtags_ids): answer}, ids.eos[0])
    (encoded,) = NoteEncoder(bundle, graph, token_budget=2048, max_rows=32).encode([FIXED[0]])
    assert encoded.tags is not None
    assert encoded.tags.hashtags == ["autumn"]


def test_a_hashtag_that_is_cut_inside_a_character_is_dropped(bundle: Bundle, session: GraphSession) -> None:
    answer = "a,🍁🍁🍁🍁🍁🍁🍁🍁"
    results = set()
    for tokens in range(1, 12):
        short = with_manifest(bundle, tag_limits=TagLimits(hashtag_tokens=tokens))
        (encoded,) = scribe(short, session, hashtags=answer).encode([FIXED[0]])
        assert encoded.tags is not None
        results.add(tuple(encoded.tags.hashtags))
    assert {("a",), ("a", "🍁")} <= results
    assert not any("\ufffd" in tag for tags in results for tag in tags)


@pytest.mark.parametrize("limit", [0, 1, 2, 7])
def test_the_model_writes_no_more_tokens_than_allowed(bundle: Bundle, session: GraphSession, limit: int) -> None:
    limited = with_manifest(bundle, tag_limits=TagLimits(hashtag_tokens=limit), categories=["only"])
    writer = scribe(limited, session, hashtags=" abcdefgh" * 9)
    graph = writer._graph
    assert isinstance(graph, Scribe)
    before = graph.runs
    writer.encode([FIXED[0]])
    # The prompt, the guidance and, but for the last token that is written, one run per token.
    assert graph.runs - before == 2 + max(limit - 1, 0)


def test_a_model_that_has_written_enough_is_stopped(bundle: Bundle, session: GraphSession) -> None:
    one_category = with_manifest(bundle, tag_limits=TagLimits(hashtag_tokens=200), categories=["only"])
    runs = []
    for answer in ("a,b,c,d,e,", "a,b,c,d,e," + "f," * 50, "a,b,c,d,e,\n" + "f" * 50):
        writer = scribe(one_category, session, hashtags=answer)
        graph = writer._graph
        assert isinstance(graph, Scribe)
        writer.encode([FIXED[0]])
        runs.append(graph.runs)
    assert len(set(runs)) == 1


# What cannot start


def test_a_provider_that_this_onnxruntime_lacks_is_an_error(untied: Tiny) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA; the next test holds for it")
    with pytest.raises(ProviderMissing, match=r"pip install 'notellm\[gpu\]'"):
        NoteEncoder.load(untied.bundle, "cuda")


def test_a_cuda_that_would_silently_become_the_cpu_is_an_error(untied: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    class WithoutGpu(onnxruntime.InferenceSession):  # type: ignore[misc]
        """As onnxruntime-gpu behaves where there is no GPU: no error, only another provider."""

        def __init__(self, path: str, options: Any, providers: list[tuple[str, dict[str, str]]]) -> None:
            assert [name for name, _ in providers] == ["CUDAExecutionProvider"]
            super().__init__(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", WithoutGpu)
    with pytest.raises(ProviderMissing, match="is there a GPU"):
        NoteEncoder.load(untied.bundle, "cuda")


def test_the_encoder_names_the_provider_it_runs_on(encoder: NoteEncoder) -> None:
    assert encoder.provider == "cpu"


def test_without_onnxruntime_the_error_names_both_ways_to_install_it(
    untied: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RuntimeMissing) as caught:
        NoteEncoder.load(untied.bundle)
    assert "pip install 'notellm[cpu]'" in str(caught.value)
    assert "pip install 'notellm[gpu]'" in str(caught.value)


def test_a_bundle_whose_prompt_is_longer_than_its_model_reads_is_refused(bundle: Bundle, session: GraphSession) -> None:
    longest = max(
        positions
        for positions in range(100, 1024)
        if not opens(with_manifest(bundle, max_positions=positions), session)
    )
    fits = with_manifest(bundle, max_positions=longest + 1)
    fullest = Note(note_id="n1", title="叶" * 512, hashtags=["é" * 64] * 32, content="叶" * 1000)
    encoder = NoteEncoder(fits, session, token_budget=2048, max_rows=32)
    used = len(encoder.prompts.prefix_ids) + len(encoder.prompt(fullest).ids) + len(encoder.prompts.hashtags_ids)
    assert longest - 10 < used + bundle.manifest.tag_limits.hashtag_tokens <= longest + 1
    with pytest.raises(BundleError, match=r"prompt and answer may have \d+ tokens.*--note-tokens"):
        NoteEncoder(with_manifest(bundle, max_positions=longest), session, token_budget=1, max_rows=1)


def opens(bundle: Bundle, session: GraphSession) -> bool:
    try:
        NoteEncoder(bundle, session, token_budget=1, max_rows=1)
    except BundleError:
        return False
    return True


def test_a_bundle_whose_graph_is_not_the_manifests_is_refused(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="the graph's inputs differ from the manifest's"):
        GraphSession(with_manifest(bundle, inputs=bundle.manifest.inputs[:-1]), "cpu", threads=1)


def test_a_graph_that_onnxruntime_cannot_load_is_one_line(untied: Tiny, tmp_path: Path) -> None:
    folder = shutil.copytree(untied.bundle, tmp_path / "bundle")
    (folder / "model.onnx").write_bytes(b"not a graph")
    files = describe_files(folder)
    manifest = msgspec.structs.replace(read_manifest(folder), files=files, bundle_id=id_of(files))
    (folder / "notellm.json").write_bytes(msgspec.json.encode(manifest))
    with pytest.raises(BundleError, match="onnxruntime cannot load it") as caught:
        NoteEncoder.load(folder, "cpu")
    assert "\n" not in str(caught.value)


# The real model


@pytest.mark.real_model
def test_the_real_model_gives_a_note_the_same_result_in_a_batch_as_alone(real_bundle: Path) -> None:
    encoder = NoteEncoder.load(real_bundle, "cpu")
    batch = FIXED[:4]
    together = encoder.encode(batch)
    for note, encoded in zip(batch, together, strict=True):
        (alone,) = encoder.encode([note])
        np.testing.assert_allclose(encoded.embedding, alone.embedding, atol=BOUND)
        assert encoded.tags is not None
        assert encoded.tags.category in encoder.bundle.manifest.categories
        assert_hashtags_keep_to_their_limits(encoded.tags.hashtags, note.hashtags, most=5)
