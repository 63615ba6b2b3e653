"""What the findings share: one learning run, and how runs are shared among processes and kept.

A finding is a file and a command, `python experiments/NAME.py`. It asks for independent runs, each a function of JSON
settings that returns JSON numbers. Processes of one thread each share them; a finished run is kept in runs/estimators,
under its settings and the code that its numbers depend on, and not repeated: an interrupted command goes on where it
was, and findings share runs. --quick makes everything tiny: it shows that the code runs, and nothing else.

Evaluations are distinct sequences through the model: of rollouts, of updates, and of a reference model, with the common
unmasking order of train.py's games. The backward pass of an update is not counted (it makes its evaluation cost about
three of the rollout). CPU seconds are those of a whole run, its validations and tests included.
"""

import argparse
import ast
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import statistics
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
from tqdm import tqdm

import agrpo
import tasks
import tiny_dllm
import train
import variants
from experiments import contrasts, draws, report
from support import evaluation, settings
from support.runs import streams, write_json

FOLDER = Path(__file__).parent.parent / "runs" / "estimators"  # of finished runs and base models
WORKERS = os.cpu_count()  # 0: everything in this process


# ------------------------------------------------------------------------------------------- what is compared
@dataclass(frozen=True)
class Variant:
    """A row of a finding: what is trained, and how its gradient is estimated."""

    label: str
    m: int = 6  # denoising steps
    k: int = 2  # timesteps per completion
    flags: str = ""  # more flags of train.py
    draw: str = ""  # a function of draws.py in place of the estimator
    contrast: str = ""  # a function of contrasts.py in place of accumulate_gradient
    n: int = 0  # tokens of an answer; 0: the task's own number
    trained: bool = True  # False: the base model


@dataclass(frozen=True)
class Scale:
    """How much of everything: the real thing, or --quick."""

    seeds: int = 5
    evaluations: int = 40_000  # of a learning run: distinct sequences of rollouts and updates
    updates: int = 0  # if given, a run ends after so many updates instead
    base_steps: int = 1000
    prompts: int = 16  # per update
    questions: int = 1000  # test questions at the end of a run
    checks: int = 6  # validations on the way, on half as many questions


QUICK = Scale(seeds=2, evaluations=1, base_steps=5, prompts=2, questions=5, checks=1)


def compare(name, scale, families, claims, seeds=None, task="countdown", test_steps=(), **sizes):
    """A finding about learning runs: families {title: variants} and claims about them, as report.tell has them. sizes:
    other ones of the Scale, unless it is that of --quick."""
    scale = scale if scale == QUICK else replace(scale, **sizes)
    compared = list(dict.fromkeys(itertools.chain(*families.values())))
    cases = list(itertools.product(seeds or range(scale.seeds), compared))
    bases = [{"task": task, "seed": seed, "base_steps": scale.base_steps, "n": v.n} for seed, v in cases]
    # Neither another name nor one seed more repeats a run.
    common = {"task": task, "scale": asdict(replace(scale, seeds=0)), "test_steps": test_steps}
    jobs = [common | {"seed": seed, "variant": asdict(replace(v, label=""))} for seed, v in cases]
    do_all(make_base, bases, "base models")
    results = do_all(learn, jobs, name)
    results = {v.label: results[i :: len(compared)] for i, v in enumerate(compared)}
    families = {title: [variant.label for variant in family] for title, family in families.items()}
    return report.tell(name, scale, results, families, claims)


