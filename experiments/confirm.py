"""Do ten new seeds say what the five of curves.py suggest, and does a task of another kind?

    python experiments/confirm.py       14 minutes

Sudoku, five seeds, rewards parts of an answer, and later steps can use what earlier ones wrote (m = 8).
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: the project's root
from experiments.curves import DIFFU, OFFICIAL, OURS_1, OURS_2
from experiments.runner import compare, main

CLAIMS = [
    ("ours, k = 2, ends above the official draws", OURS_2, OFFICIAL),
    ("ours, k = 1, ends above the official draws, k = 2", OURS_1, OFFICIAL),
    ("diffu-GRPO ends above ours, k = 2", DIFFU, OURS_2),
    ("ours, k = 2, has a right answer among 16 more often than diffu-GRPO", OURS_2, DIFFU, "pass@16"),
]
ON_SUDOKU = [replace(variant, m=8) for variant in (OFFICIAL, OURS_2, DIFFU)]
CLAIMS_ON_SUDOKU = [
    ("ours ends above the official draws", ON_SUDOKU[1], ON_SUDOKU[0]),
    ("diffu-GRPO ends above ours", ON_SUDOKU[2], ON_SUDOKU[1]),
]


def finding(scale):
    seeds = range(scale.seeds, 3 * scale.seeds)
    compare("confirm", scale, {"new seeds": [OFFICIAL, OURS_2, OURS_1, DIFFU]}, CLAIMS, seeds=seeds)
    base = {"task": "sudoku", "base_steps": 600}  # train.py's base model
    compare("confirm-sudoku", scale, {"Sudoku": ON_SUDOKU}, CLAIMS_ON_SUDOKU, **base)


if __name__ == "__main__":
    main(finding, __doc__)
