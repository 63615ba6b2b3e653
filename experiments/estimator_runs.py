"""What the estimator laboratory (estimators.py) runs, and how runs are shared among processes and kept.

A run is a function of JSON settings that returns JSON numbers: learn, measure_variance, measure_exact, measure_base. It
is kept in runs/estimators under its settings and all code that its numbers depend on.
"""

import ast
import hashlib
import json
import math
import multiprocessing
import os
import signal
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from tqdm import tqdm

import agrpo
import runs
import settings
import tasks
import tiny_dllm
import train
from experiments import contrasts
from experiments import exact as enumeration
from experiments import variance as var

FOLDER = Path(__file__).parent.parent / "runs" / "estimators"  # of finished runs and base models
WORKERS = os.cpu_count()  # 0: everything in this process

# --------------------------------------------------------------------------------- done once and kept


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
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (for the life of the process)


def do_one(one):
    """Make one run, (function, path, job), and keep it."""
    function, path, job = one
    if job_name(function, job) != path.stem:  # this process has read newer files than the one that started it
        raise RuntimeError("the code was changed while this command ran: start it again")
    started = time.process_time()
    result = function(**job)
    runs.write_json(path, {"job": job, "cpu_seconds": time.process_time() - started} | result)


def job_name(function, job):
    """The file of a run: another job, or other code, is another run."""
    key = hashlib.sha256(json.dumps([job, code()], sort_keys=True).encode()).hexdigest()
    return f"{function.__name__}-{key[:16]}"


@cache
def code():
    """What a run's numbers depend on beside its settings; comments and layout do not count, docstrings do."""
    modules = (sys.modules[__name__], agrpo, contrasts, enumeration, settings, tasks, tiny_dllm, train, var)
    return [torch.__version__, *(ast.dump(ast.parse(Path(module.__file__).read_text())) for module in modules)]


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
            stack.enter_context(enumeration.replaced(name, value))
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


def base_of(task, seed, base_steps, flags, **_):
    """The make_base job of a learning run: of its flags the base model depends on --completion-length alone."""
    at = flags.index("--completion-length") if "--completion-length" in flags else len(flags)
    return {"task": task, "seed": seed, "base_steps": base_steps, "flags": flags[at : at + 2]}


def batch_stratified(rollout, config, generator):
    """The official code's timesteps: one stratified set of uniforms (B, k) for the whole batch, shuffled, so that a
    completion may draw a step twice. Unbiased as well."""

    def shuffled(shape, generator):
        strata = torch.randperm(math.prod(shape), generator=generator).view(shape)
        return (strata + torch.rand(shape, dtype=torch.float64, generator=generator)) / strata.numel()

    with enumeration.replaced("uniforms", shuffled):
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


def measure_variance(task, m, updates, batches, prompts, base_steps, seed=0):
    """variance.measure on a base model, or after some updates with k = 2, timesteps drawn as the preset has it."""
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


def measure_exact(seed, sharpness):
    """The exact table of one random model."""
    return {"rows": enumeration.laboratory_rows(seed, sharpness)}


def measure_base(seed, base_steps, questions, test_steps):
    """The base model decoded at every one of the numbers of steps."""
    run_config, config, env, model, tokenizer = setting("countdown", seed, base_steps)
    run_config = replace(run_config, eval_steps=test_steps)
    test = env.load("test")[:questions]
    return {"test": train.by_sampling_steps(model, tokenizer, env, run_config, config, test)}
