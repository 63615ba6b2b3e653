"""Trained at m denoising steps, decoded at m': the whole matrix.

    python experiments/steps.py         6 minutes after budget.py

Claim: few steps are the better teacher: trained at m = 2, a model answers better in eight steps than one trained at
eight. Negative: under low-confidence unmasking the exact gradient, of all that was drawn, learns worse than the biased
one of the kept tokens. Countdown, k = 2; greedy decoding is by low confidence for all.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: the project's root
from experiments.report import POLICIES, plus_minus, print_table
from experiments.runner import Variant, compare, main

DECODED = (1, 2, 4, 8)  # m'
TRAINED = [Variant(f"trained at m = {m}", m, min(m, 2)) for m in DECODED]
EXACT = Variant("m = 4, low confidence", 4, flags="--unmasking low_confidence")
KEPT = Variant("m = 4, low confidence, kept tokens only", 4, flags="--unmasking low_confidence_kept")
FAMILIES = {"trained at m": [Variant("base", 2, trained=False), *TRAINED, EXACT, KEPT]}
CLAIMS = [("low confidence: kept tokens only end above exact", KEPT, EXACT)] + [
    ("in 8 steps: trained at m = 2 ends above m = 8", TRAINED[1], TRAINED[3], policy, 8) for policy in POLICIES
]


def finding(scale):
    rows = compare("steps", scale, FAMILIES, CLAIMS, test_steps=DECODED)
    for policy in POLICIES:
        cells = {label: [plus_minus(x[policy]) for x in row["decoded"].values()] for label, row in rows.items()}
        print_table([f"m' = {m}" for m in DECODED], cells, f"% right, {policy}, decoded in m' steps")


if __name__ == "__main__":
    main(finding, __doc__)
