"""Measure one configuration of DeepSpeed alone: seconds per step, tokens/s, bytes on the wire, memory.

python benchmarks/distributed/try_deepspeed.py --python PATH/bin/python --stage 2 --side='--compile'
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
from pathlib import Path

from rank_set import RankSet, enter_own_network
from workload import workload_from_arguments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", required=True, help="interpreter that has deepspeed")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--side", default="", help="options of deepspeed_side.py, in one string")
    work, options = workload_from_arguments(parser)
    alone = enter_own_network()
    script = Path(__file__).with_name("deepspeed_side.py")
    command = [options.python, str(script), *work.arguments(), *shlex.split(options.side)]
    ranks = RankSet("deepspeed", command, options.ranks)
    try:
        ranks.start()
        ranks.turn(options.warmup)
        ranks.turn(options.steps)
        ranks.finish()
    finally:
        ranks.stop()
    seconds = statistics.median(ranks.seconds_of_turns[-1])
    report = {
        "stage": work.stage,
        "accumulation": work.accumulation,
        "side": options.side,
        "seconds_per_step": round(seconds, 4),
        "tokens_per_second": round(work.tokens_per_step(options.ranks) / seconds),
        "psi": round(ranks.psi(options.steps, work.parameters()), 3),
        "peak_MiB": ranks.peak >> 20,
        "others_kept_busy": round(ranks.disturbances[-1], 3),
        "own_network": alone,
        "losses": [round(loss, 5) for loss in ranks.losses],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
