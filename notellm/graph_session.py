"""ONNX Runtime behind one call: ids and a KV cache in, an embedding, logits and the longer cache out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from notellm.bundle import Bundle
from notellm.errors import BundleError, ProviderMissing, RuntimeMissing

if TYPE_CHECKING:
    from onnxruntime import OrtValue

__all__ = ["Cache", "GraphOutput", "GraphSession", "KVCache", "Provider"]

Provider = Literal["auto", "cpu", "cuda"]
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# TF32 would round the factors of float32 products to 10 bits: batch == single could miss its 1e-4.
_OPTIONS: dict[str, dict[str, str]] = {"cpu": {}, "cuda": {"use_tf32": "0"}}


class Cache(Protocol):
    """Keys and values so far, wherever a graph keeps them: :class:`KVCache`, in torch, ..."""

    @property
    def tokens(self) -> int: ...

    @property
    def rows(self) -> int: ...

    def select(self, rows: Sequence[int]) -> Cache: ...


@dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, each ``[B, H, tokens, K]``, kept where the session left them: on the GPU, say."""

    values: list[OrtValue]

    @property
    def tokens(self) -> int:
        return int(self.values[0].shape()[2])

    @property
    def rows(self) -> int:
        return int(self.values[0].shape()[0])

    def select(self, rows: Sequence[int]) -> KVCache:
        """A cache of the given rows; a row may come several times, which is how a prefix is shared by a batch.

        On a GPU the rows go through the host's memory, there and back: call it seldom.
        """
        ort = _onnxruntime()
        index = np.asarray(rows)
        return KVCache(
            [ort.OrtValue.ortvalue_from_numpy(value.numpy()[index], value.device_name(), 0) for value in self.values]
        )


@dataclass(frozen=True)
class GraphOutput:
    """``embeddings [B, D]`` and ``logits [B, V]`` at ``last_index``; ``cache`` holds all tokens so far."""

    embeddings: Floats
    logits: Floats | None
    cache: Cache | None


class GraphSession:
    """A loaded graph. Thread-safe, as an InferenceSession is."""

    def __init__(self, bundle: Bundle, provider: Provider, threads: int) -> None:
        manifest = bundle.manifest
        self._manifest = manifest
        self._past = [name for name in manifest.inputs if name.startswith("past_key_values.")]
        self._present = [name for name in manifest.outputs if name.startswith("present.")]
        self._session = _load(bundle, provider, threads)
        self._memory = "cuda" if self.provider == "cuda" else "cpu"
        wanted = {"input_ids", "attention_mask", "position_ids", "last_index", *self._past}
        found = {node.name for node in self._session.get_inputs()}
        if wanted != found:
            raise BundleError(f"bundle {bundle.path}: the graph's inputs differ from the manifest's; export it again")

    @property
    def provider(self) -> Literal["cpu", "cuda"]:
        """Where the graph really runs."""
        return "cuda" if self._session.get_providers()[0] == _PROVIDERS["cuda"] else "cpu"

    def empty_cache(self, rows: int) -> KVCache:
        """A cache of no tokens."""
        ort = _onnxruntime()
        empty = np.zeros((rows, self._manifest.kv_heads, 0, self._manifest.head_dim), self._manifest.kv_dtype)
        return KVCache([ort.OrtValue.ortvalue_from_numpy(empty) for _ in self._past])

    def run(
        self,
        input_ids: Ints,
        attention_mask: Ints,
        position_ids: Ints,
        last_index: Ints,
        past: KVCache,
        *,
        embeddings_only: bool = False,
    ) -> GraphOutput:
        """One pass; shapes as in DESIGN's graph: ``[B,S]``, ``[B,P+S]``, ``[B,S]``, ``[B]``."""
        ort = _onnxruntime()
        feeds = {
            name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array, np.int64))
            for name, array in (
                ("input_ids", input_ids),
                ("attention_mask", attention_mask),
                ("position_ids", position_ids),
                ("last_index", last_index),
            )
        }
        feeds.update(zip(self._past, past.values, strict=True))
        binding = self._session.io_binding()
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, value)
        present = [] if embeddings_only else self._present
        # What is read here comes to the host; the cache stays where the graph runs, for the next run.
        for name in ["note_embedding"] if embeddings_only else ["note_embedding", "logits"]:
            binding.bind_output(name, "cpu")
        for name in present:
            binding.bind_output(name, self._memory, 0)
        self._session.run_with_iobinding(binding)
        outputs = binding.get_outputs()
        embeddings = outputs[0].numpy()
        if embeddings_only:
            return GraphOutput(embeddings, None, None)
        return GraphOutput(embeddings, outputs[1].numpy(), KVCache(list(outputs[2:])))


def _onnxruntime() -> Any:
    # onnxruntime 1.32 reports usage to its makers unless it is told not to; whoever wants that sets it to 0.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime  # noqa: PLC0415 - an extra; without it only this fails
    except ImportError:
        raise RuntimeMissing(
            "onnxruntime is not installed; install one of: pip install 'notellm[cpu]' or pip install 'notellm[gpu]'"
        ) from None
    return onnxruntime


def _load(bundle: Bundle, provider: Provider, threads: int) -> Any:
    ort = _onnxruntime()
    available = ort.get_available_providers()
    if provider == "cuda" and _PROVIDERS["cuda"] not in available:
        raise ProviderMissing("provider: 'cuda' is not in this onnxruntime; install: pip install 'notellm[gpu]'")
    chosen = [provider] if provider != "auto" else ["cuda", "cpu"]
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        session = ort.InferenceSession(
            str(bundle.model_path),
            options,
            providers=[(_PROVIDERS[name], _OPTIONS[name]) for name in chosen if _PROVIDERS[name] in available],
        )
    except Exception as error:  # noqa: BLE001
        # onnxruntime raises a dozen classes of its own, all direct children of Exception.
        raise BundleError(f"bundle {bundle.path}: onnxruntime cannot load it: {_first_line(error)}") from None
    if provider == "cuda" and session.get_providers()[0] != _PROVIDERS["cuda"]:
        # onnxruntime falls back to the CPU without an error; a GPU that was asked for must not become a CPU.
        raise ProviderMissing(
            "provider: 'cuda' was asked for, but CUDA cannot start here; is there a GPU and its driver?"
        )
    return cast(Any, session)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
