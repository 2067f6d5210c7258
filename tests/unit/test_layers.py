"""The layer test: no room of the package imports a sibling or upward, and the check itself finds what it should."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import trainwright
from trainwright.testing.layers import ROOMS, TORCH_FREE, Violation, broken_layers

PACKAGE = Path(trainwright.__file__).parent


def test_no_layer_is_broken() -> None:
    assert [str(violation) for violation in broken_layers(PACKAGE)] == []


def test_the_table_itself_only_points_down() -> None:
    for name, room in ROOMS.items():
        for imported in room.may_import:
            assert ROOMS[imported].layer < room.layer, f"{name} -> {imported}"


def test_the_page_and_the_table_agree() -> None:
    page = PACKAGE.parent / "docs" / "architecture.md"
    if not page.exists():
        pytest.skip("docs/architecture.md is not in this installation")
    rows = dict(re.findall(r"^\| (\d) \| (\w+)/ \|", page.read_text(encoding="utf-8"), flags=re.MULTILINE))
    layers = re.findall(r"^\| (\d) \| (\w+)/ \|", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert rows, "the page has no table of rooms any more"
    for layer, room in layers:
        assert ROOMS[room].layer == int(layer), room
    rooms_that_exist = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms_that_exist == {room for _, room in layers}


@pytest.mark.parametrize("room", [room for room in TORCH_FREE if (PACKAGE / room).exists()])
def test_importable_without_torch(room: str) -> None:
    """Every module of the room, in a process in which importing torch is an error."""
    modules = [
        ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        for file in sorted((PACKAGE / room).rglob("*.py"))
    ]
    program = f"""
import sys, importlib
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers"):
            raise ImportError(f"{{name}} is imported")
sys.meta_path.insert(0, Refuse())
importlib.import_module("trainwright")
for module in {modules!r}:
    importlib.import_module(module)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def write(root: Path, files: dict[str, str]) -> list[Violation]:
    for name, text in files.items():
        path = root / "trainwright" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return broken_layers(root / "trainwright")


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("base/a.py", "from trainwright.config import x", "base (layer 0) imports upward config (layer 1)"),
        ("models/a.py", "import trainwright.data.readers", "models (layer 2) imports its sibling data (layer 2)"),
        ("models/a.py", "from trainwright import data", "models (layer 2) imports its sibling data"),
        ("data/a/b.py", "from ...models import llama", "data (layer 2) imports its sibling models"),
        ("data/__init__.py", "from ..models import llama", "data (layer 2) imports its sibling models"),
        ("data/__init__.py", "from .. import engine", "data (layer 2) imports upward engine (layer 5)"),
        ("optim/a.py", "def f():\n    from trainwright.checkpoint import x", "optim (layer 3) imports its sibling"),
        (
            "optim/a.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from trainwright.engine import x",
            "optim (layer 3) imports upward engine",
        ),
        ("engine/a.py", "import trainwright.data", "engine (layer 5) imports past what the table allows: data"),
        ("trainer/a.py", "import trainwright.testing", "past what the table allows: testing"),
        ("drawer/a.py", "", "drawer is no room of the table"),
        ("data/a.py", "import trainwright.drawer", "data imports drawer, which is no room"),
        ("config/a.py", "import torch.nn", "config imports torch when it is imported"),
        ("cli/a.py", "try:\n    from torch import Tensor\nexcept ImportError:\n    pass", "cli imports torch when"),
        ("base/a.py", "class A:\n    import torch", "base imports torch when it is imported"),
        ("base/a.py", "def f(:", "cannot be read"),
    ],
)
def test_a_broken_layer_is_found(tmp_path: Path, file: str, text: str, reason: str) -> None:
    violations = write(tmp_path, {file: text})
    assert len(violations) == 1
    assert reason in str(violations[0])
    assert str(violations[0]).startswith(f"trainwright/{file}:")


def test_what_is_allowed_is_not_reported(tmp_path: Path) -> None:
    allowed = {
        "__init__.py": "from trainwright.trainer import Trainer",
        "base/a.py": "def f():\n    import torch\n",
        "config/a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch",
        "data/a.py": "import torch, os\nfrom trainwright import __version__\nfrom . import b\nfrom .b import c",
        "models/a.py": "from trainwright.ops.norm import rms_norm\nimport datasets",
        "cli/a.py": "def f():\n    from trainwright.trainer import Trainer",
    }
    assert write(tmp_path, allowed) == []


def test_the_line_is_named(tmp_path: Path) -> None:
    assert write(tmp_path, {"base/a.py": "import os\n\n\nimport trainwright.cli\n"})[0].line == 4
