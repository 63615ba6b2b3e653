"""How fast does entropy go, what does it cost, and what helps?

    python experiments/collapse.py      12 minutes

Claim: a KL term or an entropy bonus keeps more groups with a signal to learn from, and within runs of this length that
wins nothing back. Countdown, m = k = 2, 60,000 evaluations. One update per rollout: the clip never acts.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: the project's root
from experiments.runner import Variant, compare, main

PLAIN = Variant("plain", 2)
REMEDIES = [
    Variant("entropy bonus 0.02", 2, flags="--entropy-bonus 0.02"),
    Variant("entropy bonus 0.05", 2, flags="--entropy-bonus 0.05"),
    Variant("KL, beta 0.05", 2, flags="--beta 0.05"),
    Variant("temperature 1.3 in training", 2, flags="--temperature 1.3"),
]
CLAIMS = [(f"{v.label}: more groups keep a signal", v, PLAIN, "signal") for v in REMEDIES]
CLAIMS += [(f"{v.label}: more answers are right", v, PLAIN) for v in REMEDIES]


def finding(scale):
    compare("collapse", scale, {"entropy collapse": [PLAIN, *REMEDIES]}, CLAIMS, evaluations=60_000)


if __name__ == "__main__":
    main(finding, __doc__)
