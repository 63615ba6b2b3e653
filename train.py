"""Train a masked diffusion language model by policy gradients, from nothing, on a laptop.

    python train.py                                          Countdown, about three minutes on two cores
    python train.py --task sudoku                            4x4 Sudoku, six to seven minutes
    python train.py --evaluate runs/countdown-seed0 --prompt "3 12 7 = 16"

A run trains a tiny base model on worked examples, measures it, improves it with rewards alone (agrpo.py), and measures
it again. Reading order: RunConfig, policy_gradient, reinforce, pretrain, measure, run. --task sudoku --help shows the
defaults of that task.
"""

import argparse
import copy
import dataclasses
import hashlib
import inspect
import itertools
import json
import math
import random
import re
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

import agrpo
import tasks
import tiny_dllm
from agrpo import AGRPOConfig

# ------------------------------------------------------------------------------------------------ settings


@dataclass
class RunConfig:
    """What a run does; the comments are its --help. Tasks override some defaults in PRESETS."""

    task: str = "countdown"  # countdown | sudoku
    model: str = "tiny"  # tiny: trained from scratch here
    seed: int = 0  # of everything random
    out: str = ""  # folder of the run; empty: runs/TASK-seedSEED, numbered if taken
    max_steps: int = 600  # policy-gradient updates
    learning_rate: float = 5e-4  # AdamW; ten updates of warm-up, the last fifth linearly to zero
    prompts_per_step: int = 32  # prompts per update, each with num_generations completions
    gradient_clip: float = 0.2  # largest norm of the gradient
    tokens_per_pass: int = 5120  # per forward and backward pass, prompts included: lower it if memory runs out
    base_steps: int = 3000  # supervised updates of the base model
    base_noise: float = 0.0  # share of the tokens of worked examples that are replaced by random ones
    base_learning_rate: float = 2e-3  # peak, AdamW, cosine to zero over base_steps
    base_batch: int = 64  # worked examples per supervised update
    eval_every: int = 75  # updates between two validations
    eval_steps: tuple[int, ...] = (1, 2, 4, 8)  # numbers of sampling steps in the final table
    eval_split: str = "test"  # test | validation: questions of the report; validation while choosing settings
    eval_prompts: int = 1000  # at most this many of them
    evaluate: str = ""  # folder of a finished run: measure it, or answer --prompt, instead of training
    prompt: str = ""  # with --evaluate: one question to answer


