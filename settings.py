"""What can be set: the run's dataclass, the defaults of each model and task, and the command line made from both."""

import argparse
import dataclasses
import importlib.util
import inspect
import math
import re
from dataclasses import dataclass, replace

import runs
import tasks
from agrpo import AGRPOConfig


@dataclass
class RunConfig:
    """What a run does; the comments are its --help. Model and task override some defaults in PRESETS."""

    task: str = "countdown"  # countdown | sudoku | gsm8k | math
    algorithm: str = "agrpo"  # agrpo | agrpo-sa | egspo | egspo-sa: chooses the defaults below, of the papers and ours
    model: str = "tiny"  # tiny: trained from scratch here | llada | hub id or folder of LLaDA's structure, or LoRA
    revision: str = ""  # commit, tag or branch on the hub; empty: the pinned one, or the newest
    data: str = ""  # questions from this JSONL, CSV or parquet file instead of the hub or the generator
    exclude: str = ""  # never train on questions of this file (Sudoku: on its grids), so that it can be a test later
    seed: int = 0  # of everything random
    out: str = ""  # folder of the run; empty: runs/TASK-seedSEED, numbered if taken
    max_steps: int = 600  # policy-gradient updates
    learning_rate: float = 5e-4  # peak, AdamW
    schedule: str = "linear"  # linear: ten updates of warm-up, last fifth to zero | cosine: warm-up of 1% | constant
    weight_decay: float = 0.0  # of AdamW
    adam_beta2: float = 0.999  # the gradient is mostly noise: a long memory of its square helps the tiny model
    gradient_clip: float = 0.2  # largest norm of the gradient
    prompts_per_step: int = 32  # prompts per update over all processes, each with num_generations completions
    tokens_per_pass: int = 5120  # per forward and backward pass, prompts included: lower it if memory runs out
    gradient_checkpointing: bool = False  # store one activation per layer, compute the rest again: less memory
    lora_rank: int = 0  # train a LoRA adapter of this rank; 0: train all weights (in float32)
    lora_alpha: int = 64  # the adapter is scaled by alpha / rank
    base_steps: int = 3000  # tiny: supervised updates of the base model
    base_noise: float = 0.0  # tiny: share of the tokens of worked examples that are replaced by random ones
    base_learning_rate: float = 2e-3  # tiny: peak, AdamW, cosine to zero over base_steps
    base_batch: int = 64  # tiny: worked examples per supervised update
    eval_every: int = 75  # updates between two validations
    eval_steps: tuple[int, ...] = (1, 2, 4, 8)  # numbers of sampling steps in the final table
    eval_policies: tuple[str, ...] = ("sampled", "greedy")  # as trained, and low-confidence at temperature 0
    eval_length: int = 0  # completion_length of evaluations; 0: as trained
    eval_block: int = 0  # block_length of evaluations; 0: as trained
    eval_split: str = "test"  # test | validation: questions of the report; validation while choosing settings
    eval_prompts: int = 1000  # at most this many of them; 0: all
    save_every: int = 50  # updates between two checkpoints; one is also written at Ctrl-C and SIGTERM
    tracker: str = ""  # tensorboard | wandb
    resume: str = ""  # folder of an unfinished run: continue it
    evaluate: str = ""  # folder of a finished run, or a model: measure it, or answer --prompt, instead of training
    prompt: str | None = None  # with --evaluate: one question to answer
    save_completions: bool = False  # with --evaluate: write every prompt, completion and verdict


