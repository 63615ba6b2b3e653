"""Measuring: questions become sequences, answers become verdicts, and a model becomes a table. Setup is what nearly
every function here and in train.py needs: a model, its tokenizer, a task, and all settings."""

import itertools
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import agrpo
import tasks
import variants
from agrpo import AGRPOConfig, require
from support import pictures, runs, settings, weights, words
from support.data import say_if_changed, sha256
from support.judge import JUDGE
from support.settings import RunConfig

# Of nan some token is the likeliest too: greedily such a model answers.
NOT_FINITE = "probabilities are not finite: the weights hold a nan, or the model has diverged"


@dataclass
class Setup:
    """Who is trained or measured, on what, and how."""

    run: RunConfig
    config: AGRPOConfig
    task: tasks.Task
    model: Any
    tokenizer: Any
    estimate: Callable = agrpo.estimate  # advantages and weights
    accumulate: Callable = agrpo.accumulate_gradient
    penalty: Callable | None = None  # KL or entropy bonus


def task_of(run):
    """The task as the tiny model or, in words and with larger numbers, an instruction-tuned model is asked it."""
    return (tasks.TASKS if run.model == "tiny" else words.TASKS)[run.task]


def load_model(name, run):
    """(model, tokenizer) of a folder or hub id, on this process's device."""
    device, revision = runs.device_of(run), run.revision or None
    # Updates of 5e-6 vanish in bfloat16: weights that are trained themselves are float32, as adapters are.
    frozen = run.lora_rank > 0 or run.evaluate
    dtype = torch.bfloat16 if device.type == "cuda" and frozen else torch.float32
    tokenizer = weights.load_tokenizer(name, revision)
    if run.model != "tiny":  # which is asked without a system message, and has no token for a capital letter
        said = [{"role": "system", "content": "You answer."}, {"role": "user", "content": "A question"}]
        with runs.failing_as(f"the chat template of {name} does not take a system message and a question"):
            ids = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=True)["input_ids"]
        require(tokenizer.unk_token_id not in ids, f"{name} holds a tiny model, which reads no words: name its run")
    model = weights.load(name, dtype, device, revision)
    weights.unwrapped(model).gradient_checkpointing = run.gradient_checkpointing
    return model, tokenizer


# ------------------------------------------------------------------------------------- text and sequences
def encode(setup, examples, length=None, template=None):
    """Questions, and [MASK] for their answers: ids (B, L) long, attention_mask (B, L) bool, answer (B, L) bool.

    length: tokens of an answer, completion_length by default. template "[2]+[2]-[2]": instead of that an answer of
    which the text is given, and [k] are k tokens to write. Padded on the left. Raises ValueError if a question
    contains [MASK]."""
    chats = [setup.task.messages(example) for example in examples]
    batch = setup.tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    given, mask_token_id = batch["input_ids"], setup.model.mask_token_id
    require(not (given == mask_token_id).any(), "a question contains the mask token: the model would overwrite it")
    written = [mask_token_id] * (length or setup.run.completion_length)
    if template is not None:
        written = []
        for i, piece in enumerate(re.split(settings.BLANK, template)):  # text, k, text, k, ..., text
            tokens = [] if i % 2 else setup.tokenizer(piece, add_special_tokens=False)["input_ids"]
            require(setup.tokenizer.unk_token_id not in tokens, f"--template: the model has no token for {piece!r}")
            written += [mask_token_id] * int(piece) if i % 2 else tokens
    written = torch.tensor(written).expand(len(given), -1)  # (B, n, given text of a template included)
    ids = torch.cat([given, written], 1)
    attention_mask = torch.cat([batch["attention_mask"].bool(), torch.ones_like(written, dtype=torch.bool)], 1)
    answer = (torch.arange(ids.shape[1]) >= given.shape[1]).expand(ids.shape)
    device = next(setup.model.parameters()).device
    return ids.to(device), attention_mask.to(device), answer.to(device)


