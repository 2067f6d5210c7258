"""Ranks that fail, hang, are stopped or killed, under our launcher: real processes, and gloo where it matters."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from trainwright.launch.watch import process_state

GLOO = """
import os, signal, sys, time
import torch, torch.distributed as dist
from trainwright.launch import heartbeat_from_environment

mode = sys.argv[1]
heartbeat = heartbeat_from_environment()
dist.init_process_group("gloo")
rank = dist.get_rank()
asked = []
if mode == "agree":
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))

def misbehave():
    print("at", time.time(), file=sys.stderr, flush=True)
    if mode == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "raise":
        raise ValueError("the cause: 原因")
    if mode == "hang":
        time.sleep(600)
    if mode == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)

x = torch.ones(5, 3)
for step in range(1, 100_000):
    heartbeat.beat(step, "forward")
    if step == 10:
        if mode == "clean":
            break
        print(f"rank {rank} of {dist.get_world_size()} is under way", flush=True)
        if rank == 1:
            misbehave()
    dist.all_reduce(x.fill_(1.0))
    assert x.sum() == 15 * dist.get_world_size()
    if mode == "agree":
        stop = torch.tensor(float(len(asked)))
        dist.all_reduce(stop)
        if stop:
            time.sleep(0.5)  # it saves
            sys.exit(75)
    time.sleep(0.01)
heartbeat.stop()
dist.destroy_process_group()
print("rank", rank, "is done", flush=True)
"""

Launcher = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def gloo(tmp_path: Path) -> Path:
    script = tmp_path / "训练.py"
    script.write_text(GLOO, encoding="utf-8")
    return script


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Launcher]:
    """`start("--processes", "2", "script.py", ...)` is the launcher as a process; it is killed when the test ends."""
    started = []

    def run(*arguments: str) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        process = subprocess.Popen(
            [sys.executable, "-m", "trainwright", "launch", "--logs", str(tmp_path / "logs"), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**environment, "OMP_NUM_THREADS": "1"},
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def log(tmp_path: Path, rank: int) -> str:
    [path] = tmp_path.glob(f"logs/*/rank-{rank}.log")
    return path.read_text(encoding="utf-8")


def moment(tmp_path: Path) -> float:
    """When rank 1 misbehaved, in seconds since the epoch."""
    found = re.search(r"^at ([0-9.]+)$", log(tmp_path, 1), re.MULTILINE)
    assert found
    return float(found[1])


def test_a_clean_run_in_which_one_rank_speaks(start: Launcher, gloo: Path, tmp_path: Path) -> None:
    out, err = (launcher := start("--processes", "3", "--", str(gloo), "clean")).communicate(timeout=90)
    assert launcher.returncode == 0, err
    assert out == "rank 0 is done\n"
    assert "error" not in err
    assert "rank 2 is done" in log(tmp_path, 2)


def test_a_killed_rank_ends_the_others_and_is_named(start: Launcher, gloo: Path, tmp_path: Path) -> None:
    launcher = start("--processes", "2", "--", str(gloo), "kill")
    _, err = launcher.communicate(timeout=90)
    seconds = time.time() - moment(tmp_path)
    assert launcher.returncode == 128 + signal.SIGKILL
    assert err.startswith("error: rank 1 of 2 failed first: killed by SIGKILL")
    assert "gloo" not in err  # rank 0's lost connection is in its file only
    assert seconds < 8, f"{seconds:.2f} s from the kill to the end"
    print(f"\nfrom SIGKILL of rank 1 to the end of the launcher: {seconds:.2f} s")


def test_the_cause_is_shown_and_not_what_followed(start: Launcher, gloo: Path, tmp_path: Path) -> None:
    launcher = start("--processes", "2", "--", str(gloo), "raise")
    out, err = launcher.communicate(timeout=90)
    assert launcher.returncode == 1
    assert out == "rank 0 of 2 is under way\n"
    assert err.startswith("error: rank 1 of 2 failed first: exit code 1\n")
    assert "ValueError: the cause: 原因" in err
    assert "gloo" not in err
    assert "gloo/transport" in log(tmp_path, 0)  # rank 0 did fail, too


def test_a_hanging_rank_is_named_with_stack_and_collective(start: Launcher, gloo: Path, tmp_path: Path) -> None:
    launcher = start("--processes", "2", "--hang-after", "2", "--", str(gloo), "hang")
    _, err = launcher.communicate(timeout=90)
    beyond = time.time() - moment(tmp_path) - 2
    assert launcher.returncode == 10
    first, second, third = err.splitlines()[:3]
    assert first.startswith("error: no progress for 2 s: rank 1 did not join all_reduce #10 (Float [5, 3]), in which")
    assert second.startswith("  rank 1 (pid ")
    assert "step 10, forward" in second
    assert re.fullmatch(r'    File ".*训练.py", line \d+ in misbehave', third)
    assert "waits in all_reduce #10 (Float [5, 3])" in err
    assert beyond < 8, f"{beyond:.2f} s beyond hang_after"
    print(f"\nfrom the hang to the end of the launcher, beyond hang_after: {beyond:.2f} s")


def test_a_stopped_rank_is_named(start: Launcher, gloo: Path) -> None:
    launcher = start("--processes", "2", "--hang-after", "2", "--", str(gloo), "stop")
    _, err = launcher.communicate(timeout=90)
    assert launcher.returncode == 10
    assert "rank 1 is stopped (SIGSTOP, or a debugger); rank 0 waits in all_reduce #10" in err


def test_a_stop_reaches_every_rank_once(start: Launcher, gloo: Path) -> None:
    launcher = start("--processes", "2", "--", str(gloo), "agree")
    assert launcher.stdout is not None
    launcher.stdout.readline()  # it is under way
    launcher.terminate()
    time.sleep(0.3)
    launcher.terminate()  # while they save
    _, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 75, err
    assert "told to stop already" in err
    assert "error" not in err


RANK = """
import os, signal, subprocess, sys, time
rank = os.environ["RANK"]
child = subprocess.Popen(["sleep", "300"])
with open(sys.argv[1] + "/pids-" + rank, "w") as file:
    file.write(f"{os.getpid()} {child.pid}")