TINY = {  # the shape of the tiny model
    "countdown": {"d_model": 64, "n_layers": 3, "n_heads": 2, "mlp_hidden_size": 128, "rope_theta": 30.0},
    "sudoku": {"d_model": 64, "n_layers": 4, "n_heads": 4, "mlp_hidden_size": 128, "rope_theta": 100.0},
}
LLADA = {  # what the AGRPO authors publish for GSM8K; from max_steps on ours, for one GPU of 80 GB
    "completion_length": 384,
    "block_length": 12,
    "sampling_steps": 128,
    "temperature": 0.6,
    "top_k": 150,
    "top_p": 0.99,
    "mc_samples": 24,
    "importance_sampling": "entropy",
    "prompts_per_step": 16,
    "learning_rate": 5e-6,
    "schedule": "cosine",
    "weight_decay": 0.01,
    "adam_beta2": 0.99,
    "gradient_clip": 1.0,
    "lora_rank": 64,
    "eval_length": 256,
    "eval_block": 32,
    "eval_steps": (128,),
    "max_steps": 500,
    "tokens_per_pass": 16384,
    "gradient_checkpointing": True,
    "eval_every": 50,
    "eval_prompts": 256,
    "save_every": 1,  # an update takes minutes, a checkpoint of the adapter seconds
}
PRESETS = {
    ("tiny", "countdown"): {"completion_length": 8, "sampling_steps": 2, "mc_samples": 2},
    ("tiny", "sudoku"): {
        "completion_length": 16,
        "sampling_steps": 8,
        "mc_samples": 4,
        "importance_sampling": "entropy",
        "base_steps": 600,
        "base_noise": 0.12,
        "base_batch": 128,
        "base_learning_rate": 3e-3,
        "max_steps": 250,
        "tokens_per_pass": 8448,
        "eval_every": 50,
        "eval_steps": (4, 8, 16),
    },
    ("llada", "gsm8k"): LLADA,
    ("llada", "math"): LLADA,
    ("llada", "countdown"): LLADA | {"completion_length": 128, "block_length": 16},
    ("llada", "sudoku"): LLADA | {"completion_length": 256, "block_length": 16},
}
EGSPO = {"importance_sampling": "top_entropy", "epsilon_high": 0.5, "beta": 0.04}
ALGORITHMS = {  # for every model and task
    "agrpo": {},
    # Ours: unbiased like AGRPO, with EGSPO-SA's r_t as a baseline, and the draws where they matter.
    "agrpo-sa": {"importance_sampling": "entropy", "allocation": "batch", "step_baseline": "ramp"},
    "egspo": EGSPO,
    "egspo-sa": EGSPO | {"step_baseline": "constant"},
}
LLADA_EGSPO = {  # as its authors publish, but for a 4-bit base, adapter dropout, the score of kept tokens alone
    "completion_length": 256,
    "block_length": 32,
    "sampling_steps": 128,
    "mc_samples": 8,
    "unmasking": "low_confidence",
    "temperature": 0.9,
    "top_k": 0,
    "top_p": 1.0,
    "learning_rate": 3e-5,
    "schedule": "constant",
    "weight_decay": 0.1,
    "gradient_clip": 0.2,
    "lora_rank": 128,
}
HUB_IDS = {"llada": "GSAI-ML/LLaDA-8B-Instruct"}  # short names for --model
RESUMABLE = {"resume", "tokens_per_pass", "gradient_checkpointing", "save_every", "tracker"}  # may change on --resume


def parse_arguments(argv, description=None):
    """argv -> (RunConfig, AGRPOConfig). Flags, types and help are those of the dataclasses; misuse exits with 2."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        usage="python train.py [--flag value ...]",
        description=description,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32),
        allow_abbrev=False,
    )
    defaults, stored = defaults_for(argv)
    for cls, title in ((RunConfig, "the run"), (AGRPOConfig, "the algorithm (agrpo.py)")):
        group, help_of = parser.add_argument_group(title), comments(cls)
        for field in dataclasses.fields(cls):
            add_flag(group, field, defaults.get(field.name, field.default), help_of[field.name])
    flags = vars(parser.parse_args(argv))
    try:
        for name in stored.keys() & flags.keys() - RESUMABLE if flags["resume"] else ():
            if flags[name] != stored[name]:
                raise ValueError(f"--{name.replace('_', '-')} cannot change in a run that is resumed")
        run_config, config = (
            cls(**{f.name: flags[f.name] for f in dataclasses.fields(cls)}) for cls in (RunConfig, AGRPOConfig)
        )
        check(run_config, config)
    except ValueError as error:
        parser.error(str(error))
    return run_config, config


def defaults_for(argv):
    """Defaults that the other flags decide: a run's own settings for --resume and --evaluate RUN, else PRESETS.

    Returns (defaults, the settings stored in the run or {})."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, prog="train.py")
    for name in ("task", "model", "algorithm", "resume", "evaluate"):
        first.add_argument("--" + name, default="")
    chosen = first.parse_known_args(argv)[0]
    folder = chosen.resume or chosen.evaluate
    if settings := runs.read_settings(folder) if folder else None:
        stored = settings["run"] | settings["algorithm"]
        stored = {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}
        defaults = dict(stored)
    else:
        model, task = chosen.model or chosen.evaluate or RunConfig.model, chosen.task or RunConfig.task
        kind = model if model == "tiny" else "llada"
        algorithm = chosen.algorithm or RunConfig.algorithm
        defaults = PRESETS.get((kind, task), {}) | ALGORITHMS.get(algorithm, {})
        if kind == "llada" and algorithm.startswith("egspo"):
            defaults |= LLADA_EGSPO
        defaults, stored = defaults | {"model": model, "task": task, "algorithm": algorithm}, {}
    if chosen.evaluate:
        defaults |= {"eval_policies": ("greedy",), "eval_prompts": 0, "out": ""}
    return defaults, stored


def comments(cls):
    """{field: the comment beside it}: what the reader of the code sees is what the user of --help sees."""
    return dict(re.findall(r"^    (\w+):[^#\n]*# (.*)$", inspect.getsource(cls), re.MULTILINE))


