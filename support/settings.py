"""What can be set: the run's dataclass, the defaults of each model and task, and the command line made from both."""

import argparse
import importlib.util
import inspect
import math
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import get_args

import agrpo
import tasks
import variants
from agrpo import AGRPOConfig, require
from support import in_one_line, package, runs, words


@dataclass
class RunConfig:
    """What a run does; the comments are its --help. Model and task override some defaults in PRESETS."""

    task: str = "countdown"  # countdown | sudoku | tracking | gsm8k | math
    algorithm: str = "agrpo"  # agrpo | agrpo-sa | egspo | egspo-sa | paper (variants.py) | FILE.py:FUNCTION, your own
    model: str = "tiny"  # tiny: trained from scratch here | llada | hub id or folder of LLaDA's structure, or LoRA
    revision: str = ""  # commit, tag or branch on the hub; empty: the pinned one, or the newest
    data: str = ""  # questions from this JSONL, CSV or parquet file instead of the hub or the generator
    exclude: str = ""  # never train on questions of this file (Sudoku: on its grids), so that it can be a test later
    seed: int = 0  # of everything random
    out: str = ""  # folder of the run; empty: runs/TASK-seedSEED, numbered if taken
    completion_length: int = 256  # n: tokens of an answer
    unmasking: str = "random"  # random | low_confidence: scores all it draws | low_confidence_kept: EGSPO's, biased
    beta: float = 0.0  # weight of the KL divergence to the base model
    entropy_bonus: float = 0.0  # weight of the entropy of the policy at the drawn steps
    max_steps: int = 600  # policy-gradient updates
    learning_rate: float = 5e-4  # peak, AdamW
    gradient_clip: float = 0.2  # largest norm of the gradient
    updates_per_rollout: int = 1  # optimizer steps on a rollout, each with fresh draws of timesteps
    prompts_per_step: int = 32  # prompts per update over all processes, each with num_generations completions
    tokens_per_pass: int = 5120  # per forward and backward pass, prompts included: lower it if memory runs out
    gradient_checkpointing: bool = False  # store one activation per layer, compute the rest again: less memory
    lora_rank: int = 0  # train a LoRA adapter of this rank; 0: train all weights (in float32)
    base_steps: int = 3000  # tiny: supervised updates of the base model
    eval_every: int = 75  # updates between two validations
    eval_steps: tuple[int, ...] = (1, 2, 4, 8)  # numbers of sampling steps in the final table
    eval_split: str = "test"  # test | validation: questions of the report; validation while choosing settings
    eval_prompts: int = 1000  # at most this many of them; 0: all
    save_every: int = 50  # updates between two checkpoints; one is also written at Ctrl-C and SIGTERM
    tracker: str = ""  # tensorboard | wandb
    resume: str = ""  # folder of an unfinished run: continue it
    evaluate: str = ""  # folder of a finished run, or a model: measure it, or answer --prompt, instead of training
    prompt: str | None = None  # with --evaluate: one question to answer
    template: str | None = None  # with --prompt: the answer's given text, [k] for k tokens to write: "[2]+[2]-[2]"
    # Set by PRESETS alone, no flags of their own:
    schedule: str = "linear"  # linear: ten updates of warm-up, last fifth to zero | cosine: warm-up of 1% | constant
    weight_decay: float = 0.0  # of AdamW
    adam_beta2: float = 0.999  # the gradient is mostly noise: a long memory of its square helps the tiny model
    lora_alpha: int = 64  # the adapter is scaled by alpha / rank
    base_noise: float = 0.0  # share of the tokens of worked examples that are replaced by random ones
    base_learning_rate: float = 2e-3  # peak, AdamW, cosine to zero over base_steps
    base_batch: int = 64  # worked examples per supervised update
    eval_policies: tuple[str, ...] = ("sampled", "greedy")  # as trained, and low-confidence at temperature 0
    eval_length: int | None = None  # completion_length of evaluations; None: as trained
    eval_block: int | None = None  # block_length of evaluations; None: as trained