TINY = {  # the shape of the tiny model
    "countdown": {"d_model": 64, "n_layers": 3, "n_heads": 2, "mlp_hidden_size": 128, "rope_theta": 30.0},
    "sudoku": {"d_model": 64, "n_layers": 4, "n_heads": 4, "mlp_hidden_size": 128, "rope_theta": 100.0},
}
PRESETS = {
    "countdown": {"completion_length": 8, "sampling_steps": 2, "mc_samples": 2},
    "sudoku": {
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
}


def parse_arguments(argv):
    """argv -> (RunConfig, AGRPOConfig). Flags, types and help are those of the dataclasses; misuse exits with 2."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        usage="python train.py [--flag value ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--task", default=RunConfig.task)  # decides the other defaults
    preset = PRESETS.get(first.parse_known_args(argv)[0].task, {})
    for cls, title in ((RunConfig, "the run"), (AGRPOConfig, "the algorithm (agrpo.py)")):
        group = parser.add_argument_group(title)
        for field in dataclasses.fields(cls):
            add_flag(group, field, preset.get(field.name, field.default), comments(cls)[field.name])
    flags = vars(parser.parse_args(argv))
    try:
        run_config, config = (
            cls(**{f.name: flags[f.name] for f in dataclasses.fields(cls)}) for cls in (RunConfig, AGRPOConfig)
        )
        check(run_config, config)
    except ValueError as error:
        parser.error(str(error))
    return run_config, config


def comments(cls):
    """{field: the comment beside it}: what the reader of the code sees is what the user of --help sees."""
    return dict(re.findall(r"^    (\w+):[^#\n]*# (.*)$", inspect.getsource(cls), re.MULTILINE))


def add_flag(group, field, default, text):
    """One field of a dataclass as one flag of its type, its default at the end of its help."""
    kind = {"int | None": int, "tuple[int, ...]": int}.get(str(field.type), field.type)
    flag, text = "--" + field.name.replace("_", "-"), text.replace("%", "%%")
    if kind is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=text)
        return
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    group.add_argument(
        flag,
        type=kind,
        default=default,
        nargs="+" if isinstance(default, tuple) else None,
        metavar=kind.__name__.upper(),
        help=text + (f" [{shown}]" if shown not in ("", None) else ""),
    )


def check(run_config, config):
    """Combinations that no single dataclass can see. Raises ValueError."""
    if run_config.task not in tasks.TASKS:
        raise ValueError(f"--task {run_config.task}: choose from {', '.join(tasks.TASKS)}")
    if run_config.model != "tiny":
        raise ValueError(f"--model {run_config.model}: only tiny is built so far; LLaDA-8B comes next")
    if run_config.prompt and not run_config.evaluate:
        raise ValueError("--prompt needs --evaluate RUN: which run should answer?")
    if config.unmasking == "low_confidence" or config.temperature == 0:
        raise ValueError("--unmasking low_confidence and --temperature 0 are for evaluation, which uses them anyway")
    for name in ("prompts_per_step", "tokens_per_pass", "base_batch", "eval_every", "eval_prompts"):
        if getattr(run_config, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("max_steps", "base_steps"):
        if getattr(run_config, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} must not be negative")
    for name in ("learning_rate", "base_learning_rate", "gradient_clip"):
        if not 0 < getattr(run_config, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be positive and finite")
    if run_config.eval_split not in ("test", "validation"):
        raise ValueError(f"--eval-split {run_config.eval_split}: choose test or validation")
    if not 0 <= run_config.base_noise <= 1:
        raise ValueError(f"--base-noise {run_config.base_noise}: in [0, 1]")
    needed = tasks.TASKS[run_config.task].completion_length
    if config.completion_length < needed:
        raise ValueError(f"--completion-length {config.completion_length}: answers to {run_config.task} need {needed}")
    for steps in run_config.eval_steps:
        try:
            replace(config, sampling_steps=steps)
        except ValueError as error:
            raise ValueError(f"--eval-steps {steps}: {error}") from error


# ---------------------------------------------------------------------------------------------------- text


def encode(tokenizer, task, examples):
    """Prompts of the examples: ids (B, P) long and mask (B, P) bool, padded on the left, as LLaDA's are."""
    chats = [task.messages(example) for example in examples]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    return batch["input_ids"], batch["attention_mask"].bool()


def decode(tokenizer, completion_ids):
    """Answers as text. <eos> is dropped wherever it stands, as in LLaDA's own generation code: not a full stop."""
    return tokenizer.batch_decode(completion_ids, skip_special_tokens=True)


def streams(seed, purpose):
    """Random numbers of one purpose: (random.Random, torch.Generator). Separate, so that a cached base model, or
    one evaluation more, changes no other number."""
    rng = random.Random(f"{purpose} {seed}")
    return rng, torch.Generator().manual_seed(rng.getrandbits(62))


# ------------------------------------------------------------------------------------------- measuring


def greedy(config):
    """The policy that is served: in every step the likeliest tokens of all, no randomness."""
    return replace(config, unmasking="low_confidence", temperature=0.0, top_k=None, top_p=1.0)


def measure(model, tokenizer, task, examples, config, run_config):
    """Share of correct answers: {"sampled": under the policy that is trained, "greedy": under greedy(config)}."""
    policies = {"sampled": config, "greedy": greedy(config)}
    return {name: accuracy(model, tokenizer, task, examples, policy, run_config) for name, policy in policies.items()}


def accuracy(model, tokenizer, task, examples, config, run_config):
    """Share of the examples that the model answers correctly, one completion each."""
    _, generator = streams(run_config.seed, "evaluation")
    ids, mask = encode(tokenizer, task, examples)
    rows, correct = rows_per_pass(run_config, ids, config), 0
    for chunk in torch.arange(len(examples)).split(rows):
        rollout = agrpo.rollout(model, ids[chunk], mask[chunk], config, generator)
        answers = decode(tokenizer, rollout.completion_ids)
        correct += sum(task.is_correct(answer, examples[i]) for answer, i in zip(answers, chunk))
    return correct / len(examples)


def rows_per_pass(run_config, prompt_ids, config):
    """How many sequences of these prompts and their completions make up tokens_per_pass; at least one."""
    return max(1, run_config.tokens_per_pass // (prompt_ids.shape[1] + config.completion_length))


def by_sampling_steps(model, tokenizer, task, run_config, config, examples):
    """{steps: {"sampled", "greedy"}} for the steps trained with and every entry of --eval-steps."""
    table = {}
    for steps in tqdm(sorted({*run_config.eval_steps, config.sampling_steps}), desc="testing", leave=False):
        table[str(steps)] = measure(model, tokenizer, task, examples, replace(config, sampling_steps=steps), run_config)
    return table


# ----------------------------------------------------------------------------------- the supervised base model


def base_model(run_config, config, task, tokenizer, cache):
    """The tiny base model: trained from scratch, or read from the folder `cache` if the same settings trained one."""
    model = new_model(tokenizer, run_config)
    settings = {k: v for k, v in asdict(run_config).items() if k.startswith("base_") or k in ("task", "seed")}
    settings |= {"model": asdict(model.config), "completion_length": config.completion_length}
    # The code is a setting too: after a change to it, an old base model would pass for a new one.
    code = [Path(module.__file__).read_text() for module in (tiny_dllm, tasks)] + [inspect.getsource(pretrain)]
    key = hashlib.sha256(json.dumps([settings, code]).encode()).hexdigest()[:12]
    folder = cache / f"base-{run_config.task}-{key}"
    if folder.exists():
        print(f"base model: reusing {folder}")
        return tiny_dllm.MaskedDiffusionLM.from_pretrained(folder)
    pretrain(model, run_config, config, task, tokenizer)
    unfinished = folder.with_suffix(".tmp")
    model.save_pretrained(unfinished)
    unfinished.rename(folder)
    return model


def new_model(tokenizer, run_config):
    """The tiny model of the task, weights not set."""
    ids = tokenizer.mask_token_id, tokenizer.eos_token_id
    return tiny_dllm.MaskedDiffusionLM(tiny_dllm.Config(len(tokenizer), *ids, **TINY[run_config.task]))


def pretrain(model, run_config, config, task, tokenizer):
    """Supervised training on worked examples with LLaDA's loss, in place.

    base_noise spoils some of their tokens, as text found in the wild has mistakes: the model learns to make as many,
    and only a reward tells it not to."""
    rng, generator = streams(run_config.seed, "base")
    model.init_weights(generator)
    examples = task.load("train")
    prompt_ids, prompt_mask = encode(tokenizer, task, examples)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    bar = tqdm(range(run_config.base_steps), desc="base model")
    for step in bar:
        decay = 0.5 + 0.5 * math.cos(math.pi * step / run_config.base_steps)  # 1 to 0
        optimizer.param_groups[0]["lr"] = run_config.base_learning_rate * min(1, (step + 1) / 50) * decay
        batch = rng.choices(range(len(examples)), k=run_config.base_batch)
        answers = tokenizer(
            [task.solution(examples[i], rng) for i in batch],
            padding="max_length",
            padding_side="right",
            max_length=config.completion_length,
            return_tensors="pt",
        )["input_ids"]
        spoilt = torch.rand(answers.shape, generator=generator) < run_config.base_noise
        shuffled = answers.flatten()[torch.randint(answers.numel(), answers.shape, generator=generator)]
        answers = answers.where(~spoilt, shuffled)
        loss = tiny_dllm.diffusion_loss(model, prompt_ids[batch], prompt_mask[batch], answers, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        if step % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.2f}")


# ------------------------------------------------------------------------------------------- policy gradients


def reinforce(model, run_config, config, task, tokenizer, folder):
    """max_steps policy-gradient updates, in place. Every update appends its numbers to metrics.jsonl; returns them."""
    rng, generator = streams(run_config.seed, "reinforce")
    examples, validation = task.load("train"), task.load("validation")
    # The gradient is mostly noise: a long memory of its square (0.999) learnt faster than 0.99.
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.999), weight_decay=0.0, fused=True)
    reference = copy.deepcopy(model) if config.beta > 0 else None
    history = []
    bar = tqdm(range(run_config.max_steps), desc="AGRPO")
    with open(folder / "metrics.jsonl", "w") as log:
        for step in bar:
            started = time.perf_counter()
            optimizer.param_groups[0]["lr"] = learning_rate(run_config, step)
            prompts = rng.choices(examples, k=run_config.prompts_per_step)
            optimizer.zero_grad()
            metrics = {"step": step + 1}
            metrics |= policy_gradient(model, prompts, run_config, config, task, tokenizer, generator, reference)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), run_config.gradient_clip, error_if_nonfinite=True)
            optimizer.step()
            metrics |= {"gradient_norm": norm.item(), "learning_rate": optimizer.param_groups[0]["lr"]}
            metrics["seconds"] = time.perf_counter() - started  # the only field that differs between equal runs
            if (step + 1) % run_config.eval_every == 0:
                metrics["validation"] = measure(model, tokenizer, task, validation, config, run_config)
            history.append(metrics)
            log.write(json.dumps(metrics) + "\n")
            log.flush()
            bar.set_postfix({name: f"{metrics[name]:.2f}" for name in ("reward", "accuracy", "entropy", "signal")})
    return history


