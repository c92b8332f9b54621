"""Shared by all tests: one thread, transformers silent, and a tiny model with text, on disk.

`tiny_model` and `texts` are made once and shared: a test that spoils a file copies the folder first.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import transformers

import folders

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for processes that tests start: sums are split by it, hence their last bits
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Llama of 8 layers, safetensors and tokenizer included."""
    return folders.write_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two .txt files that have no sentence in common: one to calibrate and tune on, one to evaluate on."""
    folder = tmp_path_factory.mktemp("texts")
    return folders.write_text(folder / "calibration.txt", 1), folders.write_text(folder / "evaluation.txt", 2)
