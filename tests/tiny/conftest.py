"""The shipped pair and the corpus it was made from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiny.corpus import Corpus
from tiny.settings import SEED


@pytest.fixture(scope="session")
def corpus() -> Corpus:
    return Corpus(SEED)


@pytest.fixture(scope="session")
def shipped() -> Path:
    return Path(__file__).parents[2] / "data" / "tiny"
