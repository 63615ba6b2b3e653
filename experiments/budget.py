"""What is k worth at each completion length n and number of steps m?

    python experiments/budget.py        24 minutes

Claim: where each completion draws its own timesteps, a small k saves nothing: at equal numbers of evaluations the full
sum, k = m, ends highest, as the rollout's m passes are paid anyway. Uniform draws on Countdown.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: the project's root
from experiments.runner import Variant, compare, main
from experiments.steps import DECODED

FAMILIES, CLAIMS = {}, []
for n, m in ((8, 2), (8, 4), (8, 8), (16, 4)):
    name = f"n = {n}, m = {m}"
    family = {k: Variant(f"{name}, k = {k}", m, k, n=n if n > 8 else 0) for k in (2, 1, 4, 8) if k <= m}
    FAMILIES[name] = list(family.values())
    CLAIMS.append((f"{name}: k = 2 ends above k = 1", family[2], family[1]))
    if m > 2:
        CLAIMS.append((f"{name}: k = {max(family)} ends above k = 2", family[max(family)], family[2]))


def finding(scale):
    compare("budget", scale, FAMILIES, CLAIMS, test_steps=DECODED)


if __name__ == "__main__":
    main(finding, __doc__)
