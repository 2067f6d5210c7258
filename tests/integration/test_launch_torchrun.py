"""Under torchrun nobody supervises: a rank watches itself, leaves its evidence and ends; torchrun ends the job."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import dataclasses, json, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from trainwright.base.processes import process_environment
from trainwright.launch import heartbeat_from_environment

folder = Path(sys.argv[1])
place = process_environment()
(folder / f"place-{place.rank}.json").write_text(json.dumps(dataclasses.asdict(place)))
heartbeat = heartbeat_from_environment(hang_after=2.0, folder=folder / "evidence")
dist.init_process_group("gloo")

def reads_a_slow_disk():
    time.sleep(600)

for step in range(5):
    heartbeat.beat(step, "forward")
    if step == 3 and dist.get_rank() == 1:
        reads_a_slow_disk()
    dist.all_reduce(torch.ones(4))
"""


def test_a_hang_under_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(script), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert "error: no progress for 2 s: rank 1 did not join all_reduce #4 (Float [4]), in which rank 0" in done.stderr
    assert "in reads_a_slow_disk" in done.stderr
    assert "error: rank 0 ends: no progress for 2 s; evidence in" in done.stderr
    assert (tmp_path / "evidence" / "flight-1.json").exists()
    places = [json.loads((tmp_path / f"place-{rank}.json").read_text()) for rank in range(2)]
    for rank, place in enumerate(places):
        assert (place["rank"], place["local_rank"], place["world"], place["local_world"]) == (rank, rank, 2, 2)
        assert (place["launcher"], place["node_rank"]) == ("torchrun", 0)
    assert places[0]["master_port"] == places[1]["master_port"] > 0
