"""Fixtures that several test files share: a tiny phantom dataset, and a model trained on it for a few steps."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from medseg.phantom import make_dataset

settings.register_profile("medseg", deadline=None)  # a busy machine is no fault of the code
settings.load_profile("medseg")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real test data; the test is skipped where ``MEDSEG_TEST_DATA`` does not name it."""
    folder = os.environ.get("MEDSEG_TEST_DATA")
    if not folder:
        pytest.skip("needs real data: set MEDSEG_TEST_DATA to their folder")
    return Path(folder)
