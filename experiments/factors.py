"""Two by two, the control that the papers lack: low discrepancy and entropy weights; and the parts of ours.

    python experiments/factors.py       3 minutes after curves.py

Claim: entropy weights help, and low discrepancy is too little to be seen in a learning curve. At one timestep per
completion, sharing the draws in the batch helps, and the step baseline on top is not settled.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: the project's root
from experiments.curves import BY_ENTROPY, ENTROPY, INDEPENDENTLY, OURS_1, UNIFORM
from experiments.runner import Variant, compare, main

ONE = Variant("entropy, k = 1", k=1, flags=ENTROPY)
SHARED = Variant("entropy, shared by the batch, k = 1", k=1, draw="shared")
FAMILIES = {
    "two by two": [INDEPENDENTLY, UNIFORM[1], *BY_ENTROPY],
    "the parts of ours": [ONE, UNIFORM[0], SHARED, OURS_1],
}
CLAIMS = [
    ("entropy weights help, low discrepancy", BY_ENTROPY[0], UNIFORM[1]),
    ("entropy weights help, independent draws", BY_ENTROPY[1], INDEPENDENTLY),
    ("low discrepancy helps, uniform", UNIFORM[1], INDEPENDENTLY),
    ("low discrepancy helps, entropy", *BY_ENTROPY),
    ("k = 1: sharing the draws helps", SHARED, ONE),
    ("k = 1: the step baseline helps on top", OURS_1, SHARED),
]


def finding(scale):
    compare("factors", scale, FAMILIES, CLAIMS)


if __name__ == "__main__":
    main(finding, __doc__)
