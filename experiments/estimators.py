"""The estimator laboratory: what do the estimators of the two papers, and two new ones, cost and buy?

    python experiments/estimators.py exact       relative bias and variance by enumeration
    python experiments/estimators.py variance    variance on the real tiny tasks, base and trained
    python experiments/estimators.py curves      learning curves at equal numbers of model evaluations, five seeds
    python experiments/estimators.py confirm     what the curves suggest, on ten new seeds
    python experiments/estimators.py factors     low discrepancy and entropy weights, alone and together; parts of ours
    python experiments/estimators.py budget      what k is worth at each n and m
    python experiments/estimators.py steps       trained at m, decoded at m'
    python experiments/estimators.py collapse    how fast entropy goes, what it costs, what helps
    python experiments/estimators.py sudoku      ours, the official draws and diffu-GRPO on a task of another kind
    python experiments/estimators.py all

Each writes results/estimators-NAME.json and .png. A command is a list of independent runs, shared among processes of
one thread each; a finished run is kept in runs/estimators, under its settings and the code, and not repeated: an
interrupted command goes on where it was, and commands share runs. --quick makes everything tiny: it shows that the code
runs, and nothing else.

Evaluations are sequences through the model: of rollouts, of updates, and of a reference model. The backward pass of an
update is not counted (it makes its evaluation cost about three of the rollout). CPU seconds are those of a whole run,
its validations and tests included.
"""

import argparse
import math
import signal
import statistics
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: the project's root
import runs
from experiments import estimator_runs
from experiments import variance as var
from experiments.estimator_runs import base_of, do_all, learn, make_base, measure_base, measure_exact, measure_variance
from experiments.exact import EXACT, median, print_table

RESULTS = Path(__file__).parent / "results"
T_975 = {2: 12.71, 5: 2.776, 10: 2.262, 24: 2.069}  # Student's t, by number of seeds or batches


@dataclass(frozen=True)
class Scale:
    """How much of everything: the real thing, or --quick."""

    seeds: int = 5
    new_seeds: int = 10  # of `confirm`
    evaluations: int = 120_000  # model evaluations of a learning run: sequences of rollouts and updates
    base_steps: int = 1000
    questions: int = 1000  # test questions at the end of a run
    checks: int = 6  # validations on the way, on half as many questions


# Of two prompts, in one process.
QUICK = Scale(seeds=2, new_seeds=2, evaluations=1, base_steps=5, questions=5, checks=1)


# --------------------------------------------------------------------------------- what is compared


def steps_of(m, k, *flags):
    """Flags of a learning run: k of m timesteps, and more."""
    return ["--prompts-per-step", "16", "--sampling-steps", str(m), "--mc-samples", str(k), *flags]


