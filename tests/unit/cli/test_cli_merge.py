"""`trainwright merge`: what goes into the merged folder beside the weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainwright.cli import main as cli
from trainwright.inference import adapter_merging


@pytest.mark.parametrize(("files", "kept"), [(("run.json", "trainwright_task.json"), True), (("run.json",), False)])
@pytest.mark.parametrize("source", ["训练", "训练/adapter"])
def test_the_task_of_a_run_goes_with_its_merged_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, files: tuple[str, ...], kept: bool
) -> None:
    (tmp_path / "训练" / "adapter").mkdir(parents=True)
    for name in ("adapter/adapter_config.json", *files):
        (tmp_path / "训练" / name).write_text("{}", encoding="utf-8")

    def merge_folder(folder: Path, destination: Path, **_: object) -> str:
        assert folder == Path("训练") / "adapter"
        destination.mkdir()
        return "nothing changed"

    monkeypatch.setattr(adapter_merging, "merge_folder", merge_folder)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["merge", source, "merged"]) == 0
    assert (tmp_path / "merged" / "trainwright_task.json").is_file() is kept