FIRST_WITHOUT_FLAG = "schedule"
TINY = {  # the shape of the tiny model
    "countdown": {"d_model": 64, "n_layers": 3, "n_heads": 2, "mlp_hidden_size": 128, "rope_theta": 30.0},
    "sudoku": {"d_model": 64, "n_layers": 4, "n_heads": 4, "mlp_hidden_size": 128, "rope_theta": 100.0},
}
TRACKING_LENGTHS = {name: task.completion_length for name, task in tasks.TASKS.items() if name.startswith("tracking")}
TINY |= dict.fromkeys(TRACKING_LENGTHS, TINY["countdown"])
# What the AGRPO authors publish for GSM8K; from max_steps on ours, for one GPU of 80 GB.
LLADA = {"completion_length": 384, "block_length": 12, "sampling_steps": 128, "mc_samples": 24}
LLADA |= {"importance_sampling": "entropy", "temperature": 0.6, "top_k": 150, "top_p": 0.99}
LLADA |= {"prompts_per_step": 16, "learning_rate": 5e-6, "schedule": "cosine", "lora_rank": 64}
LLADA |= {"weight_decay": 0.01, "adam_beta2": 0.99, "gradient_clip": 1.0}
LLADA |= {"eval_length": 256, "eval_block": 32, "eval_steps": (128,)}
LLADA |= {"max_steps": 500, "tokens_per_pass": 16384, "gradient_checkpointing": True, "eval_every": 50}
LLADA |= {"eval_prompts": 256, "save_every": 1}  # an update takes minutes, a checkpoint of the adapter seconds
GAME = {"shared_order": True, "prompts_per_step": 64}  # with equal states run once, twice the prompts cost little
COUNTDOWN = GAME | {"completion_length": 8, "sampling_steps": 2, "mc_samples": 2}
SUDOKU = GAME | {"completion_length": 16, "sampling_steps": 8, "mc_samples": 4, "importance_sampling": "entropy"}
SUDOKU |= {"base_steps": 600, "base_noise": 0.12, "base_batch": 128, "base_learning_rate": 3e-3}
SUDOKU |= {"max_steps": 250, "tokens_per_pass": 8448, "eval_every": 50, "eval_steps": (4, 8, 16)}
TRACKING = GAME | {"block_length": 1, "mc_samples": 2, "max_steps": 150, "eval_every": 25}  # left to right
TRACKING |= {"base_noise": 0.15, "base_batch": 128, "base_learning_rate": 3e-3}

PRESETS = {
    ("tiny", "countdown"): COUNTDOWN,
    ("tiny", "sudoku"): SUDOKU,
    ("llada", "gsm8k"): LLADA,
    ("llada", "math"): LLADA,
    ("llada", "countdown"): LLADA | {"completion_length": 128, "block_length": 16},
    ("llada", "sudoku"): LLADA | {"completion_length": 256, "block_length": 16},
}
for name, n in TRACKING_LENGTHS.items():  # one step a token
    steps = {"completion_length": n, "sampling_steps": n, "eval_steps": (n,), "base_steps": 600 if n < 12 else 1600}
    PRESETS["tiny", name] = TRACKING | steps
EGSPO = {"epsilon_high": 0.5, "beta": 0.04}
# As its authors publish, but for a 4-bit base, adapter dropout, the score of kept tokens alone.
LLADA_EGSPO = EGSPO | {"completion_length": 256, "block_length": 32, "mc_samples": 8, "unmasking": "low_confidence"}
LLADA_EGSPO |= {"temperature": 0.9, "top_k": 0, "top_p": 1.0, "learning_rate": 3e-5, "schedule": "constant"}
LLADA_EGSPO |= {"weight_decay": 0.1, "gradient_clip": 0.2, "lora_rank": 128}
HUB_IDS = {"llada": "GSAI-ML/LLaDA-8B-Instruct"}  # short names for --model
BLANK = r"\[([1-9]\d{0,3})\]"  # [k] in a template
PATHS = ("data", "exclude")  # made absolute: config.json shall mean the same files wherever it is read
RESUMABLE = {"resume", "tokens_per_pass", "gradient_checkpointing", "save_every", "tracker"}  # may change on --resume
# What --evaluate heeds: always; for a table; and for the policy as trained, if a table has it.
HEEDED = "evaluate prompt template task revision data seed completion_length block_length tokens_per_pass"
HEEDED, MEASURING = set(HEEDED.split()), {"out", "eval_steps", "eval_split", "eval_prompts"}
AS_TRAINED = {"unmasking", "temperature", "top_k", "top_p"}


