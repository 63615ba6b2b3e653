"""What does a common unmasking order per question cost and buy?

    python experiments/sharing.py       20 minutes

Found: with the order common to a group, states coincide and the same sequences make several times the updates. At equal
sequences that learns more on Sudoku; at equal updates a little less on Countdown. m = k = 2 and m = 8, k = 2, five
seeds. Every state is run once in any case; a sequence is one distinct state through the model.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: the project's root
from experiments.runner import Variant, compare, main

SIZES = {  # m: task, base model as train.py's, sequences, updates
    2: ("countdown", 1000, 40_000, 200),
    8: ("sudoku", 600, 60_000, 80),
}


def finding(scale):
    for m, (task, base_steps, evaluations, updates) in SIZES.items():
        own = Variant("own order", m, flags="--no-shared-order")
        common = Variant("common order", m, flags="--shared-order")
        for kind, size in (("sequences", {"evaluations": evaluations}), ("updates", {"updates": updates})):
            claims = [(f"{task}: the common order ends higher at equal {kind}", common, own)]
            families = {f"{task}, equal {kind}": [own, common]}
            compare(f"sharing-{task}-{kind}", scale, families, claims, task=task, base_steps=base_steps, **size)


if __name__ == "__main__":
    main(finding, __doc__)
