"""The fenced snippets of Markdown pages, and what makes each of them true: run, parsed or validated.

The words after the fence say what is done (CONTRIBUTING.md, "Snippets"):

    ```python             run in an empty folder, must end without an error
    ```python continues   run after all python snippets before it on the page
    ```python fragment    parsed only: it shows a shape, not a program
    ```python slow        run by the slow suite
    ```yaml               parsed;  ```yaml recipe   loaded as a recipe as well
    ```bash               parsed;  ```json, ```toml  parsed
    ```console, ```text   what somebody saw: neither run nor parsed

Any other language is an error, so that a typing mistake cannot switch a check off.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Snippet", "SnippetError", "check_snippet", "read_snippets"]

KNOWN_WORDS = {
    "python": {"continues", "fragment", "slow"},
    "yaml": {"recipe"},
    "bash": set(),
    "json": set(),
    "toml": set(),
    "console": set(),
    "text": set(),
}


class SnippetError(AssertionError):
    """A snippet is not what its page says; the message opens with page and line."""


@dataclass(frozen=True)
class Snippet:
    """One fenced block.

    Attributes:
        page: the Markdown file; line: where the block opens.
        words: what follows the language on the fence.
        before: the python snippets that `continues` runs first.
    """

    page: Path
    line: int
    language: str
    words: tuple[str, ...]
    text: str
    before: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def is_slow(self) -> bool:
        return "slow" in self.words


def read_snippets(page: Path) -> list[Snippet]:
    """All fenced blocks of a page, in order. SnippetError for an unclosed fence or words nobody knows."""
    snippets: list[Snippet] = []
    chain: list[str] = []
    opened: tuple[int, str, list[str]] | None = None
    body: list[str] = []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        stripped = line.strip()
        if opened is None:
            if stripped.startswith("```"):
                fence = stripped[: len(stripped) - len(stripped.lstrip("`"))]
                language, *words = stripped[len(fence) :].split() or ["text"]
                opened, body = (number, fence, [language, *words]), []
                indent = len(line) - len(line.lstrip())
            continue
        if stripped != opened[1]:
            body.append(line[indent:] if not line[:indent].strip() else line)
            continue
        started, _, (language, *words) = opened
        snippet = Snippet(page, started, language, tuple(words), "\n".join(body) + "\n")
        _refuse_unknown_words(snippet)
        if language == "python" and "fragment" not in words:
            chain = [*chain, snippet.text] if "continues" in words else [snippet.text]
            before = tuple(chain[:-1])
            snippet = Snippet(page, started, language, tuple(words), snippet.text, before)
        snippets.append(snippet)
        opened = None
    if opened is not None:
        raise SnippetError(f"{page.name}:{opened[0]}: this fence is never closed")
    return snippets


def check_snippet(snippet: Snippet, folder: Path, *, timeout: float = 120.0) -> None:
    """Run, parse or validate one snippet; python runs in `folder`. SnippetError says what is wrong and where."""
    match snippet.language:
        case "python" if "fragment" in snippet.words:
            _parsed(snippet, lambda: ast.parse(snippet.text), SyntaxError)
        case "python":
            _run_python(snippet, folder, timeout)
        case "yaml":
            _check_yaml(snippet)
        case "json":
            _parsed(snippet, lambda: json.loads(snippet.text), ValueError)
        case "toml":
            _parsed(snippet, lambda: tomllib.loads(snippet.text), ValueError)
        case "bash":
            done = subprocess.run(["bash", "-n"], input=snippet.text, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SnippetError(f"{snippet.where}: not bash: {done.stderr.strip()}")


def _run_python(snippet: Snippet, folder: Path, timeout: float) -> None:
    program = folder / "snippet.py"
    program.write_text("".join([*snippet.before, snippet.text]), encoding="utf-8")
    environment = os.environ | {"PYTHONIOENCODING": "utf-8", "NO_COLOR": "1"}
    try:
        done = subprocess.run(
            [sys.executable, program.name],
            cwd=folder,
            env=environment,
            capture_output=True,
            encoding="utf-8",
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise SnippetError(f"{snippet.where}: still running after {timeout:.0f} s") from None
    if done.returncode:
        raise SnippetError(f"{snippet.where}: exit code {done.returncode}\n{done.stdout}{done.stderr}")


def _check_yaml(snippet: Snippet) -> None:
    import yaml

    from trainwright.base.errors import TrainwrightError

    _parsed(snippet, lambda: list(yaml.safe_load_all(snippet.text)), yaml.YAMLError)
    if "recipe" in snippet.words:
        from trainwright.config import load_recipe_text

        _parsed(snippet, lambda: load_recipe_text(snippet.text), TrainwrightError)


def _parsed(snippet: Snippet, parse: object, error: type[Exception]) -> None:
    assert callable(parse), "a parser is a function"
    try:
        parse()
    except error as caught:
        raise SnippetError(f"{snippet.where}: {caught}") from caught


def _refuse_unknown_words(snippet: Snippet) -> None:
    if snippet.language not in KNOWN_WORDS:
        known: Iterable[str] = sorted(KNOWN_WORDS)
        raise SnippetError(f"{snippet.where}: unknown language {snippet.language!r}; known are {', '.join(known)}")
    unknown = set(snippet.words) - KNOWN_WORDS[snippet.language]
    if unknown:
        raise SnippetError(f"{snippet.where}: unknown words {sorted(unknown)} after {snippet.language}")
