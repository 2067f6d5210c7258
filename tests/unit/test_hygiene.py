"""Rules that hold for every file of the package: nothing that can run code from data, honest names, quiet libraries."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import trainwright

PACKAGE = Path(trainwright.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
CALLS_THAT_RUN_DATA = {
    "torch.load": "use safetensors or the checkpoint room",
    "torch.save": "use safetensors or the checkpoint room",
    "yaml.load": "use yaml.safe_load",
    "yaml.load_all": "use yaml.safe_load_all",
    "yaml.unsafe_load": "use yaml.safe_load",
    "yaml.full_load": "use yaml.safe_load",
    "eval": "parse it",
    "exec": "call it",
    "os.system": "use subprocess.run with a list",
}
MODULES_THAT_RUN_DATA = {"pickle", "cPickle", "dill", "shelve", "marshal", "joblib", "cloudpickle"}
PIPES_TO_OWN_PROCESSES = {"data/worker_pool.py"}
"""Files that pickle: only through pipes to processes that they start themselves, never from a file."""
MAY_PRINT = {"cli", "monitor"}


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def offences(source: str, room: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for name in names:
                if name.split(".")[0] in MODULES_THAT_RUN_DATA:
                    yield f"{node.lineno}: imports {name}, which can run code from a file"
        if not isinstance(node, ast.Call):
            continue
        called = dotted(node.func)
        safe_loader = any(
            "Safe" in ast.dump(argument) for argument in [*node.args[1:], *(k.value for k in node.keywords)]
        )
        if called in CALLS_THAT_RUN_DATA and not (called.startswith("yaml.load") and safe_loader):
            yield f"{node.lineno}: {called}(): {CALLS_THAT_RUN_DATA[called]}"
        if any(k.arg == "shell" and getattr(k.value, "value", None) is True for k in node.keywords):
            yield f"{node.lineno}: shell=True: pass a list"
        if any(k.arg == "trust_remote_code" and getattr(k.value, "value", None) is not False for k in node.keywords):
            yield f"{node.lineno}: trust_remote_code: only False may be written down"
        if any(k.arg == "allow_pickle" and getattr(k.value, "value", None) is not False for k in node.keywords):
            yield f"{node.lineno}: allow_pickle: only False may be written down"
        if called == "print" and room not in MAY_PRINT:
            yield f"{node.lineno}: print(): emit a record, or return the text"
        if called == "open" and not any(k.arg == "encoding" for k in node.keywords) and not is_binary(node):
            yield f"{node.lineno}: open() without encoding="


def is_binary(call: ast.Call) -> bool:
    modes = [*call.args[1:2], *(k.value for k in call.keywords if k.arg == "mode")]
    # A mode that is computed is somebody's thought-through case.
    return any(not isinstance(mode, ast.Constant) or "b" in str(mode.value) for mode in modes)


def name_of(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_file_follows_the_rules(file: Path) -> None:
    room = file.relative_to(PACKAGE).parts[0]
    found = list(offences(file.read_text(encoding="utf-8"), room))
    if name_of(file) in PIPES_TO_OWN_PROCESSES:
        found = [line for line in found if not line.endswith("imports pickle, which can run code from a file")]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "eval('1')",
        "subprocess.run('ls', shell=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "np.load(x, allow_pickle=flag)",
        "print('hello')",
        "open('x')",
        "open('x', 'w')",
        "open('x', mode='a')",
    ],
)
def test_each_rule_finds_what_it_forbids(source: str) -> None:
    assert list(offences(source, "data"))


@pytest.mark.parametrize(
    "source",
    [
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "yaml.safe_load(text)",
        "open('x', 'rb')",
        "open('x', encoding='utf-8')",
        "re.compile('x')",
        "model.eval()",
        "np.load(x, allow_pickle=False)",
    ],
)
def test_what_is_fine_is_not_reported(source: str) -> None:
    assert list(offences(source, "data")) == []


def test_the_command_line_may_print() -> None:
    assert list(offences("print('hello')", "cli")) == []


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_public_names_exist(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    declared = any(isinstance(node, (ast.Assign, ast.AnnAssign)) and "__all__" in ast.dump(node) for node in tree.body)
    if not declared:
        return
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    module = importlib.import_module(".".join(parts).removesuffix(".__init__"))
    missing = [name for name in module.__all__ if not hasattr(module, name)]
    assert missing == []
    assert len(set(module.__all__)) == len(module.__all__), "a name stands twice"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_every_file_says_what_it_is_for(file: Path) -> None:
    source = file.read_text(encoding="utf-8")
    assert not source.strip() or ast.get_docstring(ast.parse(source)), "no module docstring"


def test_names_of_test_files_are_unique() -> None:
    """pytest imports them by their bare name: two of one name are an error in whichever comes second."""
    tests = PACKAGE.parent / "tests"
    if not tests.exists():
        pytest.skip("the tests are not beside this installation")
    names: dict[str, list[str]] = {}
    for file in tests.rglob("*.py"):
        if file.name != "conftest.py":
            names.setdefault(file.name, []).append(file.relative_to(tests).as_posix())
    assert [paths for paths in names.values() if len(paths) > 1] == []