ENTROPY = ["--importance-sampling", "entropy"]
PAPER = ["--horizon", "last_non_eos", "--normalization", "trajectory"]
OFFICIAL = "official: entropy, batch-stratified, k = 2"
CURVES = {  # name: (flags, replacement); Countdown, m = 6
    OFFICIAL: (steps_of(6, 2, *ENTROPY, "--no-low-discrepancy"), "official"),
    "uniform, k = 1": (steps_of(6, 1), None),
    "uniform, k = 2": (steps_of(6, 2), None),
    "uniform, k = 4": (steps_of(6, 4), None),
    "full sum, k = 6": (steps_of(6, 6), None),
    "uniform, independent draws, k = 2": (steps_of(6, 2, "--no-low-discrepancy"), None),
    "entropy, independent draws, k = 2": (steps_of(6, 2, *ENTROPY, "--no-low-discrepancy"), None),
    "entropy, k = 2": (steps_of(6, 2, *ENTROPY), None),
    "entropy, paper's horizon and mean, k = 2": (steps_of(6, 2, *ENTROPY, *PAPER), None),
    "entropy with step baseline, k = 2": (steps_of(6, 2, *ENTROPY, "--step-baseline", "ramp"), None),
    "AGRPO-SA (ours), k = 2": (steps_of(6, 2, "--algorithm", "agrpo-sa"), None),
    "AGRPO-SA (ours), k = 1": (steps_of(6, 1, "--algorithm", "agrpo-sa"), None),
    "EGSPO, K = 2": (steps_of(6, 2, "--algorithm", "egspo"), None),
    "EGSPO-SA, K = 2": (steps_of(6, 2, "--algorithm", "egspo-sa"), None),
    "EGSPO without KL, K = 2": (steps_of(6, 2, "--algorithm", "egspo", "--beta", "0"), None),
    "EGSPO-SA without KL, K = 2": (steps_of(6, 2, "--algorithm", "egspo-sa", "--beta", "0"), None),
    "diffu-GRPO": (steps_of(6, 2), "diffu-GRPO"),
    "ELBO, 2 samples": (steps_of(6, 2), "ELBO"),
}
CONFIRM = [OFFICIAL, "AGRPO-SA (ours), k = 2", "AGRPO-SA (ours), k = 1", "diffu-GRPO"]
FACTORS = [f"{weights}{draws}, k = 2" for weights in ("uniform", "entropy") for draws in (", independent draws", "")]
PARTS = {  # of ours, at one timestep per completion
    "uniform, k = 1": CURVES["uniform, k = 1"],
    "entropy, k = 1": (steps_of(6, 1, *ENTROPY), None),
    "entropy, shared by the batch, k = 1": (steps_of(6, 1, *ENTROPY, "--allocation", "batch"), None),
    "AGRPO-SA (ours), k = 1": CURVES["AGRPO-SA (ours), k = 1"],
}
BUDGET = {
    f"n = {n}, m = {m}, k = {k}": (steps_of(m, k, *longer), None)
    for n, longer in ((8, []), (16, ["--completion-length", "16"]))
    for m in ((2, 4, 8) if n == 8 else (4,))
    for k in (1, 2, 4, 8)
    if k <= m
}
STEPS = {f"trained at m = {m}": (steps_of(m, min(m, 2)), None) for m in (1, 2, 4, 8)}
CONFIDENT = steps_of(4, 2, "--unmasking", "low_confidence")
STEPS |= {
    "m = 4, low confidence": (CONFIDENT, None),
    "m = 4, low confidence, kept tokens only": (CONFIDENT, "kept tokens"),
}
DECODED = (1, 2, 4, 8)
COLLAPSE = {
    "plain": (steps_of(2, 2), None),
    "entropy bonus 0.02": (steps_of(2, 2, "--entropy-bonus", "0.02"), None),
    "entropy bonus 0.05": (steps_of(2, 2, "--entropy-bonus", "0.05"), None),
    "KL, beta 0.05": (steps_of(2, 2, "--beta", "0.05"), None),
    "temperature 1.3 in training": (steps_of(2, 2, "--temperature", "1.3"), None),
}

SUDOKU = {
    OFFICIAL: (steps_of(8, 2, *ENTROPY, "--no-low-discrepancy"), "official"),
    "AGRPO-SA (ours), k = 2": (steps_of(8, 2, "--algorithm", "agrpo-sa"), None),
    "diffu-GRPO": (steps_of(8, 2), "diffu-GRPO"),
}


def learn_all(variants, scale, description, seeds=None, **more):
    """{name: [result of each seed]} of learning runs, by default on Countdown and of the first seeds."""
    options = {name: value for name, value in asdict(scale).items() if "seeds" not in name} | more
    small = ["--prompts-per-step", "2"] if scale == QUICK else []
    jobs = [
        {"task": "countdown", "flags": [*flags, *small], "seed": seed, "replacement": replacement} | options
        for seed in seeds or range(scale.seeds)
        for flags, replacement in variants.values()
    ]
    do_all(make_base, [base_of(**job) for job in jobs], "base models")
    results = do_all(learn, jobs, description)
    return {name: results[i :: len(variants)] for i, name in enumerate(variants)}


# --------------------------------------------------------------------------------- numbers and pictures


def interval(values):
    """[mean, half the width of its 95% interval] over seeds, by Student's t."""
    values = list(values)
    return [statistics.mean(values), T_975[len(values)] * statistics.stdev(values) / len(values) ** 0.5]


