"""Where does the exact gradient matter? On answers that must be written step by step.

    python experiments/tracking.py --length 8       half an hour on two cores; also 4, 12 and 16

State tracking, one token a step, left to right: what a step writes is what the next one needs, so a likelihood of one
pass, blind to the earlier steps, credits them wrongly. Ten seeds and all estimators at 8 letters, five seeds and the
main ones at the other lengths; at equal numbers of sequences, and at equal updates.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: the project's root
from experiments import curves, report
from experiments.report import EQUAL, POLICIES
from experiments.runner import Variant, compare, main

EVALUATIONS = {8: 40_000, 4: 20_000, 12: 60_000, 16: 80_000}  # by number of letters
EVERY_STEP = Variant("full sum, every step")
MAIN = [curves.DIFFU, curves.OURS_2, curves.OFFICIAL, curves.UNIFORM[1], EVERY_STEP]
OTHERS = [curves.OURS_1, curves.UNIFORM[0], curves.WITHOUT_KL, curves.BIASED[-1]]
CLAIMS = [
    ("ours ends above diffu-GRPO", curves.OURS_2, curves.DIFFU),
    ("uniform draws end above diffu-GRPO", curves.UNIFORM[1], curves.DIFFU),
    ("ours ends above the official draws", curves.OURS_2, curves.OFFICIAL),
    ("uniform draws, k = 2, end above the full sum", curves.UNIFORM[1], EVERY_STEP),
    ("ours, k = 2, ends above the full sum", curves.OURS_2, EVERY_STEP),
]


def finding(scale, length):
    def sized(variant):
        return replace(variant, m=length, k=length if variant == EVERY_STEP else variant.k)

    estimators = [sized(v) for v in (MAIN + OTHERS if length == 8 else MAIN)]
    claims = [(text, sized(a), sized(b), measure) for text, a, b in CLAIMS for measure in (*POLICIES, EQUAL)]
    seeds = range(2 * scale.seeds if length == 8 else scale.seeds)
    sizes = {"evaluations": EVALUATIONS[length], "base_steps": 1200 if length < 12 else 1600, "checks": 10}
    task, base = "tracking" if length == 8 else f"tracking-{length}", Variant("base", length, trained=False)
    families = {f"{length} letters": [*estimators, base]}
    compare(f"tracking-{length}", scale, families, claims, seeds=seeds, task=task, **sizes)
    report.finish("tracking", {"lengths": (found := told())}, lambda axes: draw(found, axes), (11, 4), (1, 2))


def told():
    """{length: rows} of the lengths that were measured."""
    files = {n: report.RESULTS / f"estimators-tracking-{n}.json" for n in sorted(EVALUATIONS)}
    return {n: json.loads(file.read_text())["rows"] for n, file in files.items() if file.exists()}


def draw(found, axes):
    """Accuracy at the end over the number of letters, and the curves at 8 letters, or the first, over updates."""
    lengths, rows = list(found), found.get(8) or next(iter(found.values()))
    for variant in (*MAIN, Variant("base")):
        mean, half = zip(*([100 * x for x in found[n][variant.label]["sampled"]] for n in lengths))
        axes[0].errorbar(lengths, mean, yerr=half, fmt="o-", capsize=3, label=variant.label)
        points = rows[variant.label]["curve"]
        axes[1].plot([p["updates"] for p in points], [100 * p["sampled"][0] for p in points], "o-", ms=3)
    axes[0].set(
        xticks=lengths, xlabel="letters of a question: steps of its answer", ylabel="% right at the end, sampled, test"
    )
    axes[1].set(xlabel="updates", ylabel="% right, sampled, validation")
    axes[0].legend(fontsize=7)


if __name__ == "__main__":
    main(finding, __doc__, lengths=tuple(EVALUATIONS))