if "deaf" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
if "fails" in sys.argv and rank == "1":
    while len([name for name in os.listdir(sys.argv[1]) if name.startswith("pids-")]) < 2:
        time.sleep(0.01)
    print("error: no such data\\n  -> look elsewhere", file=sys.stderr)
    sys.exit(3)
time.sleep(300)
"""


@pytest.fixture
def plain(tmp_path: Path) -> tuple[str, ...]:
    """A rank without torch that starts a process of its own and writes down both."""
    script = tmp_path / "rank.py"
    script.write_text(RANK, encoding="utf-8")
    return "--processes", "2", "--", str(script), str(tmp_path)


def pids(tmp_path: Path, *, deadline: float = 20.0) -> list[int]:
    """The processes of both ranks and of their children, once both are there."""
    end = time.monotonic() + deadline
    while time.monotonic() < end:
        found = [pid for path in sorted(tmp_path.glob("pids-*")) for pid in path.read_text().split()]
        if len(found) == 4:
            return [int(pid) for pid in found]
        time.sleep(0.02)
    raise AssertionError("the ranks did not start")


def gone(pid: int, *, within: float) -> bool:
    end = time.monotonic() + within
    while process_state(pid) != "gone" and time.monotonic() < end:
        time.sleep(0.02)
    return process_state(pid) == "gone"


def test_ranks_die_with_a_killed_launcher(start: Launcher, plain: tuple[str, ...], tmp_path: Path) -> None:
    launcher = start(*plain)
    first, first_child, second, second_child = pids(tmp_path)
    try:
        launcher.send_signal(signal.SIGKILL)
        assert gone(first, within=5)
        assert gone(second, within=5)
    finally:
        for child in (first_child, second_child):  # nobody was left to end what the ranks had started
            if process_state(child) != "gone":
                os.kill(child, signal.SIGKILL)


def test_a_failed_rank_ends_deaf_ones_and_their_children(
    start: Launcher, plain: tuple[str, ...], tmp_path: Path
) -> None:
    launcher = start(*plain, "fails", "deaf")
    everybody = pids(tmp_path)
    _, err = launcher.communicate(timeout=30)
    assert launcher.returncode == 3
    assert err.startswith(
        "error: rank 1 of 2 failed first: exit code 3 (DataError)\n  | error: no such data\n  |   -> look elsewhere\n"
    )
    assert all(gone(pid, within=5) for pid in everybody)


def test_ranks_that_do_not_stop_are_killed_after_the_grace(
    start: Launcher, plain: tuple[str, ...], tmp_path: Path
) -> None:
    launcher = start("--grace", "1", *plain, "deaf")
    everybody = pids(tmp_path)
    assert launcher.stdout is not None
    launcher.stdout.readline()
    launcher.terminate()
    _, err = launcher.communicate(timeout=30)
    assert launcher.returncode == 128 + signal.SIGKILL
    assert "error: rank 0, 1: still there 1 s after the stop signal, and killed" in err
    assert all(gone(pid, within=5) for pid in everybody)


def test_a_stop_ends_ranks_without_a_handler(start: Launcher, plain: tuple[str, ...], tmp_path: Path) -> None:
    launcher = start(*plain)
    everybody = pids(tmp_path)
    launcher.terminate()
    _, err = launcher.communicate(timeout=30)
    assert launcher.returncode == 128 + signal.SIGTERM, err
    assert all(gone(pid, within=5) for pid in everybody)


def test_what_cannot_be_started_is_said(start: Launcher) -> None:
    launcher = start("--processes", "2", "--", "no-such-program-here")
    _, err = launcher.communicate(timeout=30)
    assert launcher.returncode == 127
    assert "'no-such-program-here' is not a program on the PATH" in err


def test_a_port_in_use_is_refused_before_anything_starts(start: Launcher, gloo: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        launcher = start("--port", str(port), "--processes", "2", "--", str(gloo), "clean")
        _, err = launcher.communicate(timeout=30)
    assert launcher.returncode == 2
    assert f"port {port} of 127.0.0.1 cannot be used for the ranks to meet" in err
    assert "  -> leave the port out" in err


def test_a_terminal_stays_a_terminal_for_the_speaking_rank(tmp_path: Path) -> None:
    """Under a pseudo terminal rank 0 sees one of the same width, and rank 1 a pipe."""
    import fcntl
    import pty
    import struct
    import termios

    script = tmp_path / "look.py"
    script.write_text(
        "import os, sys\n"
        "width = os.get_terminal_size(1).columns if sys.stdout.isatty() else 0\n"
        "print('sees', sys.stdout.isatty(), sys.stderr.isatty(), width)\n"
    )
    ours, theirs = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 123, 0, 0))
    command = [sys.executable, "-m", "trainwright", "launch", "--logs", str(tmp_path / "logs"), "--processes", "2"]
    launcher = subprocess.Popen([*command, "--", str(script)], stdout=theirs, stderr=theirs, stdin=subprocess.DEVNULL)
    os.close(theirs)
    assert launcher.wait(timeout=30) == 0
    assert os.read(ours, 4096).decode() == "sees True True 123\r\n"
    os.close(ours)
    assert log(tmp_path, 1) == "sees False False 0\n"


def train(recipe: dict[str, Any], folder: Path, *options: str) -> subprocess.Popen[str]:
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    return subprocess.Popen(
        [sys.executable, "-m", "trainwright", "train", str(path), "launch.processes=2", *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_train_starts_its_own_ranks_and_tells_one_error(tiny: Callable[..., Any], tmp_path: Path) -> None:
    recipe = tiny(tmp_path / "runs")
    recipe["data"]["source"] = str(tmp_path / "absent")
    launcher = train(recipe, tmp_path)
    _, err = launcher.communicate(timeout=90)
    assert launcher.returncode == 3, err
    assert err.count("error: ") == 1
    assert "rank 0 of 2 failed first: exit code 3 (DataError); its error stands above" in err
    [folder] = (tmp_path / "runs" / ".launch").iterdir()
    assert (folder / "rank-1.log").read_text(encoding="utf-8").startswith("error: ")


@pytest.mark.slow
def test_sigterm_to_the_launcher_saves_and_the_run_goes_on(tiny: Callable[..., Any], tmp_path: Path) -> None:
    recipe = tiny(tmp_path / "runs")
    recipe["train"] |= {"steps": 400, "eval_every": "400 steps"}
    recipe["checkpoint"] = {"every": "300 steps"}
    launcher = train(recipe, tmp_path)
    metrics = tmp_path / "runs" / "tiny" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not metrics.exists() or metrics.read_text().count('"step"') < 5):
        time.sleep(0.1)
    launcher.terminate()
    _, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 75, err
    assert list((tmp_path / "runs" / "tiny" / "checkpoints").glob("step-*"))
    again = train(recipe, tmp_path, "train.steps=400", "--resume", "auto")
    _, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert json.loads((tmp_path / "runs" / "tiny" / "run.json").read_text())["status"] == "finished"
    assert (
        len(list((tmp_path / "runs" / ".launch").iterdir())) == 1
    )  # that of the interrupted run; the clean one is gone