def final(result, policy, steps=None):
    """Accuracy on test questions at the end of a run, decoded in its own or the given number of steps."""
    return result["test"][str(steps or result["sampling_steps"])][policy]


def paired(seeds, reference, policy, steps=None):
    """The interval of the difference in final accuracy to the reference's runs of the same seeds."""
    return interval(final(a, policy, steps) - final(b, policy, steps) for a, b in zip(seeds, reference))


def learning_rows(results, reference):
    """{name: accuracies at the end, their difference to the reference's run of the same seed, and the curve}."""
    rows = {}
    for name, seeds in results.items():
        rows[name] = {
            "sampled": interval(final(result, "sampled") for result in seeds),
            "greedy": interval(final(result, "greedy") for result in seeds),
            "sampled minus reference": paired(seeds, results[reference], "sampled"),
            "greedy minus reference": paired(seeds, results[reference], "greedy"),
            "seeds": {policy: [final(result, policy) for result in seeds] for policy in ("sampled", "greedy")},
            "pass@16": interval(result["diversity"]["pass@16"] for result in seeds),
            "distinct right answers of 16": interval(result["diversity"]["distinct"] for result in seeds),
            "updates": statistics.mean(result["updates"] for result in seeds),
            "cpu_seconds": statistics.mean(result["cpu_seconds"] for result in seeds),
            "curve": [
                {"sampled": interval(p["sampled"] for p in point)}
                | {name: statistics.mean(p[name] for p in point) for name in point[0] if name != "sampled"}
                for point in zip(*(result["curve"] for result in seeds))
            ],
        }
    return rows


def print_rows(rows, reference):
    print(f"\n{'':<44}{'sampled':>16}{'greedy':>16}{'sampled - reference':>22}{'updates':>9}")
    for name, row in rows.items():
        cells = [f"{100 * mean:.1f} +- {100 * half:.1f}" for mean, half in (row["sampled"], row["greedy"])]
        difference = (
            "reference"
            if name == reference
            else "{:+.1f} +- {:.1f}".format(*(100 * x for x in row["sampled minus reference"]))
        )
        print(f"{name:<44}{cells[0]:>16}{cells[1]:>16}{difference:>22}{row['updates']:>9.0f}")


