from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.export.tiny import save_checkpoint


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Matrices this small only wait for other threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory: a Llama with random weights, hidden size 64, and a tokenizer of 400 tokens."""
    return save_checkpoint(tmp_path_factory.mktemp("base") / "tiny-llama", tied=True)
