"""A bundle: a directory that holds one exported model and everything needed to run it.

``notellm.json`` (the :class:`Manifest`), ``model.onnx`` with its weights in ``model.onnx.data``, ``tokenizer.json``,
and ``parity.npz``: what torch answered, so that parity can be proven again without it (:mod:`notellm.parity`). The
manifest carries a sha256 per file, and :func:`open_bundle` refuses a directory that does not match it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final, Literal

import msgspec

from notellm.errors import BundleError
from notellm.prompt import PromptLimits, Template, TokenIds

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST",
    "MODEL",
    "PARITY",
    "TOKENIZER",
    "Bundle",
    "Capabilities",
    "FileEntry",
    "Manifest",
    "ParityReport",
    "ParityRow",
    "Precision",
    "TagLimits",
    "describe_files",
    "hash_file",
    "open_bundle",
    "read_manifest",
    "record_parity",
    "write_manifest",
]

# Raised when the layout changes, and also when prompt.py or encoder.py comes to read or answer a note in another way:
# it is part of model_version.
FORMAT_VERSION: Final = 1
MANIFEST: Final = "notellm.json"
MODEL: Final = "model.onnx"
TOKENIZER: Final = "tokenizer.json"
PARITY: Final = "parity.npz"


Precision = Literal["fp32", "fp16", "int8", "int4"]


class FileEntry(msgspec.Struct, frozen=True):
    sha256: str
    bytes: int


class TagLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the model may write about a note."""

    hashtags: int = 5
    hashtag_tokens: int = 24


