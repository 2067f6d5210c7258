"""Stop strings in text that arrives in pieces: nothing that might belong to one is shown too early."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["StopScanner"]


class StopScanner:
    """Passes text through until a stop string is complete, wherever the pieces were cut.

    `found` is the stop string that ended the text, or None.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """The text that is now certain: all that is neither a stop string nor the possible beginning of one."""
        if self.found is not None:
            return ""
        if not self._stops:
            return piece
        text = self._held + piece
        matches = [(position, stop) for stop in self._stops if (position := text.find(stop)) >= 0]
        if matches:
            position, self.found = min(matches, key=lambda match: (match[0], -len(match[1])))
            self._held = ""
            return text[:position]
        keep = self._possible_beginning(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, when no more text will come."""
        held, self._held = self._held, ""
        return held

    def _possible_beginning(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = min(len(text), max(map(len, self._stops)) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
