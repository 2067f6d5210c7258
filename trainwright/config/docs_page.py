"""Writes the tables of docs/recipes.md from the schema: `python -m trainwright.config.docs_page docs/recipes.md`."""

from __future__ import annotations

import sys
from pathlib import Path

from trainwright.config.reference import markdown_table
from trainwright.config.schema import Recipe

__all__ = ["update_page"]


def update_page(text: str) -> str:
    """docs/recipes.md with its tables made anew: everything behind the marker comment is replaced."""
    marker = "to the schema. -->\n"
    head, found, _ = text.partition(marker)
    if not found:
        raise ValueError(f"the page has no line that ends in {marker!r}")
    tables = [f"### `{section}`\n\n{markdown_table(section)}\n" for section in Recipe.model_fields]
    return head + marker + "\n" + "\n".join(tables)


if __name__ == "__main__":
    import sys
    from pathlib import Path

    page = Path(sys.argv[1])
    page.write_text(update_page(page.read_text(encoding="utf-8")), encoding="utf-8")