class Capabilities(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the graph may be driven; the encoder obeys.

    ``prefix_cache``: the instruction's KV cache may be given as a past. ``multi_token_past``: several new tokens per
    row may follow a past in a batch. ``kv_layout``: the order of a cache's four dimensions, and what its third one
    counts: *tokens* as they were fed, padding included, where ``attention_mask`` tells which are real; or each row's
    own *positions*, where a new token takes the place of the row's padding and ``attention_mask`` only tells lengths.
    """

    prefix_cache: bool = True
    multi_token_past: bool = True
    kv_layout: Literal["batch_heads_tokens_dim", "batch_heads_positions_dim"] = "batch_heads_tokens_dim"


class ParityRow(msgspec.Struct, frozen=True):
    """One comparison of the graph with torch.

    ``bound`` is what ``value`` was held against: it may be at most that, or ``at_least``. None: stated, not judged.
    """

    check: str
    value: float
    bound: float | None
    passed: bool
    at_least: bool = False


class ParityReport(msgspec.Struct, frozen=True):
    """What was compared on ``provider``. ``unproven``: the graph could not be run there, so that nothing is claimed."""

    provider: str
    rows: list[ParityRow]
    state: Literal["checked", "unproven"] = "checked"

    @property
    def passed(self) -> bool:
        return self.state == "checked" and all(row.passed for row in self.rows)


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """``notellm.json``. ``model_version`` is 16 hex of all that decides a row, ``bundle_id`` is the files' hash.

    ``parity`` is the report of the provider that the bundle was built for, ``parity_elsewhere`` holds those of others.
    ``recipe`` says in words how the weights of a precision below fp16 are stored.
    """

    format_version: int
    model_version: str
    bundle_id: str
    base_model: str
    architecture: str
    projection: Literal["identity", "linear"]
    embedding_dim: int
    layers: int
    kv_heads: int
    head_dim: int
    max_positions: int
    precision: Precision
    template: Template
    categories: list[str]
    token_ids: TokenIds
    prompt_limits: PromptLimits
    tag_limits: TagLimits
    inputs: list[str]
    outputs: list[str]
    capabilities: Capabilities
    parity: ParityReport
    files: dict[str, FileEntry]
    made_with: dict[str, str]
    kv_dtype: Literal["float32", "float16"] = "float32"
    parity_elsewhere: list[ParityReport] = []
    recipe: str = ""

    def parity_on(self, provider: str) -> ParityReport | None:
        """What is known of ``provider``: None where nothing was compared on it."""
        reports = [report for report in (self.parity, *self.parity_elsewhere) if report.provider == provider]
        return next((report for report in reports if report.state == "checked"), None)


class Bundle(msgspec.Struct, frozen=True):
    """A verified bundle on disk."""

    path: Path
    manifest: Manifest

    @property
    def model_path(self) -> Path:
        return self.path / MODEL

    @property
    def tokenizer_path(self) -> Path:
        return self.path / TOKENIZER


def read_manifest(path: Path) -> Manifest:
    """The manifest alone, with its format checked and no file hashed."""
    manifest = path / MANIFEST
    try:
        raw = manifest.read_bytes()
    except FileNotFoundError:
        raise BundleError(
            f"bundle {path}: no {MANIFEST} there; make one with: python export/to_onnx.py --out {path}"
        ) from None
    except OSError as error:
        raise BundleError(f"bundle {path}: cannot read {MANIFEST}: {error.strerror}") from None
    try:
        version = msgspec.json.decode(raw, type=dict).get("format_version")
        if version != FORMAT_VERSION:
            raise BundleError(
                f"bundle {path}: format_version is {version!r}, this program reads {FORMAT_VERSION}; export it again"
            )
        return msgspec.json.decode(raw, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"bundle {path}: {MANIFEST} is damaged ({error}); export it again") from None


def record_parity(path: Path, report: ParityReport) -> Manifest:
    """Write ``report`` into the manifest of a bundle: of the provider that it was built for, or beside it.

    No other file changes, so that ``bundle_id`` stays. Raises :class:`BundleError`.
    """
    manifest = read_manifest(path)
    if report.provider == manifest.parity.provider:
        changed = msgspec.structs.replace(manifest, parity=report)
    else:
        others = [other for other in manifest.parity_elsewhere if other.provider != report.provider]
        changed = msgspec.structs.replace(manifest, parity_elsewhere=[*others, report])
    try:
        write_manifest(path, changed)
    except OSError as error:
        raise BundleError(f"bundle {path}: cannot write {MANIFEST}: {error.strerror}") from None
    return changed


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Whole or not at all: a reader never sees half of it."""
    partial = path / f".{MANIFEST}.partial"
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")
    partial.replace(path / MANIFEST)


def open_bundle(path: Path) -> Bundle:
    """Read the manifest and check every file against it.

    Raises :class:`BundleError` that names the file and what is wrong with it.
    """
    manifest = read_manifest(path)
    for name in (MODEL, TOKENIZER):
        if name not in manifest.files:
            raise BundleError(f"bundle {path}: {MANIFEST} does not list {name}; export it again")
    for name, entry in manifest.files.items():
        if Path(name).name != name:
            raise BundleError(f"bundle {path}: file name {name!r} leaves the bundle; allowed are plain names")
        try:
            _check_file(path, name, entry)
        except OSError as error:
            raise BundleError(f"bundle {path}: cannot read {name}: {error.strerror}") from None
    if bundle_id(manifest.files) != manifest.bundle_id:
        raise BundleError(f"bundle {path}: bundle_id does not match the files; export it again")
    return Bundle(path, manifest)


def _check_file(path: Path, name: str, entry: FileEntry) -> None:
    file = path / name
    if not file.is_file():
        raise BundleError(f"bundle {path}: {name} is missing; export it again")
    size = file.stat().st_size
    if size != entry.bytes:
        raise BundleError(f"bundle {path}: {name} has {size} bytes, not {entry.bytes}; export it again")
    if hash_file(file) != entry.sha256:
        raise BundleError(f"bundle {path}: {name} is damaged (its sha256 differs); export it again")


def describe_files(path: Path) -> dict[str, FileEntry]:
    """Hash every file of a bundle but its manifest."""
    files = sorted(file for file in path.iterdir() if file.name != MANIFEST)
    return {file.name: FileEntry(hash_file(file), file.stat().st_size) for file in files}


def bundle_id(files: dict[str, FileEntry]) -> str:
    """16 hex over the names and hashes of a bundle's files."""
    lines = "".join(f"{name} {files[name].sha256}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def hash_file(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