def parse_arguments(argv, description=None):
    """argv -> (RunConfig, AGRPOConfig). Flags, types and help are those of the dataclasses; misuse exits with 2."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        usage="python train.py [--flag value ...]",
        description=description,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32),
        allow_abbrev=False,
    )
    try:
        defaults, stored = defaults_for(argv)
    except ValueError as error:  # a file of the run is broken: no misuse
        parser.exit(1, f"train.py: {error}\n")
    classes = {RunConfig: "the run", AGRPOConfig: "the algorithm (agrpo.py)"}
    for cls, title in classes.items():
        group, help_of = parser.add_argument_group(title), comments(cls)
        for field in fields(cls):
            if field.name == FIRST_WITHOUT_FLAG:
                break
            add_flag(group, field, defaults.get(field.name, field.default), help_of[field.name])
    flags = vars(parser.parse_args(argv))  # those typed, and no others
    try:
        values = defaults | flags
        refuse_unheeded(flags, values, stored)
        if "evaluate" in flags:  # which has a length and blocks of its own
            own = {"completion_length": "eval_length", "block_length": "eval_block"}
            values |= {own[name]: flags[name] for name in own.keys() & flags.keys()}
        run, config = (cls(**{f.name: values.get(f.name, f.default) for f in fields(cls)}) for cls in classes)
        check(run, config)
    except ValueError as error:
        parser.error(str(error))
    return run, config


def defaults_for(argv):
    """Defaults that the other flags decide: a run's own settings for --resume and --evaluate RUN, else PRESETS.

    Returns (defaults, the settings stored in the run or {})."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, prog="train.py")
    for name in ("task", "model", "algorithm", "resume", "evaluate"):
        first.add_argument(flag(name), default="")
    chosen = first.parse_known_args(argv)[0]
    stored, folder = {}, chosen.resume or chosen.evaluate
    if folder and (settings := runs.read_settings(folder)):
        for name, cls in (("run", RunConfig), ("algorithm", AGRPOConfig)):
            runs.check_types(cls, settings[name], Path(folder) / "config.json")
        stored = settings["run"] | settings["algorithm"]
        stored |= {name: absolute(str(stored[name])) for name in PATHS if name in stored}
        defaults = dict(stored)
    else:
        model, task = chosen.model or chosen.evaluate or RunConfig.model, chosen.task or RunConfig.task
        kind, algorithm = "tiny" if model == "tiny" else "llada", chosen.algorithm or RunConfig.algorithm
        defaults = PRESETS.get((kind, task), {}) | {"model": model, "task": task, "algorithm": algorithm}
        if algorithm in ("egspo", "egspo-sa"):
            defaults |= EGSPO if kind == "tiny" else LLADA_EGSPO
    if chosen.evaluate:
        defaults |= {"eval_prompts": 0, "out": ""}
        if defaults.get("model", RunConfig.model) != "tiny":
            defaults |= {"eval_policies": ("greedy",)}  # an answer takes seconds there: only as it is served
    return defaults, stored


def absolute(path):
    return path and str(Path(path).resolve())


def flag(name):
    return "--" + name.replace("_", "-")


def comments(cls):
    """{field: the comment beside it}: what the reader of the code sees is what the user of --help sees."""
    return dict(re.findall(r"^    (\w+):[^#\n]*# (.*)$", inspect.getsource(cls), re.MULTILINE))


def add_flag(group, field, default, text):
    """One field of a dataclass as one flag of its type, its default at the end of its help."""
    kind, *_ = *get_args(field.type), field.type  # int of int | None and of tuple[int, ...]
    several = isinstance(field.default, tuple)
    shown = " ".join(map(str, default)) if several else default
    read = absolute if field.name in PATHS else kind
    form = {"type": read, "nargs": "+" if several else None, "metavar": kind.__name__.upper()}
    if kind is bool:
        shown, form = "yes" if default else "no", {"action": argparse.BooleanOptionalAction}
    text = text.replace("%", "%%") + (f" [{shown}]" if shown not in ("", None) else "")
    group.add_argument(flag(field.name), default=argparse.SUPPRESS, help=text, **form)


def refuse_unheeded(flags, values, stored):
    """Raises ValueError where a typed flag would do nothing, or something else than it says."""
    model, policies = values.get("model", RunConfig.model), values.get("eval_policies", RunConfig.eval_policies)
    heeded = HEEDED | ({"sampling_steps"} if "prompt" in flags else MEASURING)
    heeded |= AS_TRAINED if "sampled" in policies and "prompt" not in flags else set()
    on_hub = not (stored or model == "tiny" or Path(HUB_IDS.get(model, model)).is_dir())
    for name in (name for name, value in flags.items() if name not in stored or value != stored[name]):
        empty = flags[name] == "" and name not in ("tracker", "prompt", "template")  # none; check says more of those
        require(not empty, f"{flag(name)} is empty: a shell variable that is not set?")
        fixed = "resume" in flags and name in stored.keys() - RESUMABLE
        require(not fixed, f"{flag(name)} cannot change in a run that is resumed")
        unheeded = "evaluate" in flags and name not in heeded | {"resume"}  # both: check says it
        require(not unheeded, f"{flag(name)} does nothing here: --evaluate heeds {' '.join(map(flag, sorted(heeded)))}")
        require(name != "revision" or on_hub, f"--revision: the weights of {model} do not come from the hub")


