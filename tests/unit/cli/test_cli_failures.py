"""Exit codes and messages: one failure, one message, one code, and a traceback that can be found again."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from trainwright.base import errors
from trainwright.base.errors import ConfigError, Interrupted, TrainwrightError
from trainwright.cli import main as cli
from trainwright.cli.failures import exit_codes, report

DOCS = Path(__file__).resolve().parents[3] / "docs" / "cli.md"


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch):
    """Make `trainwright version` raise what the test says."""

    def fail_with(error: BaseException) -> None:
        def fails() -> None:
            raise error

        monkeypatch.setattr("trainwright.cli.main.app", lambda **_: fails())

    return fail_with


@pytest.mark.parametrize("name", [name for name in errors.__all__ if name != "TrainwrightError"])
def test_every_error_of_ours_has_its_own_code(name: str, failing, capsys: pytest.CaptureFixture[str]) -> None:
    cls = getattr(errors, name)
    failing(cls("this was seen", hint="do that"))
    assert cli.main(["version"]) == cls.exit_code
    assert capsys.readouterr().err == "error: this was seen\n  -> do that\n"
    codes = [getattr(errors, other).exit_code for other in errors.__all__]
    assert codes.count(cls.exit_code) == 1


def test_an_unexpected_error_names_its_cause_and_saves_the_traceback(
    failing, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(KeyError("文本\nsecond line"))
    assert cli.main(["version"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: unexpected KeyError: ")
    path = re.search(r"traceback: (\S+) ", message)
    assert path is not None
    saved = Path(path[1])
    text = saved.read_text(encoding="utf-8")
    saved.unlink()
    assert "Traceback (most recent call last)" in text
    assert "KeyError" in text
    assert "Traceback" not in message


@pytest.mark.parametrize("arguments", [["--debug", "version"], ["version", "--debug"]])
def test_debug_shows_the_traceback(arguments: list[str], failing, capsys: pytest.CaptureFixture[str]) -> None:
    failing(ConfigError("wrong"))
    assert cli.main(arguments) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_memory_and_interruptions() -> None:
    import torch

    assert report(MemoryError(), debug=False) == 6
    assert report(torch.OutOfMemoryError("CUDA out of memory"), debug=False) == 6
    assert report(KeyboardInterrupt(), debug=False) == 130
    assert report(Interrupted("saved"), debug=False) == 75
    assert report(SystemExit(4), debug=False) == 4


def test_usage_errors_have_the_code_of_a_wrong_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bogus"]) == 2
    assert "No such command 'bogus'" in capsys.readouterr().err
    assert cli.main(["train"]) == 2
    assert cli.main(["train", "stdlib", "--bogus"]) == 2
    capsys.readouterr()
    assert cli.main([]) == 2
    assert "Train what a recipe describes." in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_failure_to_talk_about() -> None:
    code = (
        "import sys, trainwright.cli.main as m\n"
        "def long():\n"
        "    for _ in range(100000): print('x' * 100)\n"
        "m.app = lambda **_: long()\n"
        "sys.exit(m.main(['version']))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    message = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 141
    assert message == b""


def test_the_docs_list_every_exit_code_as_the_code_has_it() -> None:
    page = DOCS.read_text(encoding="utf-8")
    rows = "\n".join(f"| {code} | `{name}` | {meaning} |" for code, name, meaning in exit_codes())
    assert rows in page


def test_the_docs_describe_every_verb_and_option() -> None:
    import typer

    page = DOCS.read_text(encoding="utf-8")
    root = typer.main.get_command(cli.app)
    pending = [((), root)]
    seen = 0
    while pending:
        names, command = pending.pop()
        for name, inner in getattr(command, "commands", {}).items():
            pending.append(((*names, name), inner))
        if names and not getattr(command, "commands", {}):
            seen += 1
            section = page.partition(f"### `trainwright {' '.join(names)}")[2].partition("\n### ")[0]
            assert section, f"docs/cli.md has no section for {' '.join(names)}"
            for parameter in command.params:
                for option in parameter.opts:
                    if option.startswith("--") and option != "--help":
                        assert f"`{option}" in section, f"docs/cli.md: {' '.join(names)} has no {option}"
    assert seen == page.count("\n### `trainwright"), "the page describes a verb that does not exist"


def test_the_base_class_is_the_unexpected_code() -> None:
    assert TrainwrightError.exit_code == 1
