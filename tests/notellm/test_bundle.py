"""A bundle is opened whole or not at all, and the error names what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from notellm.bundle import (
    FORMAT_VERSION,
    MANIFEST,
    MODEL,
    TOKENIZER,
    Capabilities,
    Manifest,
    ParityReport,
    ParityRow,
    TagLimits,
    bundle_id,
    describe_files,
    open_bundle,
    read_manifest,
    record_parity,
)
from notellm.errors import BundleError
from notellm.prompt import PromptLimits, TokenIds, load_template

WEIGHTS = "model.onnx.data"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle in form: its files are a few bytes each."""
    path = tmp_path / "bundle"
    path.mkdir()
    for name in (MODEL, WEIGHTS, TOKENIZER):
        (path / name).write_bytes(f"the bytes of {name}".encode())
    files = describe_files(path)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        model_version="0123456789abcdef",
        bundle_id=bundle_id(files),
        base_model="tiny",
        architecture="llama",
        projection="identity",
        embedding_dim=8,
        layers=1,
        kv_heads=1,
        head_dim=8,
        max_positions=256,
        precision="fp32",
        template=load_template("en"),
        categories=["travel"],
        token_ids=TokenIds(emb=2, bos=None, eos=[1], special=[1, 2]),
        prompt_limits=PromptLimits(),
        tag_limits=TagLimits(),
        inputs=["input_ids"],
        outputs=["note_embedding"],
        capabilities=Capabilities(),
        parity=ParityReport("cpu", [ParityRow("embedding", 1e-6, 1e-4, True)]),
        files=files,
        made_with={},
    )
    (path / MANIFEST).write_bytes(msgspec.json.encode(manifest))
    return path


def edit_manifest(path: Path, **changes: Any) -> None:
    manifest = json.loads((path / MANIFEST).read_text("utf-8"))
    (path / MANIFEST).write_text(json.dumps(manifest | changes), "utf-8")


def refusal(path: Path) -> str:
    with pytest.raises(BundleError) as caught:
        open_bundle(path)
    assert str(caught.value).startswith(f"bundle {path}: ")
    return str(caught.value)


def test_whole_bundle_opens(bundle: Path) -> None:
    opened = open_bundle(bundle)
    assert opened.manifest == read_manifest(bundle)
    assert (opened.model_path, opened.tokenizer_path) == (bundle / MODEL, bundle / TOKENIZER)
    assert opened.manifest.files.keys() == {MODEL, WEIGHTS, TOKENIZER}
    assert opened.manifest.parity.passed


@pytest.mark.parametrize("name", [MODEL, WEIGHTS, TOKENIZER])
class TestDamage:
    def test_flipped_bit(self, bundle: Path, name: str) -> None:
        content = bytearray((bundle / name).read_bytes())
        content[-1] ^= 1
        (bundle / name).write_bytes(content)
        assert f"{name} is damaged (its sha256 differs)" in refusal(bundle)

    def test_cut_file(self, bundle: Path, name: str) -> None:
        whole = (bundle / name).read_bytes()
        (bundle / name).write_bytes(whole[:-1])
        assert f"{name} has {len(whole) - 1} bytes, not {len(whole)}" in refusal(bundle)

    def test_missing_file(self, bundle: Path, name: str) -> None:
        (bundle / name).unlink()
        assert f"{name} is missing" in refusal(bundle)

    def test_folder_in_its_place(self, bundle: Path, name: str) -> None:
        (bundle / name).unlink()
        (bundle / name).mkdir()
        assert f"{name} is missing" in refusal(bundle)


@pytest.mark.parametrize("name", [MODEL, TOKENIZER])
def test_manifest_must_list_the_model_and_the_tokenizer(bundle: Path, name: str) -> None:
    files = json.loads((bundle / MANIFEST).read_text("utf-8"))["files"]
    del files[name]
    edit_manifest(bundle, files=files)
    assert f"{MANIFEST} does not list {name}" in refusal(bundle)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "folder/file", "."])
def test_file_outside_the_bundle_is_refused(bundle: Path, name: str) -> None:
    files = json.loads((bundle / MANIFEST).read_text("utf-8"))["files"]
    (bundle.parent / "secret").write_bytes(b"a file that is there")
    edit_manifest(bundle, files={name: files[MODEL], **files})
    assert f"{name!r} leaves the bundle; allowed are plain names" in refusal(bundle)