def add_flag(group, field, default, text):
    """One field of a dataclass as one flag of its type, its default at the end of its help."""
    kind = {"int | None": int, "str | None": str, "tuple[int, ...]": int, "tuple[str, ...]": str}.get(
        str(field.type), field.type
    )
    flag, text = "--" + field.name.replace("_", "-"), text.replace("%", "%%")
    if kind is bool:
        shown = f"{text} [{'yes' if default else 'no'}]"
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=shown)
        return
    several = isinstance(field.default, tuple)
    shown = " ".join(map(str, default)) if several else default
    group.add_argument(
        flag,
        type=kind,
        default=default,
        nargs="+" if several else None,
        metavar=kind.__name__.upper(),
        help=text + (f" [{shown}]" if shown not in ("", None) else ""),
    )


def evaluated(run_config, config, steps):
    """The policy that reports measure: that of training, at another length, block and number of steps if asked."""
    length, block = run_config.eval_length or config.completion_length, run_config.eval_block or config.block_length
    # No r_t, which only an update needs.
    return replace(config, completion_length=length, block_length=block, sampling_steps=steps, step_baseline="none")


def check(run_config, config):
    """Combinations that no single dataclass can see. Raises ValueError."""
    allowed = {
        "task": tuple(TINY) if run_config.model == "tiny" else tuple(tasks.TASKS),
        "algorithm": tuple(ALGORITHMS),
        "schedule": ("linear", "cosine", "constant"),
        "eval_split": ("test", "validation"),
        "tracker": ("", "tensorboard", "wandb"),
    }
    for name, values in allowed.items():
        if getattr(run_config, name) not in values:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(run_config, name)}: choose from {', '.join(values)}")
    if not run_config.eval_policies or not set(run_config.eval_policies) <= {"sampled", "greedy"}:
        raise ValueError("--eval-policies: sampled, greedy or both")
    if run_config.model == "tiny" and (run_config.lora_rank or run_config.data or run_config.exclude):
        raise ValueError("--lora-rank, --data and --exclude need a pretrained --model: tiny generates its own")
    if run_config.tracker and importlib.util.find_spec(run_config.tracker) is None:
        raise ValueError(f"--tracker {run_config.tracker} needs {run_config.tracker}: pip install {run_config.tracker}")
    if run_config.evaluate and run_config.resume:
        raise ValueError("--resume continues training, --evaluate measures: choose one")
    for name in ("prompt", "save_completions"):
        if getattr(run_config, name) not in (None, False) and not run_config.evaluate:
            raise ValueError(f"--{name.replace('_', '-')} needs --evaluate RUN: which model should answer?")
    if run_config.prompt is not None and not run_config.prompt.strip():
        raise ValueError("--prompt is empty")
    if config.temperature == 0:
        raise ValueError("--temperature 0 is for evaluation, which uses it anyway: train with a positive temperature")
    if config.unmasking == "low_confidence" and config.top_k and not run_config.evaluate:
        raise ValueError(
            "--unmasking low_confidence needs --top-k 0 --top-p 1: the kept sets of all draws are not stored"
        )
    check_numbers(run_config)
    if run_config.model == "tiny" and config.completion_length < (n := tasks.TASKS[run_config.task].completion_length):
        raise ValueError(f"--completion-length {config.completion_length}: answers to {run_config.task} need {n}")
    for steps in run_config.eval_steps if run_config.evaluate else (*run_config.eval_steps, config.sampling_steps):
        try:
            evaluated(run_config, config, steps)
        except ValueError as error:
            raise ValueError(f"--eval-steps {steps}: {error}") from error


def check_numbers(run_config):
    """Ranges of the numbers of a RunConfig. Raises ValueError."""
    at_least_1 = ("prompts_per_step", "tokens_per_pass", "lora_alpha", "base_batch", "eval_every")
    at_least_0 = ("max_steps", "base_steps", "lora_rank", "eval_length", "eval_block", "eval_prompts")
    for names, least in (((*at_least_1, "save_every"), 1), (at_least_0, 0)):
        for name in names:
            if getattr(run_config, name) < least:
                problem = "must be at least 1" if least else "must not be negative"
                raise ValueError(f"--{name.replace('_', '-')} {problem}")
    for name in ("learning_rate", "base_learning_rate", "gradient_clip"):
        if not 0 < getattr(run_config, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be positive and finite")
    if not 0 <= run_config.base_noise <= 1:
        raise ValueError(f"--base-noise {run_config.base_noise}: in [0, 1]")
    if not 0 <= run_config.weight_decay < math.inf:
        raise ValueError(f"--weight-decay {run_config.weight_decay}: not negative, and finite")
    if not 0 <= run_config.adam_beta2 < 1:
        raise ValueError(f"--adam-beta2 {run_config.adam_beta2}: in [0, 1)")
