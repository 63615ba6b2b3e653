"""The estimator laboratory: what do the estimators of the two papers, and two new ones, cost and buy?

    python experiments/estimators.py exact       relative bias and variance by enumeration
    python experiments/estimators.py variance    variance on the real tiny tasks, base and trained
    python experiments/estimators.py curves      learning curves at equal numbers of model evaluations, five seeds
    python experiments/estimators.py factors     low discrepancy and entropy weights, alone and together; parts of ours
    python experiments/estimators.py budget      what k is worth at each m
    python experiments/estimators.py steps       trained at m, decoded at m'
    python experiments/estimators.py collapse    how fast entropy goes, what it costs, what helps
    python experiments/estimators.py all

Each writes results/estimators-NAME.json and .png. A command is a list of independent runs, shared among processes of
one thread each; a finished run is kept in runs/estimators under its settings and not repeated, so that an interrupted
command goes on where it was, and commands share runs. After a change to the code, remove that folder. --quick makes
everything tiny: it shows that the code runs, and nothing else.

Evaluations are sequences through the model, of rollouts and of updates; the backward pass of an update is not counted
(it makes an evaluation of the update cost about three of the rollout: the CPU seconds beside the results tell).
"""

import argparse
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: the project's root
import agrpo
import runs
import train
from experiments import contrasts
from experiments import variance as var
from experiments.exact import EXACT, laboratory_rows, median, print_table, replaced

RESULTS = Path(__file__).parent / "results"
FOLDER = RESULTS.parent.parent / "runs" / "estimators"  # of finished runs and base models
WORKERS = os.cpu_count()  # 0: everything in this process
T_975 = {
    2: 12.71,
    3: 4.303,
    4: 3.182,
    5: 2.776,
    6: 2.571,
    7: 2.447,
    8: 2.365,
    9: 2.306,
    10: 2.262,
}  # by number of seeds


# --------------------------------------------------------------------------------- runs, done once and kept


@dataclass(frozen=True)
class Scale:
    """How much of everything: the real thing, or --quick."""

    seeds: int = 5
    evaluations: int = 120_000  # model evaluations of a learning run: sequences of rollouts and updates
    base_steps: int = 1000
    questions: int = 1000  # test questions at the end of a run
    checks: int = 6  # validations on the way, on half as many questions


QUICK = Scale(seeds=2, evaluations=1, base_steps=5, questions=5, checks=1)  # of two prompts, in one process


def do_all(function, jobs, description):
    """[function(**job)] in the order of the jobs: read from FOLDER where a job is done, else in parallel processes."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    paths = [FOLDER / f"{job_name(function, job)}.json" for job in jobs]
    todo = [(function, path, job) for path, job in dict(zip(paths, jobs)).items() if not path.exists()]
    with tqdm(total=len(todo), desc=description) as bar:
        for _ in done_in_parallel(function, todo) if WORKERS else itertools.starmap(do_one, todo):
            bar.update()
    return [json.loads(path.read_text()) for path in paths]


def done_in_parallel(function, todo):
    """Yield as runs are finished."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(WORKERS, spawn, initializer=initialise, initargs=(FOLDER,)) as pool:
        try:
            for future in as_completed([pool.submit(do_one, *one) for one in todo]):
                yield future.result()
        except BaseException:  # an error, or Ctrl-C: what has not begun need not
            pool.shutdown(cancel_futures=True)
            raise


def initialise(folder):
    """A process of the pool: one thread, as the tensors are small; quiet."""
    global FOLDER
    FOLDER = folder
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (for the life of the process)


def do_one(function, path, job):
    started = time.process_time()
    result = function(**job)
    runs.write_json(path, {"job": job, "cpu_seconds": time.process_time() - started} | result)


def job_name(function, job):
    return f"{function.__name__}-{hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:16]}"


# --------------------------------------------------------------------------------- one learning run


