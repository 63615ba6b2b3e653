"""Which estimator learns fastest at equal numbers of model evaluations, and which of its parts does it?

    python experiments/curves.py        28 minutes on two cores

Twenty estimators on Countdown, m = 6, 16 questions x 8 completions per update, five seeds, each with a base model of
its own; two by two, the control that the papers lack; the parts of ours at one timestep per completion. Exploratory:
confirm.py asks ten other seeds.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: the project's root
from experiments.runner import Variant, compare, main

ENTROPY, INDEPENDENT = "--importance-sampling entropy", "--no-low-discrepancy"
OFFICIAL = Variant("official: entropy, batch-stratified, k = 2", flags=ENTROPY, draw="official")
UNIFORM = [Variant(f"uniform, k = {k}", k=k) for k in (1, 2, 4)]
INDEPENDENTLY = Variant("uniform, independent draws, k = 2", flags=INDEPENDENT)
BY_ENTROPY = [
    Variant("entropy, k = 2", flags=ENTROPY),
    Variant("entropy, independent draws, k = 2", flags=f"{ENTROPY} {INDEPENDENT}"),
]
STEP_BASELINE = Variant("entropy with step baseline, k = 2", flags=ENTROPY, draw="step_baseline")
OURS_1, OURS_2 = (Variant(f"AGRPO-SA (ours), k = {k}", k=k, flags="--algorithm agrpo-sa") for k in (1, 2))
EGSPO = Variant("EGSPO, K = 2", flags="--algorithm egspo")
WITHOUT_KL = Variant("EGSPO without KL, K = 2", flags="--algorithm egspo --beta 0")
DIFFU = Variant("diffu-GRPO", contrast="diffu_grpo")
BIASED = [
    Variant("entropy, paper's horizon and mean, k = 2", flags=ENTROPY, draw="papers_horizon"),
    EGSPO,
    Variant("EGSPO-SA, K = 2", flags="--algorithm egspo-sa"),
    WITHOUT_KL,
    Variant("EGSPO-SA without KL, K = 2", flags="--algorithm egspo-sa --beta 0"),
    DIFFU,
    Variant("ELBO, 2 samples", contrast="elbo"),
]
ONE = Variant("entropy, k = 1", k=1, flags=ENTROPY)
SHARED = Variant("entropy, shared by the batch, k = 1", k=1, draw="shared")
FAMILIES = {
    "timesteps per completion": [OFFICIAL, *UNIFORM, Variant("full sum, k = 6", k=6)],
    "two by two": [INDEPENDENTLY, UNIFORM[1], *BY_ENTROPY],
    "ours": [OFFICIAL, STEP_BASELINE, OURS_2],
    "the parts of ours": [ONE, UNIFORM[0], SHARED, OURS_1],
    "biased": [OFFICIAL, *BIASED],
}
CLAIMS = [
    ("ours, k = 2, ends above the official draws", OURS_2, OFFICIAL),
    ("biased diffu-GRPO ends above ours", DIFFU, OURS_2),
    ("EGSPO ends higher without its KL", WITHOUT_KL, EGSPO),
    ("entropy weights help, low discrepancy", BY_ENTROPY[0], UNIFORM[1]),
    ("entropy weights help, independent draws", BY_ENTROPY[1], INDEPENDENTLY),
    ("low discrepancy helps, uniform", UNIFORM[1], INDEPENDENTLY),
    ("low discrepancy helps, entropy", *BY_ENTROPY),
    ("k = 1: sharing the draws helps", SHARED, ONE),
    ("k = 1: the step baseline helps on top", OURS_1, SHARED),
]


def finding(scale):
    compare("curves", scale, FAMILIES, CLAIMS)


if __name__ == "__main__":
    main(finding, __doc__)