def finish(name, value, draw, size, panels):
    """Write estimators-NAME.json and .png; draw(axes) fills the panels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    runs.write_json(
        RESULTS / f"estimators-{name}.json", {"command": f"python experiments/estimators.py {name}"} | value
    )
    figure, axes = plt.subplots(*panels, figsize=size, squeeze=False)
    draw(axes.flatten())
    figure.tight_layout()
    unfinished = RESULTS / f"estimators-{name}.tmp.png"
    figure.savefig(unfinished, dpi=110)
    unfinished.replace(RESULTS / f"estimators-{name}.png")
    plt.close(figure)
    print(f"\n{RESULTS / f'estimators-{name}.json'} and .png")


def draw_curve(axis, row, label, **style):
    x = [point["evaluations"] / 1000 for point in row["curve"]]
    mean, half = zip(*(point["sampled"] for point in row["curve"]))
    line = axis.plot(x, [100 * y for y in mean], label=label, **style)[0]
    low, high = ([100 * (y + sign * h) for y, h in zip(mean, half)] for sign in (-1, 1))
    axis.fill_between(x, low, high, color=line.get_color(), alpha=0.12, lw=0)


def draw_both(rows, axes):
    """Accuracy at the end with its 95% interval, a line per estimator; sampled and greedy."""
    y = range(len(rows))
    for axis, policy in zip(axes, ("sampled", "greedy")):
        mean, half = zip(*(row[policy] for row in rows.values()))
        axis.errorbar([100 * x for x in mean], y, xerr=[100 * x for x in half], fmt="o", capsize=3)
        axis.set(yticks=list(y), xlabel=f"% right, {policy}, 95% interval over seeds")
        axis.set_yticklabels(rows)
        axis.invert_yaxis()


# --------------------------------------------------------------------------------- the commands


def exact(scale):
    """Relative bias, cosine and variance of every estimator and option by enumeration, on diffuse and sharp models."""
    models = {"diffuse": 1.0} if scale == QUICK else {"diffuse": 1.0, "sharp": 4.0}
    seeds = 1 if scale == QUICK else scale.seeds
    jobs = [{"seed": seed, "sharpness": s} for seed in range(seeds) for s in models.values()]
    results = do_all(measure_exact, jobs, "enumeration")
    tables = {}
    for i, (kind, sharpness) in enumerate(models.items()):
        measured = [result["rows"] for result in results[i :: len(models)]]
        tables[kind] = {
            name: {key: median([rows[name][key] for rows in measured]) for key in row}
            for name, row in measured[0].items()
        }
        print(f"\n{kind} models (logits x {sharpness:g}), medians over {seeds} of them")
        print_table(tables[kind])

    def draw(axes):
        for axis, (kind, rows) in zip(axes, tables.items()):
            y = range(len(rows))
            axis.scatter(
                [max(row["beyond_scale"], 1e-16) for row in rows.values()],
                y,
                c=["C0" if name in EXACT else "C3" for name in rows],
            )
            axis.set(xscale="log", title=f"{kind} models", xlabel="relative bias beyond scale")
            axis.set_yticks(y, rows if kind == "diffuse" else [""] * len(rows), fontsize=7)
            axis.invert_yaxis()
            axis.grid(alpha=0.3)

    finish("exact", {"seeds": seeds, "tables": tables}, draw, (11, 8), (1, 2))


def variance_summary(measured):
    """Variance over the squared gradient: of the full sum and in all, for each baseline, k and sampler; and ours
    over the official scheme, with the 95% interval of a jackknife over batches."""
    products = {name: torch.tensor(rows, dtype=torch.float64) for name, rows in measured["full"].items()}
    batches = len(products[var.RAMP])

    def full(name, keep):
        M = products[name][keep][:, keep]
        own, cross = M.diagonal().mean(), (M.sum() - M.diagonal().sum()) / (len(M) * (len(M) - 1))
        return (own - cross).item(), cross.item()  # variance of a batch, squared gradient

    def ratio(k, keep):
        added = measured["draws"]
        ours = full(var.RAMP, keep)[0] + torch.tensor(added[var.RAMP][k][var.BATCH])[keep].mean().item()
        theirs = (
            full(var.GROUP_MEAN, keep)[0] + torch.tensor(added[var.GROUP_MEAN][k][var.OFFICIAL])[keep].mean().item()
        )
        return ours / theirs if theirs else math.nan

    everything = torch.arange(batches)
    square = full(var.RAMP, everything)[1] or math.nan  # 0 where no reward differed (--quick)
    rows = {}
    for baseline, by_k in measured["draws"].items():
        v = full(baseline, everything)[0] / square
        rows[baseline] = {"full sum": v}
        for k, samplers in by_k.items():
            rows[baseline][f"k = {k}"] = {name: v + statistics.mean(x) / square for name, x in samplers.items()}
    ratios = {}
    for k in measured["draws"][var.RAMP]:
        left_out = [ratio(k, everything[everything != i]) for i in range(batches)]
        error = ((batches - 1) / batches * sum((x - statistics.mean(left_out)) ** 2 for x in left_out)) ** 0.5
        ratios[f"k = {k}"] = [ratio(k, everything), T_975[batches] * error]
    kept = {name: measured[name] for name in ("evaluations", "coefficients", "largest_weight", "completions")}
    return {"variance / squared gradient": rows, "ours / official": ratios} | kept


def variance(scale):
    """Variance of every sampler and baseline on a fixed set of completions of the real tasks, base and trained."""
    quick = scale == QUICK
    cases = {
        "Countdown, m = 6, base": ("countdown", 6, 0),
        "Countdown, m = 6, trained": ("countdown", 6, 150),
        "Sudoku, m = 8, base": ("sudoku", 8, 0),
        "Sudoku, m = 8, trained": ("sudoku", 8, 80),
        "Countdown, m = 2, base": ("countdown", 2, 0),
    }
    if quick:
        cases = {"Countdown, m = 6, trained": cases["Countdown, m = 6, trained"]}
    size = {"batches": 2, "prompts": 2} if quick else {"batches": 24, "prompts": 32}
    of_task = {"countdown": 10, "sudoku": 10} if quick else {"countdown": 3000, "sudoku": 600}  # as train.py has them
    jobs = [
        {"task": task, "m": m, "updates": min(updates, 1) if quick else updates, "base_steps": of_task[task]} | size
        for task, m, updates in cases.values()
    ]
    do_all(make_base, [base_of(job["task"], 0, job["base_steps"], []) for job in jobs], "base models")
    results = dict(zip(cases, map(variance_summary, do_all(measure_variance, jobs, "variance"))))
    for name, result in results.items():
        rows = result["variance / squared gradient"]
        print(f"\n{name}: variance / squared gradient{'':<8}{var.GROUP_MEAN:>18}{var.RAMP:>20}")
        print(f"  {'full sum':<50}{rows[var.GROUP_MEAN]['full sum']:>18.2f}{rows[var.RAMP]['full sum']:>20.2f}")
        for k in result["ours / official"]:
            for sampler in rows[var.RAMP][k]:
                cells = [rows[baseline][k][sampler] for baseline in (var.GROUP_MEAN, var.RAMP)]
                print(f"  {k}, {sampler:<43}{cells[0]:>18.2f}{cells[1]:>20.2f}")
        print("  ours / official:", {k: f"{a:.2f} +- {b:.2f}" for k, (a, b) in result["ours / official"].items()})
    finish("variance", {"settings": results}, partial(draw_variance, results), (13, 6), (2, 3))


def draw_variance(cases, axes):
    """Stacked: what the full sum has, and what drawing k = 2 (m = 2: k = 1) timesteps adds."""
    axes[-1].set_axis_off()
    for axis, (name, result) in zip(axes, cases.items()):
        rows = result["variance / squared gradient"]
        k = "k = 2" if "k = 2" in rows[var.RAMP] else "k = 1"
        shown = [
            ("official", var.GROUP_MEAN, var.OFFICIAL),
            ("uniform", var.GROUP_MEAN, "uniform, low discrepancy"),
            ("entropy, low discr.", var.GROUP_MEAN, var.ENTROPY),
            ("entropy 30% uniform", var.GROUP_MEAN, "entropy, 30% uniform, low discrepancy"),
            ("root of entropy", var.GROUP_MEAN, "square root of entropy, low discrepancy"),
            ("allocation batch", var.GROUP_MEAN, var.BATCH),
            ("AGRPO-SA (ours)", var.RAMP, var.BATCH),
        ]
        for i, (_, baseline, sampler) in enumerate(shown):
            full = rows[baseline]["full sum"]
            axis.barh(i, full, color="C0", label="full sum" if i == 0 else None)
            added = rows[baseline][k][sampler] - full
            axis.barh(i, added, left=full, color="C1", label="added by drawing timesteps" if i == 0 else None)
        axis.set_yticks(range(len(shown)), [label for label, *_ in shown], fontsize=8)
        axis.invert_yaxis()
        axis.set(title=f"{name}, {k}", xlabel="variance / squared gradient")
    axes[-1].legend(*axes[0].get_legend_handles_labels(), loc="center")


def curves(scale):
    """Learning curves at equal numbers of model evaluations."""
    results = learn_all(CURVES, scale, "learning curves")
    rows = learning_rows(results, OFFICIAL)
    print_rows(rows, OFFICIAL)
    groups = {
        "timesteps per completion": [name for name in rows if name.startswith(("uniform, k", "full sum"))],
        "how they are drawn": FACTORS,
        "ours": [name for name in rows if "ours" in name or "step baseline" in name],
        "biased": [name for name in rows if name.startswith(("EGSPO", "diffu", "ELBO")) or "horizon" in name],
    }

    def draw(axes):
        for axis, (title, names) in zip(axes, groups.items()):
            for name in [OFFICIAL, *names]:
                draw_curve(axis, rows[name], name, **({"color": "0.4", "ls": "--"} if name == OFFICIAL else {}))
            axis.set(title=title, xlabel="model evaluations, thousands", ylabel="% right, sampled, validation")
            axis.set_ylim(0, 72)  # room for the names
            axis.legend(fontsize=7, loc="upper left")

    finish("curves", {"scale": asdict(scale), "reference": OFFICIAL, "rows": rows}, draw, (11, 8), (2, 2))


def confirm(scale):
    """What the curves suggest, on seeds that did not suggest it."""
    seeds = range(scale.seeds, scale.seeds + scale.new_seeds)
    results = learn_all({name: CURVES[name] for name in CONFIRM}, scale, "new seeds", seeds)
    rows = learning_rows(results, OFFICIAL)
    print_rows(rows, OFFICIAL)
    ours, diffu = (results[name] for name in ("AGRPO-SA (ours), k = 2", "diffu-GRPO"))
    difference = {policy: paired(ours, diffu, policy) for policy in ("sampled", "greedy")}
    print("ours, k = 2, minus diffu-GRPO:", difference)
    value = {"scale": asdict(scale), "reference": OFFICIAL, "rows": rows, "ours, k = 2, minus diffu-GRPO": difference}
    finish("confirm", value, partial(draw_both, rows), (12, 3.4), (1, 2))


def factors(scale):
    """Low discrepancy and entropy weights, alone and together: the control the papers lack; and the parts of ours."""
    results = learn_all({name: CURVES[name] for name in FACTORS} | PARTS, scale, "factors")
    rows = {}
    for k, reference in ((2, FACTORS[0]), (1, "entropy, k = 1")):
        of_k = {name: seeds for name, seeds in results.items() if name.endswith(f"k = {k}")}
        rows |= learning_rows(of_k, reference)
    print_rows(rows, "")
    finish("factors", {"scale": asdict(scale), "rows": rows}, partial(draw_both, rows), (12, 3.4), (1, 2))


def budget(scale):
    """What k is worth at each n and m, for a fixed number of evaluations."""
    results, rows = learn_all(BUDGET, scale, "n, m and k", test_steps=DECODED), {}
    families = {name.rpartition(",")[0]: None for name in BUDGET}  # n and m, in order
    for family in families:  # compared with their own k = 2
        members = {name: seeds for name, seeds in results.items() if name.startswith(f"{family}, k")}
        rows |= learning_rows(members, f"{family}, k = 2")
    print_rows(rows, "")

    def draw(axes):
        for axis, policy in zip(axes, ("sampled", "greedy")):
            for family in families:
                ks = [k for k in (1, 2, 4, 8) if f"{family}, k = {k}" in rows]
                mean, half = zip(*(rows[f"{family}, k = {k}"][policy] for k in ks))
                percent = [[100 * x for x in column] for column in (mean, half)]
                axis.errorbar(ks, percent[0], yerr=percent[1], marker="o", capsize=3, label=family)
            axis.set(
                xlabel="k, timesteps per completion",
                ylabel=f"% right, {policy}, in m steps",
                xscale="log",
                xticks=(1, 2, 4, 8),
            )
            axis.set_xticklabels((1, 2, 4, 8))
            axis.minorticks_off()
            axis.legend()

    finish("budget", {"scale": asdict(scale), "rows": rows}, draw, (10, 4), (1, 2))


def steps(scale):
    """Trained at m, decoded at m': the whole matrix, base and trained; and trained as served, by low confidence."""
    results = learn_all(STEPS, scale, "trained at m", test_steps=DECODED)
    size = {"base_steps": scale.base_steps, "questions": scale.questions, "test_steps": DECODED}
    jobs = [{"seed": seed} | size for seed in range(scale.seeds)]
    results = {"base": do_all(measure_base, jobs, "base")} | results
    rows = {
        name: {
            policy: {m: interval(final(result, policy, m) for result in seeds) for m in DECODED}
            for policy in ("sampled", "greedy")
        }
        for name, seeds in results.items()
    }
    exact, kept = (results[name] for name in list(STEPS)[-2:])
    difference = {policy: paired(exact, kept, policy, 4) for policy in ("sampled", "greedy")}
    for name, row in rows.items():
        for policy, cells in row.items():
            print(f"{name:<44}{policy:<9}" + "".join(f"{100 * a:8.1f} +-{100 * b:4.1f}" for a, b in cells.values()))
    print("low confidence at m' = 4, exact minus kept tokens only:", difference)

    def draw(axes):
        for axis, policy in zip(axes, ("sampled", "greedy")):
            table = [[100 * cell[0] for cell in row[policy].values()] for row in rows.values()]
            axis.imshow(table, cmap="Blues", vmin=0, vmax=100, aspect="auto")
            for i, line in enumerate(table):
                for j, value in enumerate(line):
                    axis.text(j, i, f"{value:.0f}", ha="center", va="center", color="w" if value > 60 else "k")
            axis.set(title=f"% right, {policy}", xlabel="decoded in m' steps", xticks=range(len(DECODED)))
            axis.set_xticklabels(DECODED)
            axis.set_yticks(range(len(rows)), rows if policy == "sampled" else [""] * len(rows))

    value = {"scale": asdict(scale), "rows": rows, "low confidence, exact minus kept tokens": difference}
    finish("steps", value, draw, (10, 3.6), (1, 2))


