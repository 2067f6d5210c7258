"""A sink for the events that saving emits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from trainwright.base.events import Record, listening


@pytest.fixture
def records() -> Iterator[list[Record]]:
    """Every event that is emitted during the test."""
    seen: list[Record] = []
    with listening(seen.append):
        yield seen