# ------------------------------------------------------------------------------------------- one learning run
def learn(task, seed, variant, scale, test_steps=()):
    """Policy gradients from the seed's own base model until so many model evaluations are used up.
    Returns the validations on the way and the accuracies at the end, on test questions."""
    variant, scale, passed = Variant(**variant), Scale(**scale), []
    flags = ["--prompts-per-step", scale.prompts, "--sampling-steps", variant.m, "--mc-samples", variant.k]
    setup = base_of(task, seed, scale.base_steps, variant.n, *flags, *variant.flags.split())
    # Counts sequences. The reference of a KL is copied from the model, and counts here too.
    setup.model.register_forward_pre_hook(lambda _, inputs: passed.append(len(inputs[0])))
    rng, generator = streams(seed, "reinforce")
    setup = train.with_algorithm(setup)
    if variant.draw or variant.contrast:  # what no flag says; a contrast draws no timesteps
        setup = replace(setup, estimate=getattr(draws, variant.draw or "every_step"))
    if variant.contrast:
        masks = {"generator": generator} if variant.contrast == "elbo" else {}
        setup = replace(setup, accumulate=partial(getattr(contrasts, variant.contrast), **masks))
    run, config, model = setup.run, setup.config, setup.model
    examples, validation, test = (setup.task.load(split) for split in ("train", "validation", "test"))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, run.adam_beta2), weight_decay=0.0, fused=True)
    # What is measured is the policy at temperature 1, also of those that were trained at another.
    decoded = replace(run, eval_steps=tuple(test_steps) or (config.sampling_steps,))
    measured = replace(setup, run=decoded, config=replace(config, temperature=1.0))
    history, curve, used = [], [], 0

    def progress():  # 0 to 1
        done = len(history) / scale.updates if scale.updates else used / scale.evaluations
        return min(done, 1) if variant.trained else 1

    def check():
        sampled = evaluation.grade(measured, validation[: scale.questions // 2], "sampled")
        point = {"evaluations": used, "updates": len(history), "sampled": evaluation.mean(sampled, "correct")}
        for name in ("entropy", "signal", "gradient_norm") if history else ():
            point[name] = statistics.mean(metrics[name] for metrics in history[-20:])
        curve.append(point)

    check()
    while (share := progress()) < 1:  # warm-up, constant, to zero over the last fifth: as in train.py
        optimizer.param_groups[0]["lr"] = run.learning_rate * min(1, (len(history) + 1) / 10, 5 * (1 - share))
        passed.clear()
        history.append(train.update(setup, rng.choices(examples, k=scale.prompts), optimizer, generator))
        used += sum(passed)
        if progress() >= min(len(curve) / scale.checks, 1):
            check()
    accuracies = evaluation.by_sampling_steps(measured, test[: scale.questions])
    found = {"curve": curve, "updates": len(history), "sampling_steps": config.sampling_steps, "test": accuracies}
    return found | {"diversity": diversity(measured, test[: scale.questions // 5])}


def base_of(task, seed, base_steps, n=0, *flags):
    """The Setup of a seed's own base model, which is trained now or was by an earlier run."""
    flags = ["--task", task, "--seed", seed, "--base-steps", base_steps, *flags]
    flags += ["--completion-length", n] if n else []
    return train.base_model(*settings.parse_arguments(list(map(str, flags))), FOLDER)


def make_base(**job):
    """Only so that no two processes train the same base model."""
    base_of(**job)
    return {}


def diversity(setup, questions, answers=16):
    """Of 16 sampled answers: share of questions with at least one right one, and mean number of distinct right ones."""
    records = evaluation.grade(setup, [example for example in questions for _ in range(answers)], "sampled")
    groups = [records[i : i + answers] for i in range(0, len(records), answers)]
    right = [len({r["completion"] for r in group if r["correct"]}) for group in groups]
    return {"pass@16": sum(r > 0 for r in right) / len(right), "distinct": sum(right) / len(right)}


# ---------------------------------------------------------------------------------------- done once and kept
def do_all(function, jobs, description):
    """[function(**job)] in the order of the jobs: read from FOLDER where a job is done, else in parallel processes."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    paths = [FOLDER / f"{job_name(function, job)}.json" for job in jobs]
    todo = [(function, path, job) for path, job in dict(zip(paths, jobs)).items() if not path.exists()]
    with tqdm(total=len(todo), desc=description) as bar:
        for _ in done_in_parallel(todo) if WORKERS else map(do_one, todo):
            bar.update()
    return [json.loads(path.read_text()) for path in paths]


def done_in_parallel(todo):
    """Yield as runs are finished; an error, or Ctrl-C, ends those that are not."""
    with multiprocessing.get_context("spawn").Pool(WORKERS, initialise, (FOLDER,)) as pool:
        yield from pool.imap_unordered(do_one, todo)
        pool.close()  # all is done: they may end by themselves
        pool.join()


def initialise(folder):
    """A process of the pool: one thread, as the tensors are small; quiet; ended by the pool alone."""
    global FOLDER
    FOLDER = folder
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own, of many processes, would be left behind when this one is ended
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (for the life of the process)


def do_one(one):
    """Make one run, (function, path, job), and keep it."""
    function, path, job = one
    if job_name(function, job) != path.stem:  # this process has read newer files than the one that started it
        raise RuntimeError("the code was changed while this command ran: start it again")
    started = time.process_time()
    result = function(**job)
    write_json(path, {"job": job, "cpu_seconds": time.process_time() - started} | result)


def job_name(function, job):
    """The file of a run: another job, or other code, is another run."""
    key = hashlib.sha256(json.dumps([job, code(function.__module__)], sort_keys=True).encode()).hexdigest()
    return f"{function.__name__}-{key[:16]}"


@cache
def code(name):
    """What the numbers of a module's functions depend on beside their settings: it, what it imports of experiments
    (but how that is told), and what all runs need. Comments and layout do not count, docstrings do."""
    own, modules = sys.modules[name], {agrpo, evaluation, settings, tasks, tiny_dllm, train, variants}
    imported = {m for m in vars(own).values() if getattr(m, "__name__", "").startswith("experiments.")}
    files = (Path(module.__file__) for module in {own} | modules | imported - {report})
    return [torch.__version__, *sorted(ast.dump(ast.parse(file.read_text())) for file in files)]


# ------------------------------------------------------------------------------------------- the command line
def main(finding, description, argv=None, lengths=()):
    """Run finding(scale), or finding(scale, length) where there are lengths to choose from, as its command line says;
    Ctrl-C and SIGTERM end it, and the processes of its pool."""
    global FOLDER, WORKERS
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that the code runs")
    parser.add_argument("--out", type=Path, help="folder of runs and results instead of runs/estimators and results")
    if lengths:
        parser.add_argument("--length", type=int, choices=lengths, default=lengths[0], help="letters")
    chosen = parser.parse_args(argv)
    if chosen.quick and not chosen.out:
        parser.error("--quick needs --out: its numbers mean nothing and must not replace results")
    if chosen.out:
        FOLDER, report.RESULTS = chosen.out / "runs", chosen.out
    WORKERS = 0 if chosen.quick else WORKERS
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    finding(QUICK if chosen.quick else Scale(), *([chosen.length] if lengths else []))


def stop(number, _):
    print("\ninterrupted: the same command goes on from here", file=sys.stderr)
    sys.exit(128 + number)
