"""What is said to do with a finished run."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from trainwright.config.tasks import TASK_NAMES
from trainwright.config.tasks.commands import use_commands


@pytest.mark.parametrize("task", TASK_NAMES)
def test_every_task_has_a_command_that_a_shell_reads(task: str) -> None:
    folder = Path("my runs") / "问答"
    for command in use_commands(task, folder, ("train", "validation", "test")):
        words = shlex.split(command)
        assert words[0] == "trainwright"
        assert any(str(folder) in word for word in words)


def test_rows_that_are_not_there_are_not_offered() -> None:
    assert use_commands("ner", Path("a"), ("train", "validation"))[-1] == "trainwright eval a --split validation"
    assert use_commands("ner", Path("a"), ("train",)) == ["trainwright predict a YOUR_FILE"]
    assert use_commands("sft", Path("a"), ("train",)) == ["trainwright chat a"]
