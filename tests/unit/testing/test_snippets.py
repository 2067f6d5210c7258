"""The harness of the docs' snippets: finds blocks, runs them, and fails on each way in which one can be untrue."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainwright.testing.snippets import SnippetError, check_snippet, read_snippets

FENCE = "```"


def page(folder: Path, text: str) -> Path:
    path = folder / "page.md"
    path.write_text(text.replace("~~~", FENCE), encoding="utf-8")
    return path


def check(folder: Path, text: str, **options: float) -> None:
    for snippet in read_snippets(page(folder, text)):
        check_snippet(snippet, folder, **options)


def test_blocks_are_found_with_line_language_and_words(tmp_path: Path) -> None:
    text = "# 标题\n\n~~~python\nprint('训')\n~~~\n\n-\n\n  ~~~yaml recipe\n  a:\n    b: 1\n  ~~~\n\n~~~\nplain\n~~~\n"
    found = [(s.line, s.language, s.words, s.text) for s in read_snippets(page(tmp_path, text))]
    assert found == [
        (3, "python", (), "print('训')\n"),
        (9, "yaml", ("recipe",), "a:\n  b: 1\n"),
        (14, "text", (), "plain\n"),
    ]


def test_a_longer_fence_holds_a_shorter_one(tmp_path: Path) -> None:
    snippets = read_snippets(page(tmp_path, "~~~`text\n~~~python\nx\n~~~\n~~~`\n"))
    assert [s.text for s in snippets] == ["~~~python\nx\n~~~\n".replace("~~~", FENCE)]


def test_python_runs_in_the_folder_and_continues(tmp_path: Path) -> None:
    text = (
        "~~~python\nx = 1\n~~~\n~~~python fragment\nnot_run()\n~~~\n"
        "~~~python continues\nopen(f'{x}-中.txt', 'w', encoding='utf-8').close()\n~~~\n"
    )
    check(tmp_path, text)
    assert (tmp_path / "1-中.txt").exists()


def test_a_new_python_block_starts_afresh(tmp_path: Path) -> None:
    with pytest.raises(SnippetError, match="NameError"):
        check(tmp_path, "~~~python\nx = 1\n~~~\n~~~python\nprint(x)\n~~~\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("~~~python\nraise ValueError('untrue')\n~~~\n", r"page\.md:1: exit code 1\n(.|\n)*untrue"),
        ("~~~python fragment\ndef (\n~~~\n", r"page\.md:1: invalid syntax"),
        ("~~~yaml\na: [1\n~~~\n", r"page\.md:1: while parsing"),
        ("\n~~~yaml recipe\nmodle: {preset: tiny}\n~~~\n", r"page\.md:2: (.|\n)*modle"),
        ("~~~json\n{'a': 1}\n~~~\n", r"page\.md:1: Expecting property name"),
        ("~~~toml\na =\n~~~\n", r"page\.md:1: "),
        ("~~~bash\nif true; do\n~~~\n", r"page\.md:1: not bash"),
        ("~~~pyton\nx\n~~~\n", r"page\.md:1: unknown language 'pyton'"),
        ("~~~python contniues\nx\n~~~\n", r"page\.md:1: unknown words \['contniues'\]"),
        ("~~~python\nx\n", r"page\.md:1: this fence is never closed"),
    ],
)
def test_untrue_snippets_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SnippetError, match=message):
        check(tmp_path, text)


def test_a_snippet_that_hangs_is_ended(tmp_path: Path) -> None:
    with pytest.raises(SnippetError, match="still running after 1 s"):
        check(tmp_path, "~~~python\nimport time\ntime.sleep(60)\n~~~\n", timeout=1.0)


def test_true_snippets_of_every_language_pass(tmp_path: Path) -> None:
    check(
        tmp_path,
        "~~~bash\nmake setup && ls | head\n~~~\n~~~json\n{}\n~~~\n~~~toml\na = 1\n~~~\n~~~console\n$ anything\n~~~\n"
        "~~~yaml\na: 1\n---\nb: 2\n~~~\n~~~text\nanything\n~~~\n",
    )
