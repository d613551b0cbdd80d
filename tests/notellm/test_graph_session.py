"""Where a graph runs, and where its KV cache lies meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime
import pytest

from notellm.bundle import Bundle, open_bundle
from notellm.graph_session import GraphOutput, GraphSession, KVCache
from tests.export.tiny import Tiny


@pytest.fixture(scope="module")
def bundle(tied: Tiny) -> Bundle:
    return open_bundle(tied.bundle)


def prefill(session: GraphSession, rows: int, tokens: int) -> GraphOutput:
    ids = np.arange(rows * tokens).reshape(rows, tokens) + 2
    positions = np.tile(np.arange(tokens), (rows, 1))
    return session.run(ids, np.ones_like(ids), positions, np.full(rows, tokens - 1), session.empty_cache(rows))


def go_on(session: GraphSession, past: KVCache) -> GraphOutput:
    ids = np.arange(past.rows)[:, None] + 50
    mask = np.ones((past.rows, past.tokens + 1), np.int64)
    return session.run(ids, mask, np.full_like(ids, past.tokens), np.zeros(past.rows, np.int64), past)


class WouldBeGpu(onnxruntime.InferenceSession):  # type: ignore[misc]
    """The CPU, but it says that it is a GPU, and notes what is asked of one."""

    asked: tuple[tuple[str, dict[str, str]], ...] = ()
    bound: dict[str, str]

    def __init__(self, path: str, options: Any, providers: list[tuple[str, dict[str, str]]]) -> None:
        type(self).asked = tuple(providers)
        super().__init__(path, options, providers=["CPUExecutionProvider"])
        self.bound = {}

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def io_binding(self) -> Any:
        binding, bind = super().io_binding(), self.bound

        class OnTheCpuAfterAll:
            def __getattr__(self, name: str) -> Any:
                return getattr(binding, name)

            def bind_output(self, name: str, device: str, device_id: int = 0) -> None:
                assert device_id == 0
                bind[name] = device
                binding.bind_output(name, "cpu", 0)

            @property
            def _iobinding(self) -> Any:
                return binding._iobinding

        return OnTheCpuAfterAll()


@pytest.fixture
def would_be_gpu(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> GraphSession:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", WouldBeGpu)
    return GraphSession(bundle, "cuda", threads=1)


def test_on_a_gpu_the_cache_stays_there_and_only_what_is_read_comes_to_the_host(would_be_gpu: GraphSession) -> None:
    bound = would_be_gpu._session.bound
    first = prefill(would_be_gpu, 2, 3)
    assert first.cache is not None
    assert {name: device for name, device in bound.items() if device == "cpu"}.keys() == {"note_embedding", "logits"}
    assert {device for name, device in bound.items() if name.startswith("present.")} == {"cuda"}
    assert len(bound) == 2 + len(first.cache.values)
    bound.clear()
    again = would_be_gpu.run(
        np.full((2, 1), 9), np.ones((2, 4), np.int64), np.full((2, 1), 3), np.zeros(2, np.int64), first.cache,
        embeddings_only=True,
    )  # fmt: skip
    assert bound == {"note_embedding": "cpu"}
    assert again.cache is None


def test_rows_that_are_selected_go_back_to_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    class Value:
        def numpy(self) -> Any:
            return np.arange(6.0).reshape(3, 1, 2, 1)

        def device_name(self) -> str:
            return "cuda"

    made: list[tuple[Any, str, int]] = []

    class OrtValue:
        @staticmethod
        def ortvalue_from_numpy(array: Any, device: str, device_id: int) -> str:
            made.append((array, device, device_id))
            return "on the device"

    monkeypatch.setattr(onnxruntime, "OrtValue", OrtValue)
    cache: Any = KVCache([Value(), Value()])  # type: ignore[list-item]
    assert cache.select([2, 0]).values == ["on the device"] * 2
    assert [(array.ravel().tolist(), device, number) for array, device, number in made] == [
        ([4.0, 5.0, 0.0, 1.0], "cuda", 0)
    ] * 2


def test_a_gpu_does_not_round_float32_products(would_be_gpu: GraphSession) -> None:
    assert would_be_gpu.provider == "cuda"
    assert WouldBeGpu.asked == (("CUDAExecutionProvider", {"use_tf32": "0"}),)


def test_the_results_through_the_binding_are_those_of_a_plain_run(bundle: Bundle) -> None:
    session = GraphSession(bundle, "cpu", threads=1)
    first = prefill(session, 3, 4)
    assert first.cache is not None
    second = go_on(session, first.cache)
    ids = np.arange(3)[:, None] + 50
    feeds = {
        "input_ids": np.concatenate([np.arange(12).reshape(3, 4) + 2, ids], axis=1),
        "attention_mask": np.ones((3, 5), np.int64),
        "position_ids": np.tile(np.arange(5), (3, 1)),
        "last_index": np.full(3, 4),
        **{name: value.numpy() for name, value in zip(session._past, session.empty_cache(3).values, strict=True)},
    }
    plain = session._session.run(None, feeds)
    np.testing.assert_allclose(second.embeddings, plain[0], atol=1e-5)
    np.testing.assert_allclose(second.logits, plain[1], atol=1e-4)
    assert second.cache is not None
    for value, expected in zip(second.cache.values, plain[2:], strict=True):
        np.testing.assert_allclose(value.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("kv_dtype", ["float32", "float16"])
def test_an_empty_cache_has_the_type_that_the_manifest_names(bundle: Bundle, kv_dtype: str) -> None:
    session = GraphSession(
        Bundle(bundle.path, msgspec.structs.replace(bundle.manifest, kv_dtype=kv_dtype)), "cpu", threads=1
    )
    (dtype,) = {value.numpy().dtype for value in session.empty_cache(2).values}
    assert dtype == kv_dtype


@pytest.mark.skipif(
    "CUDAExecutionProvider" not in onnxruntime.get_available_providers(), reason="this onnxruntime has no CUDA"
)
@pytest.mark.parametrize("model", ["tied", "untied"])
def test_a_gpu_gives_what_the_cpu_gives(model: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(model).bundle
    outputs = []
    for provider in ("cpu", "cuda"):
        session = GraphSession(open_bundle(folder), provider, threads=1)  # type: ignore[arg-type]
        first = prefill(session, 3, 4)
        assert first.cache is not None
        outputs.append(go_on(session, first.cache.select([2, 0])))
    np.testing.assert_allclose(outputs[0].embeddings, outputs[1].embeddings, atol=1e-4)
