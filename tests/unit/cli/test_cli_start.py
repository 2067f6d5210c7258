"""The command line starts at once: nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

# Not pydantic: typer imports it by itself where it is installed (0.05 s), to support it in signatures.
HEAVY = ("torch", "numpy", "rich", "transformers", "yaml", "trainwright.config")


def loaded_after(arguments: list[str]) -> str:
    code = (
        "import sys, trainwright.cli.main as m\n"
        f"code = m.main({arguments!r})\n"
        f"print('LOADED', [name for name in {HEAVY!r} if name in sys.modules], code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.rpartition("LOADED ")[2].strip()


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["data", "build", "--help"], ["doctor", "--help"], ["version"]]
)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    assert loaded_after(arguments) == "[] 0"


def test_a_wrong_recipe_is_refused_without_torch() -> None:
    assert "torch" not in loaded_after(["train", "stdlib", "optim.lr=fast"])


def test_help_answers_in_under_half_a_second() -> None:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", "from trainwright.cli.main import run; run()", "--help"], check=True, stdout=-3
        )
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5  # 0.12 s on an idle core; the best of five stands a loaded one


def test_the_installed_command_is_this_one() -> None:
    from importlib.metadata import entry_points

    found = {entry.name: entry.value for entry in entry_points(group="console_scripts") if "trainwright" in entry.value}
    assert found == {"trainwright": "trainwright.cli.main:run", "tw": "trainwright.cli.main:run"}
