"""What is the clip for?

    python experiments/clip.py          5 minutes

Asked: do several updates per rollout learn more from the same sequences, and does the clip keep them from going astray?
Found: no gain, and without the clip one of five seeds collapses at four updates. With one update the ratio is 1 and the
clip never acts. Countdown, m = k = 2, five seeds, 40,000 sequences.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: the project's root
from experiments.runner import Variant, compare, main

OFF = "--epsilon-low 1 --epsilon-high 1e9"
ONE = Variant("one update", 2, flags="--shared-order")
CLIPPED, FREE = (
    [Variant(f"{n} updates, {how}", 2, flags=f"--shared-order --updates-per-rollout {n} {flags}") for n in (2, 4)]
    for how, flags in (("clip 0.2", ""), ("no clip", OFF))
)
CLAIMS = [(f"{v.label}: more answers are right than with one", v, ONE) for v in CLIPPED + FREE]
CLAIMS += [(f"{a.label}: more than with none", a, b) for a, b in zip(CLIPPED, FREE)]


def finding(scale):
    compare("clip", scale, {"updates per rollout": [ONE, *CLIPPED, *FREE]}, CLAIMS, evaluations=40_000)


if __name__ == "__main__":
    main(finding, __doc__)
