"""`python -m trainwright` is the command line: how the launcher starts its ranks."""

from __future__ import annotations

from trainwright.cli.main import run

if __name__ == "__main__":
    run()
