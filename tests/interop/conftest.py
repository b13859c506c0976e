"""Keeps everything that Hugging Face libraries cache inside a folder that disappears with the test run."""

from __future__ import annotations

import os
import tempfile

import pytest

# Read once, when transformers is imported; no test module of this folder has been imported yet.
_CACHE = tempfile.TemporaryDirectory(prefix="intttrain-hf-")
os.environ.update(
    HF_HOME=_CACHE.name,
    HF_MODULES_CACHE=f"{_CACHE.name}/modules",
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TRANSFORMERS_VERBOSITY="error",
)


@pytest.fixture(autouse=True, scope="session")
def one_torch_thread():
    """Matrices of a few hundred numbers: starting threads costs more than multiplying."""
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(1)
