"""Shared fixtures. Data sets are not part of the project: tests that need one skip themselves, saying so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


@pytest.fixture
def shared_data() -> Callable[[str], Path]:
    """`shared_data("tinyshakespeare/input.txt")` gives the path, or skips the test when the file is not there."""

    def find(name: str) -> Path:
        path = SHARED_DATA / name
        if not path.exists():
            pytest.skip(f"data set {name!r} is not beside this checkout (looked in {SHARED_DATA})")
        return path

    return find
