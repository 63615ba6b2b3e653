"""What are the number of steps m and of drawn timesteps k worth, and does what was learnt in m steps serve in m'?

    python experiments/steps.py         30 minutes

Claims: where each completion draws its own timesteps, a small k saves nothing: at equal numbers of evaluations the full
sum, k = m, ends highest, as the rollout's m passes are paid anyway. Few steps are the better teacher: trained at m = 2,
a model answers better in eight steps than one trained at eight. Negative: under low-confidence unmasking the exact
gradient, of all that was drawn, learns worse than the biased one of the kept tokens. Countdown, uniform draws; greedy
decoding is by low confidence for all.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: the project's root
from experiments.report import POLICIES, plus_minus, print_table
from experiments.runner import Variant, compare, main

DECODED = (1, 2, 4, 8)  # m'
BUDGETS, WORTH = {}, []
for n, m in ((8, 2), (8, 4), (8, 8), (16, 4)):
    name = f"n = {n}, m = {m}"
    family = {k: Variant(f"{name}, k = {k}", m, k, n=n if n > 8 else 0) for k in (2, 1, 4, 8) if k <= m}
    BUDGETS[name] = list(family.values())
    WORTH.append((f"{name}: k = 2 ends above k = 1", family[2], family[1]))
    if m > 2:
        WORTH.append((f"{name}: k = {max(family)} ends above k = 2", family[max(family)], family[2]))
TRAINED = [Variant(f"trained at m = {m}", m, min(m, 2)) for m in DECODED]
EXACT = Variant("m = 4, low confidence", 4, flags="--unmasking low_confidence")
KEPT = Variant("m = 4, low confidence, kept tokens only", 4, flags="--unmasking low_confidence_kept")
CLAIMS = [("low confidence: kept tokens only end above exact", KEPT, EXACT)] + [
    ("in 8 steps: trained at m = 2 ends above m = 8", TRAINED[1], TRAINED[3], policy, 8) for policy in POLICIES
]


def finding(scale):
    compare("steps-k", scale, BUDGETS, WORTH, test_steps=DECODED)
    families = {"trained at m": [Variant("base", 2, trained=False), *TRAINED, EXACT, KEPT]}
    rows = compare("steps", scale, families, CLAIMS, test_steps=DECODED)
    for policy in POLICIES:
        cells = {label: [plus_minus(x[policy]) for x in row["decoded"].values()] for label, row in rows.items()}
        print_table([f"m' = {m}" for m in DECODED], cells, f"% right, {policy}, decoded in m' steps")


if __name__ == "__main__":
    main(finding, __doc__)
