"""Does it hold on a task of another kind?

    python experiments/sudoku.py        9 minutes

Claim: ours ends above the official draws, and is level with biased diffu-GRPO. Sudoku rewards parts of an answer, and
later steps can use what earlier ones wrote: m = 8, k = 2, 60,000 evaluations, five seeds.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: the project's root
from experiments.curves import DIFFU, OFFICIAL, OURS_2
from experiments.runner import compare, main

OFFICIAL, OURS, DIFFU = (replace(variant, m=8) for variant in (OFFICIAL, OURS_2, DIFFU))
CLAIMS = [("ours ends above the official draws", OURS, OFFICIAL), ("diffu-GRPO ends above ours", DIFFU, OURS)]


def finding(scale):
    sizes = {"evaluations": 60_000, "base_steps": 600}  # train.py's base model
    compare("sudoku", scale, {"Sudoku": [OFFICIAL, OURS, DIFFU]}, CLAIMS, task="sudoku", **sizes)


if __name__ == "__main__":
    main(finding, __doc__)
