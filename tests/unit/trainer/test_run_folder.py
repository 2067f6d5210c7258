"""Which folder a run gets."""

from __future__ import annotations

from pathlib import Path

from trainwright.checkpoint import RunLock
from trainwright.trainer.run_folder import find_run


def test_a_folder_of_a_run_that_never_began_is_taken(tmp_path: Path) -> None:
    def name() -> str:
        return find_run(tmp_path, "运行", resume="never")[0].path.name

    assert name() == "运行"
    lock = RunLock(tmp_path / "运行")
    assert name() == "运行-2", "another process is about to begin there"
    lock.release()
    assert name() == "运行"
    (tmp_path / "运行" / "run.json").write_text("{}", encoding="utf-8")
    assert name() == "运行-2"
    assert find_run(tmp_path, "运行", resume="auto")[0].path.name == "运行"