def collapse(scale):
    """How fast entropy goes, what it costs, what helps. One update per rollout: the clip, high or low, never acts."""
    scale = scale if scale == QUICK else replace(scale, evaluations=180_000)  # it takes time to show
    rows = learning_rows(learn_all(COLLAPSE, scale, "entropy collapse"), "plain")
    print_rows(rows, "plain")

    def draw(axes):
        for name, row in rows.items():
            after = row["curve"][1:]
            x = [point["evaluations"] / 1000 for point in after]
            axes[0].plot(x, [point["entropy"] for point in after], "o-", ms=3, label=name)
            axes[1].plot(x, [point["signal"] for point in after], "o-", ms=3, label=name)
            draw_curve(axes[2], row, name)
        for axis, label in zip(axes, ("entropy, nats per token", "groups with signal", "% right, sampled, validation")):
            axis.set(xlabel="model evaluations, thousands", ylabel=label)
        axes[0].set_yscale("log")
        axes[0].legend(fontsize=7)

    finish("collapse", {"scale": asdict(scale), "rows": rows}, draw, (13, 3.8), (1, 3))


def sudoku(scale):
    """A task of another kind: rewards for parts of an answer, and later steps that can use what earlier ones wrote."""
    scale = scale if scale == QUICK else replace(scale, evaluations=60_000, base_steps=600)  # train.py's base model
    rows = learning_rows(learn_all(SUDOKU, scale, "Sudoku", task="sudoku"), OFFICIAL)
    print_rows(rows, OFFICIAL)

    def draw(axes):
        for name, row in rows.items():
            draw_curve(axes[0], row, name)
        axes[0].set(xlabel="model evaluations, thousands", ylabel="% right, sampled, validation")
        axes[0].legend()

    finish("sudoku", {"scale": asdict(scale), "reference": OFFICIAL, "rows": rows}, draw, (6, 4), (1, 1))


COMMANDS = (exact, variance, curves, confirm, factors, budget, steps, collapse, sudoku)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=[command.__name__ for command in COMMANDS] + ["all"])
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that the code runs")
    parser.add_argument("--out", type=Path, help="folder of runs and results instead of runs/estimators and results")
    chosen = parser.parse_args(argv)
    global RESULTS
    if chosen.quick and not chosen.out:
        parser.error("--quick needs --out: its numbers mean nothing and must not replace results")
    if chosen.out:
        estimator_runs.FOLDER, RESULTS = chosen.out / "runs", chosen.out
    if chosen.quick:
        estimator_runs.WORKERS = 0
    RESULTS.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for command in COMMANDS:
        if chosen.command in (command.__name__, "all"):
            command(QUICK if chosen.quick else Scale())


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: the same command goes on from here")
