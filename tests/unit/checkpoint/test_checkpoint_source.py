"""The package cannot execute what it loads: it names no function that could. And listing does not wait for torch."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import trainwright.checkpoint

FOLDER = Path(trainwright.checkpoint.__file__).parent
FORBIDDEN = re.compile(
    r"torch\.(load|save)\b|import (c?[pP]ickle|dill|marshal|shelve|joblib)\b|from (c?[pP]ickle|dill|marshal|shelve)\b"
    r"|\bunpickle|\b(eval|exec|(?<!re\.)compile|__import__)\(|allow_pickle|weights_only|yaml\.load|os\.system|subprocess"
)


def test_no_way_to_run_code_is_named() -> None:
    assert FORBIDDEN.search("x = torch.load(path)")  # the pattern works
    assert FORBIDDEN.search("import pickle")
    sources = sorted(FOLDER.glob("*.py"))
    assert len(sources) > 10
    for source in sources:
        assert not (found := FORBIDDEN.search(source.read_text(encoding="utf-8"))), f"{source.name}: {found[0]}"


def test_listing_and_verifying_do_not_import_torch() -> None:
    code = (
        "import sys; from trainwright.checkpoint import RunLock, latest, list_checkpoints, verify; "
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there() -> None:
    for name in trainwright.checkpoint.__all__:
        assert callable(getattr(trainwright.checkpoint, name)), name