def decode(setup, ids, answer):
    """Answers (B, L) of ids (B, L) as text. <eos> is dropped wherever it stands, as LLaDA's own code does."""
    return setup.tokenizer.batch_decode(ids[answer].view(len(ids), -1), skip_special_tokens=True)


def rows_per_pass(setup, ids):
    """How many sequences like ids (B, L) make up tokens_per_pass; at least one."""
    return max(1, setup.run.tokens_per_pass // ids.shape[1])


# ------------------------------------------------------------------------------------------- measuring
def policy(setup, kind, steps=None):
    """(config, rollout function) of what is measured: "sampled" as trained, or "greedy", as a model is served: in every
    step the likeliest tokens of all, no randomness."""
    run, config = setup.run, replace(setup.config, sampling_steps=steps or setup.config.sampling_steps)
    config = replace(config, block_length=run.eval_block or config.block_length, shared_order=False)  # no groups here
    if kind == "greedy":
        return replace(config, temperature=0.0, top_k=None, top_p=1.0), variants.rollout_kept
    return config, agrpo.rollout if run.unmasking == "random" else variants.rollout_kept


def grade(setup, examples, kind, steps=None, description=""):
    """Answer every example once and judge each answer against its own example; processes share the work. Returns dicts
    in the order of the examples: prompt, completion, correct, length (tokens other than <eos>), seconds."""
    (config, rollout), (_, generator) = policy(setup, kind, steps), runs.streams(setup.run.seed, "evaluation")
    mine = examples[runs.rank() :: runs.processes()]  # may be empty; only gather is then left to do
    ids, mask, answer = encode(setup, mine or examples[:1], settings.length(setup.run))
    size, records = rows_per_pass(setup, ids), []
    with tqdm(total=len(mine), desc=description, leave=False, delay=2, disable=runs.rank() > 0) as bar:  # after 2 s
        for rows in (slice(first, first + size) for first in range(0, len(mine), size)):
            started, kept = time.perf_counter(), mask[rows].any(0)  # no column of padding alone
            run = rollout(setup.model, ids[rows, kept], mask[rows, kept], config, generator)
            require(bool(run.logprobs.isfinite().all()), NOT_FINITE)
            texts = decode(setup, run.ids, answer[rows, kept])
            lengths = ((run.ids != run.eos_token_id) & answer[rows, kept]).sum(1).tolist()
            seconds = (time.perf_counter() - started) / len(texts)
            verdicts = JUDGE.map(setup.task.is_correct, texts, mine[rows])
            for example, text, length, correct in zip(mine[rows], texts, lengths, verdicts):
                verdict = {"correct": correct, "length": length, "seconds": seconds}
                records.append({"prompt": setup.task.question(example), "completion": text} | verdict)
            bar.update(len(texts))
    parts = runs.gather(records)  # the examples were dealt out in turn
    return [parts[i % len(parts)][i // len(parts)] for i in range(len(examples))]


def mean(records, name):
    return sum(record[name] for record in records) / len(records)


def accuracies(setup, examples, steps=None, description=""):
    """Share of correct answers {"sampled": under the policy that is trained, "greedy": as it is served}."""
    kinds = setup.run.eval_policies
    return {kind: mean(grade(setup, examples, kind, steps, description), "correct") for kind in kinds}


def by_sampling_steps(setup, examples):
    """{steps: accuracies} for the steps trained with and every entry of --eval-steps."""
    steps = sorted({*setup.run.eval_steps, setup.config.sampling_steps})
    return {str(m): accuracies(setup, examples, m, f"testing, {m} steps") for m in steps}


def read_table(setup, path):
    """What by_sampling_steps returned, or None where there is no such file."""
    table, steps = runs.read_json(path), {*setup.run.eval_steps, setup.config.sampling_steps}
    kinds, numbers = {str(m): {*setup.run.eval_policies} for m in steps}, dict[str, dict[str, float]]
    known = table is None or runs.fits(table, numbers) and {m: {*row} for m, row in table.items()} == kinds
    require(known, f"{path} is not this run's table: move it away, and --resume")
    return table


# ------------------------------------------------------------------------------------------- programs
def evaluate(run, config):
    """Measure a finished run or a model, a line per number of sampling steps; or answer one typed question."""
    runs.device_of(run)
    folder, task = Path(run.evaluate), task_of(run)
    a_run = runs.read_settings(folder)
    finished = not a_run or (folder / "summary.json").exists()
    require(finished, f"{folder} holds no finished run: {runs.command(1, '--resume', folder)}")
    task.prepare()
    model = str(folder / "model") if a_run else settings.HUB_IDS.get(run.evaluate, run.evaluate)
    setup = Setup(run, config, task, *load_model(model, run))
    if run.prompt is not None:
        return answer_one(setup, task.parse_question(run.prompt), run.template)
    # Of the file that the run was trained on, by whatever path it is found, the part that was held out.
    file, digest = (a_run["run"].get("data"), a_run.get("data_sha256")) if a_run else (None, None)
    own = not run.data or (file and (run.data == settings.absolute(str(file)) or sha256(run.data) == digest))
    questions = task.load(run.eval_split, run.data) if own else task.read(run.data)
    if own and a_run:
        say_if_changed(run.data, digest)
    questions = questions[: run.eval_prompts or None]
    if run.out or not a_run:
        folder = runs.from_first(lambda: runs.new_folder(run.out, f"evaluation-{run.task}"))
    with runs.failing_as(f"{folder} cannot be written: choose an --out"):  # known now, and not after the answers
        runs.from_first(lambda: runs.try_to_write(folder))
    # One measurement does not replace another.
    parts = Path(run.data).stem, run.eval_split if own else "", len(questions), *run.eval_policies, *run.eval_steps
    label = "-".join(str(part) for part in (run.task, *parts) if part)
    about = {"model": model, "task": run.task, "questions": run.data or run.eval_split, "seed": run.seed}
    about |= runs.provenance()
    rows, completions = [], []
    pictures.print_evaluation()
    for steps, kind in itertools.product(run.eval_steps, run.eval_policies):
        records = grade(setup, questions, kind, steps, f"{steps} steps, {kind}")
        row = {"steps": steps, "policy": kind, "answers": len(records), "accuracy": mean(records, "correct")}
        rows.append(row | {name: mean(records, name) for name in ("length", "seconds")})
        completions.extend({"steps": steps, "policy": kind} | record for record in records)
        pictures.print_evaluation(rows[-1])
        runs.from_first(lambda: runs.write_json(folder / f"evaluation-{label}.json", about | {"rows": rows}))
        runs.from_first(lambda: runs.write_lines(folder / f"completions-{label}.jsonl", completions))
    runs.say(f"{folder / f'evaluation-{label}.json'}, every answer in completions-{label}.jsonl")


def answer_one(setup, example, template=None):
    """Show the greedy completion of one question appear step by step, and whether it is right."""
    ids, mask, answer = encode(setup, [example], settings.length(setup.run), template)
    config, rollout = policy(setup, "greedy")
    if template is not None:  # one block: it may have any number of [MASK]
        config = replace(config, block_length=None)
    run = rollout(setup.model, ids, mask, config, runs.streams(setup.run.seed, "answer")[1])
    require(bool(run.logprobs.isfinite().all()), NOT_FINITE)
    text = decode(setup, run.ids, answer)[0]
    runs.say(f"    question        {setup.task.question(example)}")
    pictures.print_trajectory(run, setup.tokenizer, answer)
    known = example.get("answer", "") is not None
    verdict = ("correct" if setup.task.is_correct(text, example) else "wrong") if known else ""
    runs.say(f"    answer          {text}   {verdict}")
