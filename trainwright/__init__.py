"""Trainwright: trains language models and brings them all the way to use.

Names are imported when they are first used, so that the command line does not wait for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainwright.engine.initialize import initialize

__all__ = ["initialize"]
__version__ = "0.1.0.dev0"


def __getattr__(name: str) -> Any:
    if name == "initialize":
        from trainwright.engine.initialize import initialize

        return initialize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
