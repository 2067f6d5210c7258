"""The snippets of README, CONTRIBUTING and docs are executed, and their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from trainwright.testing.snippets import Snippet, check_snippet, read_snippets

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *(page for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md") if (page := ROOT / name).exists()),
    *sorted((ROOT / "docs").glob("**/*.md")),
]
SNIPPETS = [snippet for page in PAGES for snippet in read_snippets(page)]


def where(snippet: Snippet) -> str:
    return f"{snippet.where}-{snippet.language}"


@pytest.mark.parametrize("snippet", [s for s in SNIPPETS if not s.is_slow], ids=where)
def test_snippet(snippet: Snippet, tmp_path: Path) -> None:
    check_snippet(snippet, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("snippet", [s for s in SNIPPETS if s.is_slow], ids=where)
def test_slow_snippet(snippet: Snippet, tmp_path: Path) -> None:
    check_snippet(snippet, tmp_path, timeout=1200)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:|#", link)]
    assert [link for link in links if not (page.parent / link.split("#")[0]).exists()] == []
