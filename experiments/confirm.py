"""Do ten new seeds say what the five of curves.py suggest?

    python experiments/confirm.py       14 minutes

Claim: at equal numbers of evaluations ours ends above the official draws; biased diffu-GRPO ends above ours when it is
sampled, and has a right answer among 16 for fewer questions.
"""

import sys
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


def finding(scale):
    seeds = range(scale.seeds, 3 * scale.seeds)
    compare("confirm", scale, {"new seeds": [OFFICIAL, OURS_2, OURS_1, DIFFU]}, CLAIMS, seeds=seeds)


if __name__ == "__main__":
    main(finding, __doc__)