def test_file_that_cannot_be_read_is_named(bundle: Path) -> None:
    files = json.loads((bundle / MANIFEST).read_text("utf-8"))["files"]
    name = "x" * 300
    edit_manifest(bundle, files={**files, name: files[MODEL]})
    assert f"cannot read {name}: File name too long" in refusal(bundle)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_other_format_is_refused(bundle: Path, version: object) -> None:
    edit_manifest(bundle, format_version=version)
    assert f"format_version is {version!r}, this program reads {FORMAT_VERSION}" in refusal(bundle)


def test_bundle_id_of_other_files_is_refused(bundle: Path) -> None:
    edit_manifest(bundle, bundle_id="0" * 16)
    assert "bundle_id does not match the files" in refusal(bundle)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff", b'{"format_version":1}', b'{"format_version":1,"x":' + b"[" * 100_000],
    ids=["empty", "cut", "list", "null", "not UTF-8", "fields missing", "deep"],
)
def test_broken_manifest_is_refused(bundle: Path, content: bytes) -> None:
    (bundle / MANIFEST).write_bytes(content)
    assert f"{MANIFEST} is damaged" in refusal(bundle)


def test_manifest_with_a_wrong_field_names_it(bundle: Path) -> None:
    edit_manifest(bundle, precision="fp3")
    assert "$.precision" in refusal(bundle)


def test_folder_without_a_manifest_says_how_to_make_one(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        assert f"no {MANIFEST} there; make one with: python export/to_onnx.py --out {path}" in refusal(path)


def test_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    path.write_bytes(b"")
    assert f"cannot read {MANIFEST}" in refusal(path)


def test_bundle_id_depends_on_names_and_bytes(bundle: Path) -> None:
    files = describe_files(bundle)
    (bundle / WEIGHTS).rename(bundle / "other.data")
    renamed = describe_files(bundle)
    (bundle / "other.data").write_bytes(b"other bytes")
    assert len({bundle_id(files), bundle_id(renamed), bundle_id(describe_files(bundle))}) == 3
    assert bundle_id(dict(reversed(files.items()))) == bundle_id(files)


# Parity


def test_bundle_from_before_the_newer_fields_opens_with_their_defaults(bundle: Path) -> None:
    manifest = json.loads((bundle / MANIFEST).read_text("utf-8"))
    for name in ("kv_dtype", "parity_elsewhere", "recipe"):
        del manifest[name]
    del manifest["parity"]["state"]
    for row in manifest["parity"]["rows"]:
        del row["at_least"]
    (bundle / MANIFEST).write_text(json.dumps(manifest), "utf-8")
    opened = open_bundle(bundle).manifest
    assert opened.parity.passed
    assert (opened.kv_dtype, opened.parity_elsewhere, opened.recipe) == ("float32", [], "")


def test_unproven_is_neither_passed_nor_a_list_of_good_rows() -> None:
    good = ParityRow("embedding", 1e-6, 1e-4, True)
    assert ParityReport("cuda", [good]).passed
    assert not ParityReport("cuda", [good], "unproven").passed
    assert not ParityReport("cuda", [], "unproven").passed


def test_report_of_the_bundles_own_provider_takes_the_place_of_its_parity(bundle: Path) -> None:
    before = read_manifest(bundle)
    failed = ParityReport("cpu", [ParityRow("embedding", 1.0, 1e-4, False)])
    assert record_parity(bundle, failed) == read_manifest(bundle) == open_bundle(bundle).manifest
    assert read_manifest(bundle) == msgspec.structs.replace(before, parity=failed)
    assert {entry.name for entry in bundle.iterdir()} == {MANIFEST, MODEL, WEIGHTS, TOKENIZER}


def test_report_from_elsewhere_stands_beside_it_once(bundle: Path) -> None:
    before = read_manifest(bundle)
    for value in (1.0, 2.0):
        record_parity(bundle, ParityReport("cuda", [ParityRow("embedding", value, None, True)]))
    after = read_manifest(bundle)
    assert after.parity == before.parity
    assert [report.rows[0].value for report in after.parity_elsewhere] == [2.0]


def test_report_that_cannot_be_written_is_one_line(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, content: bytes) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(BundleError, match=f"cannot write {MANIFEST}: Permission denied"):
        record_parity(bundle, ParityReport("cpu", []))