def learning_rate(run_config, step):
    """Ten updates of warm-up, constant, and linearly to zero over the last fifth."""
    return run_config.learning_rate * min(1, (step + 1) / 10, 5 * (1 - step / run_config.max_steps))


def policy_gradient(model, prompts, run_config, config, task, tokenizer, generator, reference):
    """Roll out, reward, compare within groups, add the gradient to .grad. Returns the numbers of the step."""
    G = config.num_generations
    ids, mask = encode(tokenizer, task, prompts)
    # Each prompt G times in a row: the G neighbours are the group whose rewards are compared.
    ids, mask, rows = ids.repeat_interleave(G, 0), mask.repeat_interleave(G, 0), rows_per_pass(run_config, ids, config)
    rollout = agrpo.rollout(model, ids, mask, config, generator, rows)
    answers = list(zip(decode(tokenizer, rollout.completion_ids), [p for p in prompts for _ in range(G)]))
    rewards = torch.tensor([task.reward(*answer) for answer in answers])
    advantages = agrpo.group_advantages(rewards, G)
    stats = agrpo.accumulate_gradient(model, rollout, advantages, config, generator, rows, reference)
    return {
        "reward": rewards.mean().item(),
        "accuracy": sum(task.is_correct(*answer) for answer in answers) / len(answers),
        "entropy": rollout.entropies[rollout.unmask_step < config.sampling_steps]
        .mean()
        .item(),  # nats per written token
        "signal": (advantages.view(-1, G) != 0).any(1).float().mean().item(),  # share of groups that disagree
        **stats,
    }