def find_algorithm(name):
    """The estimator of that name in variants.py, or FUNCTION of FILE.py. Raises ValueError in one line."""
    if name in variants.ALGORITHMS:
        return variants.ALGORITHMS[name]
    file, _, function = name.rpartition(":")
    known = ", ".join(variants.ALGORITHMS)
    require(file.endswith(".py"), f"--algorithm {name}: choose from {known}, or FILE.py:FUNCTION")
    require(Path(file).is_file(), f"--algorithm {name}: there is no file {file}")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        estimate = getattr(module, function)
    except Exception as error:  # whatever a reader's own file may raise
        raise ValueError(f"--algorithm {name}: {type(error).__name__}: {in_one_line(error)}") from error
    require(callable(estimate), f"--algorithm {name}: {function} is not a function")
    return estimate


def length(run):
    """n of an evaluation."""
    return run.eval_length or run.completion_length


def check(run, config):
    """Ranges, and combinations that no single dataclass can see. Raises ValueError."""
    choices = {"task": TINY if run.model == "tiny" else words.TASKS, "unmasking": variants.ROLLOUTS}
    choices |= {"eval_split": ("test", "validation"), "tracker": ("", "tensorboard", "wandb")}
    choices |= {"schedule": ("linear", "cosine", "constant")}
    policies = set(run.eval_policies) <= {"sampled", "greedy"}
    require(policies, f"eval_policies {' '.join(run.eval_policies)}: choose from sampled, greedy")
    for name, values in choices.items():
        require(getattr(run, name) in values, f"{flag(name)} {getattr(run, name)}: choose from {', '.join(values)}")
    least = dict.fromkeys(("prompts_per_step", "updates_per_rollout", "tokens_per_pass", "eval_every", "save_every"), 1)
    least |= dict.fromkeys(("max_steps", "base_steps", "lora_rank", "eval_prompts", "beta", "entropy_bonus"), 0)
    for name, bound in least.items():
        value = getattr(run, name)
        require(bound <= value < math.inf, f"{flag(name)} {value}: {'at least 1' if bound else 'not negative'}")
    for name in ("learning_rate", "gradient_clip"):
        require(0 < getattr(run, name) < math.inf, f"{flag(name)} must be positive and finite")
    needed = tasks.TASKS[run.task].completion_length if run.model == "tiny" else 1
    shortest = min(run.completion_length, length(run))
    require(shortest >= needed, f"--completion-length {shortest}: answers to {run.task} need {needed}")
    require(config.temperature > 0, "--temperature 0 is for evaluation, which uses it anyway: train at a positive one")
    own = run.model == "tiny" and (run.lora_rank or run.data or run.exclude)
    require(not own, "--lora-rank, --data and --exclude need a pretrained --model: tiny has its own")
    require(not (run.evaluate and run.resume), "--resume continues training, --evaluate measures: choose one")
    require(run.evaluate or run.prompt is None, "--prompt needs --evaluate RUN: which model should answer?")
    require(run.prompt is None or run.prompt.strip(), "--prompt is empty")
    typed = f"{run.prompt}{run.template}"
    require(typed == typed.encode(errors="replace").decode(), "--prompt or --template is no text in UTF-8")
    require(run.prompt or run.template is None, "--template needs --prompt: which question is it the answer to?")
    writes = run.template is None or re.search(BLANK, run.template)
    require(writes, f"--template {run.template!r}: no [k] says how many tokens to write, as in '[2]+[2]-[2]'")
    if run.tracker:
        package(run.tracker, f"--tracker {run.tracker}")
    if not run.evaluate:  # which runs no estimator, nor a file that a run's folder names
        skips = getattr(find_algorithm(run.algorithm), "needs_advantage", False) and (run.beta or run.entropy_bonus)
        require(not skips, f"--beta and --entropy-bonus: {run.algorithm} draws no step whose advantage is 0")
        alone = run.algorithm == "agrpo-sa" and config.num_generations < 3
        require(not alone, "agrpo-sa needs --num-generations 3: with one fellow its gate is always shut")
        check_steps("--sampling-steps", config.sampling_steps, run.completion_length, config)
    measured = replace(config, block_length=run.eval_block or config.block_length)
    for steps in run.eval_steps if run.evaluate else (*run.eval_steps, config.sampling_steps):
        check_steps("--eval-steps", steps, length(run), measured)


def check_steps(name, steps, n, config):
    """Raises ValueError, which names the flag, if so many steps cannot write n tokens under the config."""
    try:
        agrpo.schedule(n, replace(config, sampling_steps=steps))
        require(steps <= n, f"exceeds the {n} tokens of an answer, and a step writes at least one")
    except ValueError as error:
        raise ValueError(f"{name} {steps}: {error}") from error
