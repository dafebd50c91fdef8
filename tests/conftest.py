"""Shared fixtures. Published reference data is optional: tests that need it skip where it is absent."""

import os
from pathlib import Path

import pytest
import torch

SHARED = Path(os.environ.get("CVVAE_SHARED") or Path(__file__).resolve().parents[2] / "shared")


@pytest.fixture(autouse=True)
def repeatable():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of tensors made with the reference implementation."""
    folder = SHARED / "golden"
    if not folder.is_dir():
        pytest.skip("no reference tensors: set CVVAE_SHARED to the folder that holds golden/")
    return folder