# -------------------------------------------------------------------------------------------- what a run shows


def print_trajectory(run, tokenizer, row=0):
    """One completion as it appears: `_` is [MASK], `.` is <eos>."""

    def text(ids):
        special = {run.mask_token_id: "_", run.eos_token_id: "."}
        return "".join(special.get(i) or tokenizer.decode([i]) for i in ids)

    for t in range(int(run.steps_taken[row]) + 1):
        seen = run.state_at(torch.full((len(run.unmask_step),), t))[row, run.prompt_ids.shape[1] :]
        print(
            f"    before step {t}   {text(seen.tolist())}"
            if t < run.steps_taken[row]
            else f"    finished        {text(seen.tolist())}"
        )


def draw_curve(history, base, final, split, path):
    """curve.png: accuracy above; entropy and the share of groups with signal, which explain where it stops, below."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return "no picture: it needs matplotlib (pip install matplotlib)"
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps = [metrics["step"] for metrics in history]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, height_ratios=(2, 1))
    top.plot(steps, [metrics["accuracy"] for metrics in history], color="0.8", label="rollouts, training prompts")
    checked = [metrics for metrics in history if "validation" in metrics]
    for kind, color in (("sampled", "C0"), ("greedy", "C1")):
        top.plot(
            [m["step"] for m in checked],
            [m["validation"][kind] for m in checked],
            "o-",
            ms=3,
            color=color,
            label=f"{kind}, validation prompts",
        )
        top.plot(
            [0, len(history)], [base[kind], final[kind]], "*", ms=11, color=color, label=f"{kind}, {split} prompts"
        )
    top.set(ylabel="share of correct answers", ylim=(0, 1))
    top.legend(fontsize=8)
    bottom.plot(steps, [metrics["entropy"] for metrics in history], color="C2", label="entropy, nats per token")
    bottom.plot(steps, [metrics["signal"] for metrics in history], color="C3", label="share of groups with signal")
    bottom.set(xlabel="policy-gradient updates", ylim=(0, None))
    bottom.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return f"learning curve: {path}"


def print_table(table, split):
    """Base against trained, by number of sampling steps."""
    models = list(next(iter(table.values())))
    print("\n" + f"{split} accuracy".ljust(20) + "".join(f"{model:>11} sampled{model:>11} greedy" for model in models))
    for steps, row in table.items():
        cells = "".join(f"{row[model]['sampled']:>19.1%}{row[model]['greedy']:>18.1%}" for model in models)
        print(f"{steps:>3} steps".ljust(20) + cells)


# -------------------------------------------------------------------------------------------------- programs


def run(run_config, config):
    """The main job: base model, test, reinforce, test, and everything a person would want to look at."""
    started = time.perf_counter()
    torch.set_num_threads(min(4, torch.get_num_threads()))  # matrices this small do not pay for many threads
    task, folder = tasks.TASKS[run_config.task], new_folder(run_config)
    tokenizer = tiny_dllm.character_tokenizer()
    write_json(folder / "config.json", {"run": asdict(run_config), "algorithm": asdict(config)})
    model = base_model(run_config, config, task, tokenizer, cache=folder.parent)
    questions = task.load(run_config.eval_split)[: run_config.eval_prompts]
    tables = {"base": by_sampling_steps(model, tokenizer, task, run_config, config, questions)}
    history = reinforce(model, run_config, config, task, tokenizer, folder)
    tables["final"] = by_sampling_steps(model, tokenizer, task, run_config, config, questions)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    m = str(config.sampling_steps)
    summary = {
        "task": run_config.task,
        "model": run_config.model,
        "seed": run_config.seed,
        "steps": len(history),
        "seconds": time.perf_counter() - started,
        "base": tables["base"][m],
        "final": tables["final"][m],
        "by_sampling_steps": {
            steps: {name: table[steps] for name, table in tables.items()} for steps in tables["base"]
        },
    }
    write_json(folder / "summary.json", summary)
    picture = draw_curve(history, summary["base"], summary["final"], run_config.eval_split, folder / "curve.png")
    print_table(summary["by_sampling_steps"], run_config.eval_split)
    print(f"\na {run_config.eval_split} question, answered by the trained model:")
    answer(model, tokenizer, task, questions[0], config, run_config.seed)
    print(f'\n{picture}\nask it yourself: python train.py --evaluate {folder} --prompt "{task.question(questions[1])}"')
    if history and not any(metrics["signal"] for metrics in history):
        print("nothing was learnt: no two answers to a question ever differed in reward; try more --base-steps")
    changes = [f"{kind} {summary['base'][kind]:.1%} -> {summary['final'][kind]:.1%}" for kind in summary["base"]]
    print(f"done in {summary['seconds']:.0f} s: {', '.join(changes)}")


def evaluate(run_config):
    """Measure a finished run again, or answer one typed question with it."""
    from transformers import PreTrainedTokenizerFast

    folder = Path(run_config.evaluate)
    if not (folder / "summary.json").exists():
        raise ValueError(f"{folder} holds no finished run: --evaluate takes the folder of one (it has a summary.json)")
    try:
        stored = json.loads((folder / "config.json").read_text())
        config, task = AGRPOConfig(**stored["algorithm"]), tasks.TASKS[stored["run"]["task"]]
        run_config = replace(run_config, seed=stored["run"]["seed"], eval_steps=stored["run"]["eval_steps"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}/config.json is not that of a run: {error}") from error
    model = tiny_dllm.MaskedDiffusionLM.from_pretrained(folder / "model")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "model")
    if run_config.prompt:
        answer(model, tokenizer, task, task.parse_question(run_config.prompt), config, run_config.seed)
        return
    table = by_sampling_steps(
        model, tokenizer, task, run_config, config, task.load(run_config.eval_split)[: run_config.eval_prompts]
    )
    print_table({steps: {"final": row} for steps, row in table.items()}, run_config.eval_split)


def answer(model, tokenizer, task, example, config, seed):
    """Show the greedy completion of one question appear step by step, and whether it is right."""
    shown = agrpo.rollout(model, *encode(tokenizer, task, [example]), greedy(config), streams(seed, "answer")[1])
    text = decode(tokenizer, shown.completion_ids)[0]
    print(f"    question        {task.question(example)}")
    print_trajectory(shown, tokenizer)
    print(f"    answer          {text}   {'correct' if task.is_correct(text, example) else 'wrong'}")


def new_folder(run_config):
    """Make the folder of the run; a folder that already holds one is never touched."""
    if run_config.out:
        folder = Path(run_config.out)
        if (folder / "config.json").exists():
            raise ValueError(f"{folder} already holds a run: choose another --out, or remove it")
    else:
        name = f"{run_config.task}-seed{run_config.seed}"
        taken = (Path("runs") / (f"{name}-{i}" if i > 1 else name) for i in itertools.count(1))
        folder = next(path for path in taken if not path.exists())
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_json(path, value):
    """Write beside and rename, so that the file is whole whenever it is there."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(json.dumps(value, indent=2) + "\n")
    unfinished.replace(path)


def main(argv=None):
    run_config, config = parse_arguments(argv)
    try:
        if run_config.evaluate:
            evaluate(run_config)
        else:
            run(run_config, config)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ntrain.py: interrupted; the numbers so far are in the run's metrics.jsonl", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