def learn(task, flags, seed, evaluations, base_steps, questions, checks, replacement=None, test_steps=()):
    """Policy gradients from the seed's own base model until so many model evaluations are used up.

    An evaluation is one sequence through the model: in the rollout, in the update (forward, with its backward), or
    through the reference. Returns the validations on the way and the accuracies at the end, on test questions.
    """
    run_config, config, env, model, tokenizer = setting(task, seed, base_steps, flags)
    examples, validation, test = (env.load(split) for split in ("train", "validation", "test"))
    rng, generator = train.streams(seed, "reinforce")
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, run_config.adam_beta2), weight_decay=0.0, fused=True)
    reference = train.frozen_copy(model) if config.beta > 0 else None
    # What is measured is the policy at temperature 1, also of those that were trained at another.
    run_config = replace(run_config, eval_steps=test_steps or (config.sampling_steps,))
    measured = replace(train.evaluated(run_config, config, config.sampling_steps), temperature=1.0)
    completions = run_config.prompts_per_step * config.num_generations
    history, curve, used = [], [], 0

    def check():
        sampled = train.grade(model, tokenizer, env, validation[: questions // 2], measured, run_config, "")
        curve.append({"evaluations": used, "updates": len(history), "sampled": train.mean(sampled, "correct")})
        if last := history[-20:]:
            names = ("entropy", "signal", "gradient_norm")
            curve[-1] |= {name: statistics.mean(metrics[name] for metrics in last) for name in names}

    check()
    with ExitStack() as stack:
        for name, value in REPLACEMENTS[replacement].items():
            stack.enter_context(replaced(name, value))
        while used < evaluations:
            share = used / evaluations  # warm-up, constant, to zero over the last fifth: as in train.py
            rate = run_config.learning_rate * min(1, (len(history) + 1) / 10, 5 * (1 - share))
            optimizer.param_groups[0]["lr"] = rate
            prompts = rng.choices(examples, k=run_config.prompts_per_step)
            metrics = train.update(model, prompts, optimizer, run_config, config, env, tokenizer, generator, reference)
            history.append(metrics)
            used += completions * config.sampling_steps + metrics["evaluations"] * (1 + (reference is not None))
            if used >= evaluations * len(curve) / checks or used >= evaluations:
                check()
    return {
        "curve": curve,
        "updates": len(history),
        "sampling_steps": config.sampling_steps,
        "test": train.by_sampling_steps(model, tokenizer, env, run_config, measured, test[:questions]),
        "diversity": diversity(model, tokenizer, env, test[: questions // 5], measured, run_config),
    }


def diversity(model, tokenizer, env, questions, config, run_config, answers=16):
    """Of 16 sampled answers: share of questions with at least one right one, and mean number of distinct right ones."""
    repeated = [example for example in questions for _ in range(answers)]
    records = train.grade(model, tokenizer, env, repeated, config, run_config, "")
    groups = [records[i : i + answers] for i in range(0, len(records), answers)]
    right = [len({r["completion"] for r in group if r["correct"]}) for group in groups]
    return {"pass@16": sum(r > 0 for r in right) / len(right), "distinct": sum(right) / len(right)}


def setting(task, seed, base_steps, flags=()):
    """(run_config, config, task, base model, tokenizer) of a seed."""
    arguments = ["--task", task, "--seed", str(seed), "--base-steps", str(base_steps), *flags]
    run_config, config = train.parse_arguments(arguments)
    env = train.task_of(run_config)
    return run_config, config, env, *train.base_model(run_config, config, env, FOLDER)


def make_base(**job):
    """Only so that no two processes train the same base model."""
    setting(**job)
    return {}


def batch_stratified(rollout, config, generator):
    """The official code's timesteps: one stratified set of uniforms (B, k) for the whole batch, shuffled, so that a
    completion may draw a step twice. Unbiased as well."""

    def shuffled(shape, generator):
        strata = torch.randperm(math.prod(shape), generator=generator).view(shape)
        return (strata + torch.rand(shape, dtype=torch.float64, generator=generator)) / strata.numel()

    with replaced("uniforms", shuffled):
        return sample_timesteps(rollout, replace(config, low_discrepancy=False), generator)


sample_timesteps = agrpo.sample_timesteps  # itself, where agrpo's is replaced by the above


class KeptTokens(agrpo.Rollout):
    """What published code takes for the action under low-confidence unmasking: the tokens that were kept. Biased."""

    def action_at(self, t):
        return self.unmasked_at(t), self.completion_ids, self.logprobs


REPLACEMENTS = {
    None: {},
    "kept tokens": {"Rollout": KeptTokens},
    "official": {"sample_timesteps": batch_stratified},
    "diffu-GRPO": {"accumulate_gradient": contrasts.diffu_grpo},
    "ELBO": {"accumulate_gradient": contrasts.elbo},
}


# --------------------------------------------------------------------------------- what is compared

COUNTDOWN = ["--prompts-per-step", "16", "--sampling-steps"]  # then m
TWO = [*COUNTDOWN, "6", "--mc-samples", "2"]
ENTROPY = ["--importance-sampling", "entropy"]
PAPER = ["--horizon", "last_non_eos", "--normalization", "trajectory"]
OFFICIAL = "official: entropy, batch-stratified, k = 2"
CURVES = {  # name: (flags, replacement); Countdown, m = 6
    OFFICIAL: ([*TWO, *ENTROPY, "--no-low-discrepancy"], "official"),
    "uniform, k = 1": ([*COUNTDOWN, "6", "--mc-samples", "1"], None),
    "uniform, k = 2": (TWO, None),
    "uniform, k = 4": ([*COUNTDOWN, "6", "--mc-samples", "4"], None),
    "full sum, k = 6": ([*COUNTDOWN, "6", "--mc-samples", "6"], None),
    "uniform, independent draws, k = 2": ([*TWO, "--no-low-discrepancy"], None),
    "entropy, independent draws, k = 2": ([*TWO, *ENTROPY, "--no-low-discrepancy"], None),
    "entropy, k = 2": ([*TWO, *ENTROPY], None),
    "entropy, paper's horizon and mean, k = 2": ([*TWO, *ENTROPY, *PAPER], None),
    "entropy with step baseline, k = 2": ([*TWO, *ENTROPY, "--step-baseline", "ramp"], None),
    "AGRPO-SA (ours), k = 2": ([*TWO, "--algorithm", "agrpo-sa"], None),
    "AGRPO-SA (ours), k = 1": ([*COUNTDOWN, "6", "--mc-samples", "1", "--algorithm", "agrpo-sa"], None),
    "EGSPO, K = 2": ([*TWO, "--algorithm", "egspo"], None),
    "EGSPO-SA, K = 2": ([*TWO, "--algorithm", "egspo-sa"], None),
    "EGSPO without KL, K = 2": ([*TWO, "--algorithm", "egspo", "--beta", "0"], None),
    "EGSPO-SA without KL, K = 2": ([*TWO, "--algorithm", "egspo-sa", "--beta", "0"], None),
    "diffu-GRPO": (TWO, "diffu-GRPO"),
    "ELBO, 2 samples": (TWO, "ELBO"),
}
FACTORS = [f"{weights}{draws}, k = 2" for weights in ("uniform", "entropy") for draws in (", independent draws", "")]
ONE = [*COUNTDOWN, "6", "--mc-samples", "1"]
PARTS = {  # of ours, at one timestep per completion
    "uniform, k = 1": CURVES["uniform, k = 1"],
    "entropy, k = 1": ([*ONE, *ENTROPY], None),
    "entropy, shared by the batch, k = 1": ([*ONE, *ENTROPY, "--allocation", "batch"], None),
    "AGRPO-SA (ours), k = 1": CURVES["AGRPO-SA (ours), k = 1"],
}
BUDGET = {
    f"m = {m}, k = {k}": ([*COUNTDOWN, str(m), "--mc-samples", str(k)], None)
    for m in (2, 4, 8)
    for k in (1, 2, 4, 8)
    if k <= m
}
STEPS = {f"trained at m = {m}": ([*COUNTDOWN, str(m), "--mc-samples", str(min(m, 2))], None) for m in (1, 2, 4, 8)}
CONFIDENT = [*COUNTDOWN, "4", "--mc-samples", "2", "--unmasking", "low_confidence"]
STEPS |= {
    "m = 4, low confidence": (CONFIDENT, None),
    "m = 4, low confidence, kept tokens only": (CONFIDENT, "kept tokens"),
}
DECODED = (1, 2, 4, 8)
MAIN = [*COUNTDOWN, "2", "--mc-samples", "2"]  # the main run's
COLLAPSE = {
    "plain": (MAIN, None),
    "entropy bonus 0.02": ([*MAIN, "--entropy-bonus", "0.02"], None),
    "entropy bonus 0.05": ([*MAIN, "--entropy-bonus", "0.05"], None),
    "KL, beta 0.05": ([*MAIN, "--beta", "0.05"], None),
    "temperature 1.3 in training": ([*MAIN, "--temperature", "1.3"], None),
}


def learn_all(variants, scale, description, **more):
    """{name: [result of each seed]} of learning runs on Countdown."""
    options = {name: value for name, value in asdict(scale).items() if name != "seeds"} | more
    small = ["--prompts-per-step", "2"] if scale == QUICK else []
    jobs = [
        {"task": "countdown", "flags": [*flags, *small], "seed": seed, "replacement": replacement} | options
        for seed in range(scale.seeds)  # a seed's base model is made by the first of its runs
        for flags, replacement in variants.values()
    ]
    do_all(make_base, [{k: job[k] for k in ("task", "seed", "base_steps")} for job in jobs], "base models")
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


def learning_rows(results, reference):
    """{name: accuracies at the end, their difference to the reference's run of the same seed, and the curve}."""
    rows = {}
    for name, seeds in results.items():
        pairs = list(zip(seeds, results[reference]))
        rows[name] = {
            "sampled": interval(final(result, "sampled") for result in seeds),
            "greedy": interval(final(result, "greedy") for result in seeds),
            "sampled minus reference": interval(final(a, "sampled") - final(b, "sampled") for a, b in pairs),
            "greedy minus reference": interval(final(a, "greedy") - final(b, "greedy") for a, b in pairs),
            "seeds": {policy: [final(result, policy) for result in seeds] for policy in ("sampled", "greedy")},
            "pass@16": interval(result["diversity"]["pass@16"] for result in seeds),
            "distinct right answers of 16": interval(result["diversity"]["distinct"] for result in seeds),
            "updates": statistics.mean(result["updates"] for result in seeds),
            "cpu_seconds": statistics.mean(result["cpu_seconds"] for result in seeds),
            "curve": [
                {"evaluations": point[0]["evaluations"], "sampled": interval(p["sampled"] for p in point)}
                | {
                    name: statistics.mean(p[name] for p in point)
                    for name in ("entropy", "signal", "gradient_norm")
                    if name in point[0]
                }
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
    """Write estimators-NAME.json and .png; draw(axes, value) fills the panels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    runs.write_json(
        RESULTS / f"estimators-{name}.json", {"command": f"python experiments/estimators.py {name}"} | value
    )
    figure, axes = plt.subplots(*panels, figsize=size, squeeze=False)
    draw(axes.flatten(), value)
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


def draw_bars(axis, rows, policy):
    """Accuracy at the end with its 95% interval, a line per estimator."""
    mean, half = zip(*(row[policy] for row in rows.values()))
    y = range(len(rows))
    axis.errorbar([100 * x for x in mean], y, xerr=[100 * x for x in half], fmt="o", capsize=3)
    axis.set(yticks=list(y), xlabel=f"% right, {policy}, 95% interval over seeds")
    axis.set_yticklabels(rows)
    axis.invert_yaxis()


# --------------------------------------------------------------------------------- the commands


def measure_exact(seed, sharpness):
    return {"rows": laboratory_rows(seed, sharpness)}


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

    def draw(axes, _):
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


def measure_variance(task, m, updates, batches, prompts, base_steps, seed=0):
    """variance.measure on a base model, or after some updates with k = 2 uniform timesteps."""
    flags = ["--sampling-steps", str(m), "--mc-samples", "2", "--step-baseline", "ramp"]  # the rollout keeps r_t
    run_config, config, env, model, tokenizer = setting(task, seed, base_steps, flags)
    examples = env.load("train")
    if updates:
        rng, generator = train.streams(seed, "reinforce")
        optimizer = torch.optim.AdamW(model.parameters(), lr=run_config.learning_rate, weight_decay=0.0, fused=True)
        plain = replace(config, step_baseline="none")
        for _ in range(updates):
            batch = rng.choices(examples, k=16)
            train.update(model, batch, optimizer, run_config, plain, env, tokenizer, generator, None)
    run_config = replace(run_config, prompts_per_step=prompts)
    return var.measure(model, tokenizer, env, examples, run_config, config, batches, seed)


def variance_summary(measured):
    """Variance over the squared gradient: of the full sum and in all, for each baseline, k and sampler; and by how much
    ours is below the official scheme, with the 95% interval of a jackknife over batches."""
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
        ratios[f"k = {k}"] = [ratio(k, everything), 2.07 * error]  # Student's t of 23
    kept = {name: measured[name] for name in ("evaluations", "coefficients", "largest_weight", "completions")}
    return {"variance / squared gradient": rows, "ours / official": ratios} | kept


def variance(scale):
    """Variance of every sampler and baseline on a fixed set of completions of the real tasks, base and trained."""
    quick = scale == QUICK
    settings = {
        "Countdown, m = 6, base": ("countdown", 6, 0),
        "Countdown, m = 6, trained": ("countdown", 6, 150),
        "Sudoku, m = 8, base": ("sudoku", 8, 0),
        "Sudoku, m = 8, trained": ("sudoku", 8, 80),
        "Countdown, m = 2, base": ("countdown", 2, 0),
    }
    if quick:
        settings = {"Countdown, m = 6, trained": settings["Countdown, m = 6, trained"]}
    size = {"batches": 2, "prompts": 2} if quick else {"batches": 24, "prompts": 32}
    of_task = {"countdown": 10, "sudoku": 10} if quick else {"countdown": 3000, "sudoku": 600}  # as train.py has them
    jobs = [
        {"task": task, "m": m, "updates": min(updates, 1) if quick else updates, "base_steps": of_task[task]} | size
        for task, m, updates in settings.values()
    ]
    bases = [{"task": job["task"], "seed": 0, "base_steps": job["base_steps"]} for job in jobs]
    do_all(make_base, bases, "base models")
    results = dict(zip(settings, map(variance_summary, do_all(measure_variance, jobs, "variance"))))
    for name, result in results.items():
        rows = result["variance / squared gradient"]
        print(f"\n{name}: variance / squared gradient{'':<8}{var.GROUP_MEAN:>18}{var.RAMP:>20}")
        print(f"  {'full sum':<50}{rows[var.GROUP_MEAN]['full sum']:>18.2f}{rows[var.RAMP]['full sum']:>20.2f}")
        for k in result["ours / official"]:
            for sampler in rows[var.RAMP][k]:
                cells = [rows[baseline][k][sampler] for baseline in (var.GROUP_MEAN, var.RAMP)]
                print(f"  {k}, {sampler:<43}{cells[0]:>18.2f}{cells[1]:>20.2f}")
        print("  ours / official:", {k: f"{a:.2f} +- {b:.2f}" for k, (a, b) in result["ours / official"].items()})
    finish("variance", {"settings": results}, draw_variance, (13, 6), (2, 3))


def draw_variance(axes, value):
    """Stacked: what the full sum has, and what drawing k = 2 (m = 2: k = 1) timesteps adds."""
    axes[-1].set_axis_off()
    for axis, (name, result) in zip(axes, value["settings"].items()):
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

    def draw(axes, _):
        for axis, (title, names) in zip(axes, groups.items()):
            for name in [OFFICIAL, *names]:
                draw_curve(axis, rows[name], name, **({"color": "0.4", "ls": "--"} if name == OFFICIAL else {}))
            axis.set(title=title, xlabel="model evaluations, thousands", ylabel="% right, sampled, validation")
            axis.set_ylim(0, 72)  # room for the names
            axis.legend(fontsize=7, loc="upper left")

    finish("curves", {"scale": asdict(scale), "reference": OFFICIAL, "rows": rows}, draw, (11, 8), (2, 2))


def factors(scale):
    """Low discrepancy and entropy weights, alone and together: the control the papers lack; and the parts of ours."""
    results = learn_all({name: CURVES[name] for name in FACTORS} | PARTS, scale, "factors")
    rows = {}
    for k, reference in ((2, FACTORS[0]), (1, "entropy, k = 1")):
        of_k = {name: seeds for name, seeds in results.items() if name.endswith(f"k = {k}")}
        rows |= learning_rows(of_k, reference)
    print_rows(rows, "")

    def draw(axes, _):
        for axis, policy in zip(axes, ("sampled", "greedy")):
            draw_bars(axis, rows, policy)

    finish("factors", {"scale": asdict(scale), "rows": rows}, draw, (12, 3.4), (1, 2))


def budget(scale):
    """What k is worth at each m, for a fixed number of evaluations."""
    results, rows = learn_all(BUDGET, scale, "m and k", test_steps=DECODED), {}
    for m in (2, 4, 8):  # compared with k = 2 of the same m
        of_m = {name: seeds for name, seeds in results.items() if name.startswith(f"m = {m},")}
        rows |= learning_rows(of_m, f"m = {m}, k = 2")
    print_rows(rows, "k = 2 of the same m")

    def draw(axes, _):
        for axis, policy in zip(axes, ("sampled", "greedy")):
            for m in (2, 4, 8):
                ks = [k for k in (1, 2, 4, 8) if f"m = {m}, k = {k}" in rows]
                mean, half = zip(*(rows[f"m = {m}, k = {k}"][policy] for k in ks))
                percent = [[100 * x for x in column] for column in (mean, half)]
                axis.errorbar(ks, percent[0], yerr=percent[1], marker="o", capsize=3, label=f"m = {m}")
            axis.set(
                xlabel="k, timesteps per completion", ylabel=f"% right, {policy}, in m steps", xscale="log", xticks=ks
            )
            axis.set_xticklabels(ks)
            axis.minorticks_off()
            axis.legend()

    finish("budget", {"scale": asdict(scale), "rows": rows}, draw, (10, 4), (1, 2))


def measure_base(seed, base_steps, questions):
    """The base model decoded at every number of steps."""
    run_config, config, env, model, tokenizer = setting("countdown", seed, base_steps)
    run_config = replace(run_config, eval_steps=DECODED)
    test = env.load("test")[:questions]
    return {"test": train.by_sampling_steps(model, tokenizer, env, run_config, config, test)}


def steps(scale):
    """Trained at m, decoded at m': the whole matrix, base and trained; and trained as served, by low confidence."""
    results = learn_all(STEPS, scale, "trained at m", test_steps=DECODED)
    jobs = [{"seed": seed, "base_steps": scale.base_steps, "questions": scale.questions} for seed in range(scale.seeds)]
    results = {"base": do_all(measure_base, jobs, "base")} | results
    rows = {
        name: {
            policy: {m: interval(final(result, policy, m) for result in seeds) for m in DECODED}
            for policy in ("sampled", "greedy")
        }
        for name, seeds in results.items()
    }
    exact, kept = (results[name] for name in list(STEPS)[-2:])
    difference = {
        policy: interval(final(a, policy, 4) - final(b, policy, 4) for a, b in zip(exact, kept))
        for policy in ("sampled", "greedy")
    }
    for name, row in rows.items():
        for policy, cells in row.items():
            print(f"{name:<44}{policy:<9}" + "".join(f"{100 * a:8.1f} +-{100 * b:4.1f}" for a, b in cells.values()))
    print("low confidence at m' = 4, exact minus kept tokens only:", difference)

    def draw(axes, _):
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

    def draw(axes, _):
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


COMMANDS = (exact, variance, curves, factors, budget, steps, collapse)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=[command.__name__ for command in COMMANDS] + ["all"])
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that the code runs")
    parser.add_argument("--out", type=Path, help="folder of runs and results instead of runs/estimators and results")
    chosen = parser.parse_args(argv)
    global FOLDER, RESULTS, WORKERS
    if chosen.quick and not chosen.out:
        parser.error("--quick needs --out: its numbers mean nothing and must not replace results")
    if chosen.out:
        FOLDER, RESULTS = chosen.out / "runs", chosen.out
    WORKERS = 0 if chosen.quick else WORKERS
    RESULTS.mkdir(parents=True, exist_ok=True)
    for command in COMMANDS:
        if chosen.command in (command.__name__, "all"):
            command(QUICK if chosen.quick else Scale())


if __name__ == "__main__":
    main()
