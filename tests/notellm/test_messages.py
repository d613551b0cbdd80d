"""The door of the ``notes`` topic: strict about identity and types, lenient about size."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from notellm.errors import InvalidMessage
from notellm.messages import (
    LIMITS,
    NoteRecord,
    NoteVector,
    Tombstone,
    encode_note_vector,
    parse_note_vector,
    parse_record,
)

NOW = 1_700_000_000_000
REASONS = {"no_key", "bad_id", "key_mismatch", "not_json", "not_object", "wrong_type", "not_finite", "no_text"}


def value(**fields: Any) -> bytes:
    return json.dumps({"note_id": "n1", "title": "Tea", **fields}, ensure_ascii=False).encode()


def with_raw(field: str, raw: str) -> bytes:
    """A note with one field of exactly this JSON text."""
    return f'{{"note_id":"n1","title":"Tea",{json.dumps(field)}:{raw}}}'.encode()


def accepted(raw: bytes) -> NoteRecord:
    record = parse_record(b"n1", raw, NOW)
    assert isinstance(record, NoteRecord)
    return record


DEAD_LETTERS = {
    "empty bytes": (b"", "not_json", "value", "a deletion is a null value"),
    "blank bytes": (b" \n", "not_json", "value", "a deletion is a null value"),
    "no JSON": (b"tea", "not_json", "value", "a note is a JSON object"),
    "cut JSON": (value()[:-1], "not_json", "value", "a note is a JSON object"),
    "two values": (value() + value(), "not_json", "value", "a note is a JSON object"),
    "NaN": (with_raw("attributes", '{"x":NaN}'), "not_json", "value", "a note is a JSON object"),
    "UTF-16": (value().decode().encode("utf-16"), "not_json", "value", "not UTF-8"),
    "not UTF-8 in a field": (value(title="?").replace(b"?", b"\xff"), "not_json", "value", "not UTF-8"),
    "not UTF-8 in a name": (value(x=1).replace(b'"x"', b'"\xff"'), "not_json", "value", "not UTF-8"),
    "not UTF-8 in an unknown field": (value(x="?").replace(b"?", b"\xff"), "not_json", "value", "not UTF-8"),
    "half a surrogate pair": (with_raw("content", r'"\ud800"'), "not_json", "value", "a note is a JSON object"),
    "JSON null": (b"null", "not_object", "value", "got `null`; a note is a JSON object"),
    "a list": (b"[]", "not_object", "value", "got `array`; a note is a JSON object"),
    "a number": (b"1", "not_object", "value", "got `int`; a note is a JSON object"),
    "no note_id": (b'{"title":"Tea"}', "bad_id", "note_id", "missing; it must be there"),
    "note_id of a wrong type": (value(note_id=1), "bad_id", "note_id", "Expected `str`, got `int`"),
    "note_id null": (value(note_id=None), "bad_id", "note_id", "Expected `str`, got `null`"),
    "note_id empty": (value(note_id=""), "bad_id", "note_id", "of length >= 1"),
    "note_id of 65 letters": (value(note_id="n" * 65), "bad_id", "note_id", "64"),
    "note_id of 66 bytes": (value(note_id="笔" * 22), "bad_id", "note_id", "66 bytes; allowed are 1 to 64 bytes"),
    "note_id with a control": (value(note_id="n\t1"), "bad_id", "note_id", "control character; none is allowed"),
    "note_id not the key": (value(note_id="n2"), "key_mismatch", "note_id", "must be equal"),
    "title of a wrong type": (value(title=1), "wrong_type", "title", "Expected `str`, got `int`"),
    "title null": (value(title=None), "wrong_type", "title", "Expected `str`, got `null`"),
    "content of a wrong type": (value(content=["a"]), "wrong_type", "content", "Expected `str`, got `array`"),
    "category of a wrong type": (value(category={}), "wrong_type", "category", "Expected `str`, got `object`"),
    "hashtags of a wrong type": (value(hashtags="tea"), "wrong_type", "hashtags", "Expected `array`, got `str`"),
    "a hashtag of a wrong type": (value(hashtags=["a", 2]), "wrong_type", "hashtags", "Expected `str`, got `int`"),
    "published_at a text": (value(published_at="1"), "wrong_type", "published_at", "Expected `int`, got `str`"),
    "published_at a fraction": (value(published_at=1.5), "wrong_type", "published_at", "Expected `int`, got `float`"),
    "published_at a bool": (value(published_at=True), "wrong_type", "published_at", "Expected `int`, got `bool`"),
    "published_at before 1970": (value(published_at=-1), "wrong_type", "published_at", ">= 0"),
    "published_at of 65 bits": (value(published_at=2**63), "wrong_type", "published_at", f"<= {2**63 - 1}"),
    "published_at infinite": (with_raw("published_at", "1e999"), "not_finite", "published_at", "allowed are finite"),
    "published_at of 5000 digits": (with_raw("published_at", "9" * 5000), "not_finite", "published_at", "64 bits"),
    "attributes a list": (value(attributes=[]), "wrong_type", "attributes", "Expected `object`, got `array`"),
    "attributes with a list": (value(attributes={"x": []}), "wrong_type", "attributes", "got `array`"),
    "attributes with an object": (value(attributes={"x": {}}), "wrong_type", "attributes", "got `object`"),
    "an attribute infinite": (with_raw("attributes", '{"x":-1e999}'), "not_finite", "attributes", "allowed are finite"),
    "an attribute of 65 bits": (value(attributes={"x": 2**63}), "not_finite", "attributes.x", "64 bits; it must fit"),
    "an attribute of 5000 digits": (with_raw("attributes", f'{{"x":{"9" * 5000}}}'), "not_finite", "attributes", "64"),
    "no text": (value(title=""), "no_text", "title, content, hashtags", "at least one must hold text"),
    "blank text": (
        value(title=" ", content="\n\u3000", hashtags=["#", " ＃ "]),
        "no_text",
        "title, content, hashtags",
        "at least one must hold text",
    ),
    "a deep list": (b"[" * 100_000, "not_object", "value", "a note is a JSON object"),
    "a deep unknown field": (with_raw("x", "[" * 100_000), "not_json", "value", "nested too deeply"),
    "a deep closed field": (with_raw("x", "[" * 100_000 + "]" * 100_000), "not_json", "value", "nested too deeply"),
    "a deep attribute": (with_raw("attributes", '{"a":' * 100_000), "wrong_type", "attributes", "got `object`"),
}


@pytest.mark.parametrize(("raw", "reason", "field", "allowed"), DEAD_LETTERS.values(), ids=DEAD_LETTERS.keys())
def test_dead_letter_names_the_field_and_what_is_allowed(raw: bytes, reason: str, field: str, allowed: str) -> None:
    with pytest.raises(InvalidMessage) as caught:
        parse_record(b"n1", raw, NOW)
    assert (caught.value.reason, caught.value.field) == (reason, field)
    assert str(caught.value).startswith(f"{field}: ")
    assert allowed in str(caught.value)


@pytest.mark.parametrize("raw", [value(), None], ids=["note", "tombstone"])
@pytest.mark.parametrize(
    ("key", "reason", "allowed"),
    [
        (None, "no_key", "must be the note_id"),
        (b"", "no_key", "must be the note_id"),
        (b"\xff", "bad_id", "1 to 64 bytes of UTF-8"),
        (b"n" * 65, "bad_id", "65 bytes; allowed are 1 to 64 bytes"),
        (b"n\x00", "bad_id", "control character; none is allowed"),
        ("n\u0085".encode(), "bad_id", "control character; none is allowed"),
    ],
)
def test_record_without_a_proper_key_is_a_dead_letter(
    key: bytes | None, raw: bytes | None, reason: str, allowed: str
) -> None:
    with pytest.raises(InvalidMessage) as caught:
        parse_record(key, raw, NOW)
    assert (caught.value.reason, caught.value.field) == (reason, "key")
    assert allowed in str(caught.value)


def test_null_value_is_a_tombstone() -> None:
    assert parse_record("笔记".encode(), None, NOW) == Tombstone("笔记")


def test_id_may_have_64_bytes() -> None:
    note_id = "é" * 32
    record = parse_record(note_id.encode(), value(note_id=note_id), NOW)
    assert isinstance(record, NoteRecord)
    assert record.note.note_id == note_id


@pytest.mark.parametrize("field", ["title", "content", "hashtags"])
def test_any_one_text_makes_a_note(field: str) -> None:
    text: Any = ["tea"] if field == "hashtags" else "tea"
    assert getattr(accepted(value(**{"title": "", field: text})).note, field) == text


def test_text_behind_many_blanks_is_text() -> None:
    record = accepted(value(title=" " * 600 + "Tea"))
    assert (record.note.title, record.trimmed) == ("Tea", ())


def test_missing_fields_have_defaults() -> None:
    note = accepted(b'{"note_id":"n1","content":"Tea"}').note
    assert (note.title, note.category, note.hashtags, note.attributes) == ("", "", [], {})


def test_missing_published_at_is_the_records_timestamp() -> None:
    assert accepted(value()).note.published_at == NOW
    assert accepted(value(published_at=5)).note.published_at == 5


def test_record_without_a_timestamp_counts_as_1970() -> None:
    record = parse_record(b"n1", value(), -1)
    assert isinstance(record, NoteRecord)
    assert record.note.published_at == 0


def test_unknown_fields_pass() -> None:
    assert accepted(value(likes=3, nested={"deep": [1, {"er": None}]})) == accepted(value())


def test_what_fits_is_not_trimmed() -> None:
    fields: dict[str, Any] = {
        "title": "笔" * 512,
        "category": "笔" * 128,
        "hashtags": [f"{n:02}" + "笔" * 62 for n in range(32)],
        "attributes": {f"a{n}": n for n in range(32)},
        "content": "笔" * 100_000,
    }
    record = accepted(value(**fields))
    assert record.trimmed == ()
    assert {name: getattr(record.note, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("field", "given_value", "kept"),
    [
        ("title", "笔" * 513, "笔" * 512),
        ("title", "a" * 511 + " b", "a" * 511),
        ("category", "笔" * 129, "笔" * 128),
        ("hashtags", ["笔" * 65], ["笔" * 64]),
        ("hashtags", [f"t{n}" for n in range(33)], [f"t{n}" for n in range(32)]),
        ("hashtags", ["笔" * 64 + "a", "笔" * 64 + "b"], ["笔" * 64]),
        ("attributes", {f"a{n}": n for n in range(33)}, {f"a{n}": n for n in range(32)}),
        ("attributes", {"a": 1, "b": "x" * 8200, "c": 2}, {"a": 1}),
    ],
)
def test_what_is_too_long_is_cut_and_named(field: str, given_value: Any, kept: Any) -> None:
    record = accepted(value(**{field: given_value}))
    assert record.trimmed == (field,)
    assert getattr(record.note, field) == kept


def test_attributes_fill_8_kib_to_the_byte() -> None:
    def attributes(size: int) -> dict[str, str]:
        # {"a":"xx"} is eight bytes and the x.
        return {"a": "x" * (size - 8)}

    assert len(msgspec.json.encode(attributes(8192))) == 8192
    assert accepted(value(attributes=attributes(8191))).trimmed == ()
    assert accepted(value(attributes=attributes(8193))).trimmed == ("attributes",)


def test_attributes_keep_their_types() -> None:
    attributes = {"author_id": "a1", "likes": -(2**63), "score": 0.5, "public": True, "place": None}
    kept = accepted(value(attributes=attributes)).note.attributes
    assert kept == attributes
    assert [type(kept[name]) for name in kept] == [type(attributes[name]) for name in attributes]


def test_category_of_the_author_is_kept_without_outer_blanks() -> None:
    assert accepted(value(category=" Slow Travel\n")).note.category == "Slow Travel"


# Whatever the bytes ...

_texts = st.text(max_size=40) | st.integers(1, 700).map(lambda n: "笔𝄞 " * n)
_scalars = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=True, allow_infinity=True) | _texts
)
_json = st.recursive(
    _scalars, lambda inner: st.lists(inner, max_size=40) | st.dictionaries(st.text(max_size=8), inner), max_leaves=50
)
_notes = st.fixed_dictionaries(
    {"note_id": st.just("n1")},
    optional={
        "title": _texts,
        "content": _texts,
        "category": _texts,
        "hashtags": st.lists(_texts | st.sampled_from(["＃tea", "TEA", " # tea", "ｔｅａ"]), max_size=50),
        "published_at": st.integers(0, 2**63 - 1),
        "attributes": st.dictionaries(_texts, _scalars, max_size=50),
        "unknown": _json,
    },
)


@st.composite
def _values(draw: st.DrawFn) -> bytes | None:
    kind = draw(st.sampled_from(["null", "bytes", "json", "note", "field", "edit"]))
    if kind == "null":
        return None
    if kind == "bytes":
        return draw(st.binary(max_size=60))
    if kind == "json":
        return json.dumps(draw(_json)).encode()
    note = draw(_notes)
    if kind == "field":
        note[draw(st.sampled_from(["note_id", "title", "hashtags", "published_at", "attributes"]))] = draw(_json)
    raw = json.dumps(note, ensure_ascii=draw(st.booleans())).encode()
    if kind == "edit":
        at = draw(st.integers(0, len(raw)))
        raw = raw[:at] + draw(st.binary(max_size=4)) + raw[at + draw(st.integers(0, 4)) :]
    return raw


_keys = st.just(b"n1") | st.none() | st.binary(max_size=80)


def outcome(key: bytes | None, raw: bytes | None, timestamp_ms: int) -> NoteRecord | Tombstone | InvalidMessage:
    try:
        return parse_record(key, raw, timestamp_ms)
    except InvalidMessage as error:
        return error


@given(_keys, _values(), st.integers(-1, 2**62))
def test_every_record_is_a_note_a_tombstone_or_a_dead_letter(
    key: bytes | None, raw: bytes | None, timestamp_ms: int
) -> None:
    match outcome(key, raw, timestamp_ms):
        case NoteRecord() as record:
            assert record.note.note_id.encode() == key
            assert_within_limits(record)
        case Tombstone() as tombstone:
            assert raw is None
            assert tombstone.note_id.encode() == key
        case error:
            assert error.reason in REASONS
            assert len(str(error).encode()) < 500, "a header is no place for the whole value"


@given(_notes)
def test_a_kept_note_published_again_is_the_same_note(note: dict[str, Any]) -> None:
    record = outcome(b"n1", json.dumps(note).encode(), NOW)
    if isinstance(record, NoteRecord):
        assert accepted(msgspec.json.encode(record.note)) == NoteRecord(record.note, trimmed=())


# Note vectors

VECTOR = NoteVector(
    note_id="n1",
    model_version="0123456789abcdef",
    text_hash="ab" * 32,
    embedding=[0.6, -0.8],
    generated_hashtags=["京都"],
    generated_category="travel",
)


def vector_value(**fields: Any) -> bytes:
    return json.dumps({**msgspec.json.decode(encode_note_vector(VECTOR)), **fields}).encode()


def test_a_vector_is_written_as_the_contract_says() -> None:
    assert encode_note_vector(VECTOR).decode() == (
        '{"note_id":"n1","model_version":"0123456789abcdef","text_hash":"' + "ab" * 32 + '","embedding":[0.6,-0.8],'
        '"generated_hashtags":["京都"],"generated_category":"travel"}'
    )


def test_a_vector_is_read_as_it_was_written_and_unknown_fields_pass() -> None:
    assert parse_note_vector(b"n1", encode_note_vector(VECTOR)) == VECTOR
    assert parse_note_vector(b"n1", vector_value(added="later")) == VECTOR
    assert parse_note_vector(b"n1", None) == Tombstone("n1")


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=20))
def test_numbers_of_a_vector_are_exact(embedding: list[float]) -> None:
    sent = msgspec.structs.replace(VECTOR, embedding=embedding)
    assert parse_note_vector(b"n1", encode_note_vector(sent)) == sent


@pytest.mark.parametrize(
    ("key", "raw", "reason", "field", "allowed"),
    [
        (None, vector_value(), "no_key", "key", "must be the note_id"),
        (b"", None, "no_key", "key", "must be the note_id"),
        (b"\xff", None, "bad_id", "key", "1 to 64 bytes"),
        (b"n2", vector_value(), "key_mismatch", "note_id", "must be equal"),
        (b"n1", b"", "not_json", "value", "empty; a note vector is a JSON object"),
        (b"n1", b"x", "not_json", "value", "a note vector is a JSON object"),
        (b"n1", b"null", "not_object", "value", "a note vector is a JSON object"),
        (b"n1", b'{"note_id":"n1"}', "wrong_type", "model_version", "must be there"),
        (b"n1", b"{}", "bad_id", "note_id", "missing"),
        (b"n1", vector_value(note_id=1), "bad_id", "note_id", "Expected `str`"),
        (b"n1", vector_value(model_version="X"), "wrong_type", "model_version", "matching regex"),
        (b"n1", vector_value(text_hash=""), "wrong_type", "text_hash", "matching regex"),
        (b"n1", vector_value(embedding=[]), "wrong_type", "embedding", "length >= 1"),
        (b"n1", vector_value(embedding=["0.1"]), "wrong_type", "embedding", "Expected `float`"),
        (b"n1", vector_value().replace(b"0.6", b"1e999"), "not_finite", "embedding", "allowed are finite"),
        (b"n1", vector_value(generated_hashtags=None), "wrong_type", "generated_hashtags", "Expected `array`"),
    ],
)
def test_what_is_no_vector_names_the_field(
    key: bytes | None, raw: bytes | None, reason: str, field: str, allowed: str
) -> None:
    with pytest.raises(InvalidMessage) as caught:
        parse_note_vector(key, raw)
    assert (caught.value.reason, caught.value.field) == (reason, field)
    assert allowed in str(caught.value)


@given(st.sampled_from([b"n1", b"", None]) | st.binary(max_size=70), st.none() | st.binary(max_size=80) | _values())
def test_whatever_the_bytes_of_a_vector_nothing_else_is_raised(key: bytes | None, raw: bytes | None) -> None:
    try:
        reason = type(parse_note_vector(key, raw)).__name__
    except InvalidMessage as error:
        reason = error.reason
    assert reason in {"NoteVector", "Tombstone", *REASONS}


def assert_within_limits(record: NoteRecord) -> None:
    """Milvus counts the bytes of a VARCHAR: four per character is the most that UTF-8 takes."""
    note = record.note
    assert 1 <= len(note.note_id.encode()) <= LIMITS.id_bytes
    assert len(note.title.encode()) <= LIMITS.title * 4
    assert len(note.category.encode()) <= LIMITS.category * 4
    assert len(note.hashtags) <= LIMITS.hashtags
    assert all(0 < len(tag.encode()) <= LIMITS.hashtag * 4 for tag in note.hashtags)
    assert len({tag.casefold() for tag in note.hashtags}) == len(note.hashtags)
    assert len(note.attributes) <= LIMITS.attributes
    assert len(msgspec.json.encode(note.attributes)) <= LIMITS.attributes_bytes
    assert 0 <= note.published_at < 2**63
    assert note.title.strip() or note.content.strip() or note.hashtags
    assert set(record.trimmed) <= {"title", "category", "hashtags", "attributes"}
