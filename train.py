"""Train a masked diffusion language model by policy gradients: a tiny one on a laptop, LLaDA-8B on a GPU.

    python train.py                                          tiny, Countdown: three minutes on two CPU cores
    python train.py --task sudoku                            tiny, 4x4 Sudoku: six minutes
    python train.py --model llada --task countdown           LLaDA-8B-Instruct with LoRA; also gsm8k, math, sudoku
    python train.py --resume runs/countdown-seed0            continue a run that was stopped or killed
    python train.py --evaluate runs/countdown-seed0 --prompt "3 12 7 = 16"
    python train.py --evaluate llada --task gsm8k --eval-steps 32 64 128

A run measures the base model (the tiny one is trained first), improves it with rewards alone (agrpo.py), and measures
it again. Reading order: settings.RunConfig, then policy_gradient, update, reinforce, pretrain, grade, run. --model and
--task choose the defaults that --help shows.
"""

import copy
import hashlib
import inspect
import json
import math
import os
import random
import shlex
import shutil
import signal
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

import agrpo
import runs
import tasks
import tiny_dllm
from settings import HUB_IDS, TINY, evaluated, parse_arguments

# ------------------------------------------------------------------------------------------- models and text


def load_model(name, run_config):
    """(model, tokenizer) of a folder or hub id, on this process's device."""
    device, revision = device_of(run_config), run_config.revision or None
    # Updates of 5e-6 vanish in bfloat16: weights that are trained themselves are float32, as adapters are.
    frozen = run_config.lora_rank > 0 or run_config.evaluate
    dtype = torch.bfloat16 if device.type == "cuda" and frozen else torch.float32
    tokenizer = tiny_dllm.load_tokenizer(name, revision)
    model = tiny_dllm.load(name, dtype, device, revision)
    unwrapped(model).gradient_checkpointing = run_config.gradient_checkpointing
    return model, tokenizer


def pretrained_model(run_config):
    """(run_config, model, tokenizer) of a run that starts from published weights: with a new LoRA adapter, or the one
    that --model holds. The run_config then names the commit and the adapter's sizes, as config.json shall."""
    model, tokenizer = load_model(HUB_IDS.get(run_config.model, run_config.model), run_config)
    if model is not unwrapped(model):
        adapter = model.peft_config["default"]
        return replace(run_config, lora_rank=adapter.r, lora_alpha=adapter.lora_alpha), model, tokenizer
    run_config = replace(run_config, revision=model.revision or run_config.revision)
    if run_config.lora_rank:
        _, generator = streams(run_config.seed, "LoRA", common=True)
        model = tiny_dllm.add_lora(model, run_config.lora_rank, run_config.lora_alpha, generator)
    return run_config, model, tokenizer


def unwrapped(model):
    """The MaskedDiffusionLM itself, also inside a LoRA adapter."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def device_of(run_config):
    """Where the model lives: a GPU if there is one, but tiny models are faster, and exactly repeatable, on a CPU."""
    cuda = run_config.model != "tiny" and torch.cuda.is_available()
    return runs.start_processes("cuda" if cuda else "cpu")


def task_of(run_config):
    """The task as the tiny model or, in words and with larger numbers, an instruction-tuned model is asked it."""
    return (tasks.TASKS if run_config.model == "tiny" else tasks.CHAT_TASKS)[run_config.task]


def encode(tokenizer, task, examples, device="cpu"):
    """Prompts of the examples: ids (B, P) long and mask (B, P) bool, padded on the left, as LLaDA's are."""
    chats = [task.messages(example) for example in examples]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    return batch["input_ids"].to(device), batch["attention_mask"].bool().to(device)


def decode(tokenizer, completion_ids):
    """Answers as text. <eos> is dropped wherever it stands, as in LLaDA's own generation code: not a full stop."""
    return tokenizer.batch_decode(completion_ids, skip_special_tokens=True)


def streams(seed, purpose, common=False):
    """Random numbers of one purpose: (random.Random, torch.Generator). Separate, so that a cached base model, or
    one evaluation more, changes no other number. All processes have the same Random, which chooses prompts, and each
    a Generator of its own, which draws completions, unless that is to be common too."""
    rng = random.Random(f"{purpose} {seed}")
    draws = rng.getrandbits(62)
    if runs.rank() and not common:
        draws = random.Random(f"{purpose} {seed} process {runs.rank()}").getrandbits(62)
    return rng, torch.Generator().manual_seed(draws)


# ------------------------------------------------------------------------------------------- measuring


def greedy(config):
    """The policy that is served: in every step the likeliest tokens of all, no randomness."""
    return replace(config, unmasking="low_confidence", temperature=0.0, top_k=None, top_p=1.0)


def grade(model, tokenizer, task, examples, config, run_config, description):
    """Answer every example once and judge each answer against its own example; processes share the work.

    Returns dicts in the order of the examples: prompt, completion, correct, length (tokens other than <eos>), seconds.
    """
    _, generator = streams(run_config.seed, "evaluation")
    mine = range(runs.rank(), len(examples), runs.processes())  # may be empty; only gather is then left to do
    ids, mask = encode(tokenizer, task, [examples[i] for i in mine or [0]], next(model.parameters()).device)
    rows, records = rows_per_pass(run_config, ids, config), {}
    # A bar where it takes more than two seconds.
    with tqdm(total=len(mine), desc=description, leave=False, delay=2, disable=runs.rank() > 0) as bar:
        for chunk in torch.arange(len(mine)).split(rows) if mine else ():
            started = time.perf_counter()
            width = int(mask[chunk].sum(1).max())  # no column of padding alone
            run = agrpo.rollout(model, ids[chunk, -width:], mask[chunk, -width:], config, generator)  # (rows, width)
            answers = decode(tokenizer, run.completion_ids)
            lengths = (run.completion_ids != model.eos_token_id).sum(1).tolist()
            seconds = (time.perf_counter() - started) / len(chunk)
            for j, answer, length in zip(chunk.tolist(), answers, lengths):
                example = examples[mine[j]]
                verdict = {"correct": task.is_correct(answer, example), "length": length, "seconds": seconds}
                records[mine[j]] = {"prompt": task.question(example), "completion": answer} | verdict
            bar.update(len(chunk))
    merged = {i: record for part in runs.gather(records) for i, record in part.items()}
    return [merged[i] for i in range(len(examples))]


def mean(records, name):
    return sum(record[name] for record in records) / len(records)


def accuracies(model, tokenizer, task, examples, config, run_config, description):
    """Share of correct answers {"sampled": under the policy that is trained, "greedy": under greedy(config)}."""
    policies = {"sampled": config, "greedy": greedy(config)}
    return {
        name: mean(grade(model, tokenizer, task, examples, policies[name], run_config, description), "correct")
        for name in run_config.eval_policies
    }


def by_sampling_steps(model, tokenizer, task, run_config, config, examples):
    """{steps: accuracies} for the steps trained with and every entry of --eval-steps."""
    table = {}
    for steps in sorted({*run_config.eval_steps, config.sampling_steps}):
        policy, description = evaluated(run_config, config, steps), f"testing, {steps} steps"
        table[str(steps)] = accuracies(model, tokenizer, task, examples, policy, run_config, description)
    return table


def rows_per_pass(run_config, prompt_ids, config):
    """How many sequences of these prompts and their completions make up tokens_per_pass; at least one."""
    return max(1, run_config.tokens_per_pass // (prompt_ids.shape[1] + config.completion_length))


# ----------------------------------------------------------------------------------- the supervised base model


def base_model(run_config, config, task, cache):
    """(model, tokenizer): the tiny base model, trained here, or read from `cache` if the same settings trained one."""
    tokenizer = tiny_dllm.character_tokenizer()
    model = new_model(tokenizer, run_config)
    settings = {k: v for k, v in asdict(run_config).items() if k.startswith("base_") or k in ("task", "seed")}
    settings |= {"model": asdict(model.config), "completion_length": config.completion_length}
    # The code is a setting too: after a change to it, an old base model would pass for a new one.
    code = [Path(module.__file__).read_text() for module in (tiny_dllm, tasks)]
    code += [inspect.getsource(function) for function in (pretrain, new_model, encode, streams)]
    key = hashlib.sha256(json.dumps([settings, code]).encode()).hexdigest()[:12]
    folder = cache / f"base-{run_config.task}-{key}"

    def make():
        if folder.exists():
            return runs.say(f"base model: reusing {folder}")
        pretrain(model, run_config, config, task, tokenizer)
        unfinished = folder.with_suffix(f".{os.getpid()}.tmp")
        model.save_pretrained(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:  # another run, started at the same time, was faster
            shutil.rmtree(unfinished)

    runs.from_first(make)
    return tiny_dllm.load(folder), tokenizer


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


def reinforce(model, run_config, config, task, tokenizer, train, validation, folder, started):
    """Policy-gradient updates up to max_steps, in place, from the newest checkpoint. Every update appends its numbers
    to metrics.jsonl. Ctrl-C and SIGTERM end it after a last checkpoint. Returns the numbers of all updates, and the
    seconds that the run had taken before it was resumed."""
    rng, generator = streams(run_config.seed, "reinforce")
    parameters = list(runs.trainable(model).values())
    optimizer = torch.optim.AdamW(
        parameters, betas=(0.9, run_config.adam_beta2), weight_decay=run_config.weight_decay, fused=True
    )
    reference = frozen_copy(model) if config.beta > 0 else None
    done, seconds_before = runs.load_checkpoint(folder, model, optimizer, rng, generator)
    history = runs.from_first(lambda: runs.rewind_metrics(folder / "metrics.jsonl", done))
    track = runs.Tracker(run_config.tracker, folder, asdict(run_config) | asdict(config), done)
    steps = tqdm(
        range(done, run_config.max_steps),
        desc="AGRPO",
        initial=done,
        total=run_config.max_steps,
        disable=runs.rank() > 0,
    )
    with track, runs.finish_what_was_begun() as stop:
        for step in steps:
            optimizer.param_groups[0]["lr"] = learning_rate(run_config, step)
            prompts = rng.choices(train, k=run_config.prompts_per_step)
            metrics = {"step": step + 1}
            metrics |= update(model, prompts, optimizer, run_config, config, task, tokenizer, generator, reference)
            if (step + 1) % run_config.eval_every == 0:
                policy = evaluated(run_config, config, config.sampling_steps)
                metrics["validation"] = accuracies(model, tokenizer, task, validation, policy, run_config, "validating")
            history.append(metrics)
            runs.append_line(folder / "metrics.jsonl", metrics)
            track(step + 1, metrics)
            steps.set_postfix({name: f"{metrics[name]:.2f}" for name in ("reward", "accuracy", "entropy", "signal")})
            stopped = any(runs.gather(bool(stop)))
            if (step + 1) % run_config.save_every == 0 or step + 1 == run_config.max_steps or stopped:
                elapsed = seconds_before + time.perf_counter() - started
                runs.save_checkpoint(folder, step + 1, elapsed, model, optimizer, rng, generator)
            if stopped:
                raise KeyboardInterrupt(f"continue with: {runs.command()} --resume {folder}")
    return history, seconds_before


def allowed(examples, task, run_config):
    """The examples without those that --exclude holds back for a later test."""
    held = {task.key(example) for example in task.read(run_config.exclude)} if run_config.exclude else set()
    kept = [example for example in examples if task.key(example) not in held]
    if not kept:
        raise ValueError(f"there is nothing to train on (--exclude {run_config.exclude or 'is empty'})")
    return kept


def frozen_copy(model):
    """The reference policy of the KL term, as a callable: under LoRA the same weights with the adapter off."""
    if not hasattr(model, "peft_config"):
        return copy.deepcopy(model)

    def reference(*inputs, **options):
        with model.disable_adapter():
            return model(*inputs, **options)

    return reference


def learning_rate(run_config, step):
    """linear: ten updates of warm-up, constant, to zero over the last fifth. cosine: 1% of warm-up, half a cosine."""
    share = step / run_config.max_steps
    if run_config.schedule == "constant":
        return run_config.learning_rate
    if run_config.schedule == "cosine":
        return run_config.learning_rate * min(
            (step + 1) / (0.01 * run_config.max_steps), 0.5 + 0.5 * math.cos(math.pi * share)
        )
    return run_config.learning_rate * min(1, (step + 1) / 10, 5 * (1 - share))


def update(model, prompts, optimizer, run_config, config, task, tokenizer, generator, reference):
    """One optimizer step on the prompts, shared among the processes. Returns its numbers."""
    begun = time.perf_counter()
    optimizer.zero_grad()
    mine = prompts[runs.rank() :: runs.processes()]
    share = len(mine) / len(prompts)
    metrics = policy_gradient(model, mine, run_config, config, task, tokenizer, generator, reference)
    parameters = optimizer.param_groups[0]["params"]
    runs.average_gradients(parameters, share)
    norm = torch.nn.utils.clip_grad_norm_(parameters, run_config.gradient_clip, error_if_nonfinite=True)
    optimizer.step()
    metrics = runs.merge_metrics(metrics, share)
    metrics |= {"gradient_norm": norm.item(), "learning_rate": optimizer.param_groups[0]["lr"]}
    metrics["seconds"] = time.perf_counter() - begun  # the only field that differs between equal runs
    return metrics


def policy_gradient(model, prompts, run_config, config, task, tokenizer, generator, reference):
    """Roll out, reward, compare within groups, add the gradient to .grad. Returns the numbers of the step."""
    G, chat = config.num_generations, run_config.model != "tiny"
    ids, mask = encode(tokenizer, task, prompts, next(model.parameters()).device)
    # Each prompt G times in a row: the G neighbours are the group whose rewards are compared.
    ids, mask = ids.repeat_interleave(G, 0), mask.repeat_interleave(G, 0)  # (prompts, P) -> (B, P)
    rows = rows_per_pass(run_config, ids, config)
    rollout = agrpo.rollout(model, ids, mask, config, generator, rows)
    answers = list(zip(decode(tokenizer, rollout.completion_ids), [p for p in prompts for _ in range(G)]))
    rewards = torch.tensor([task.reward(*answer, chat=chat) for answer in answers])  # R (B,)
    advantages = agrpo.group_advantages(rewards, G)  # A (B,)
    signal = (advantages.view(-1, G) != 0).any(1)  # (prompts,)
    if config.step_baseline != "none":
        gate = config.step_baseline == "ramp"
        asked = signal | (not gate)  # (prompts,): where all agree, the gate makes r_t count for nothing
        r = step_rewards(rollout, tokenizer, task, prompts, chat, asked)  # (B, m)
        c = agrpo.step_coefficients(config)  # (m,)
        advantages = agrpo.stepwise_advantages(rewards, r, rollout.steps_taken.cpu(), G, c, gate)  # A_t (B, m)
    stats = agrpo.accumulate_gradient(model, rollout, advantages, config, generator, rows, reference)
    written = rollout.unmask_step < config.sampling_steps  # (B, n): not what an early stop filled in
    return {
        "reward": rewards.mean().item(),
        "accuracy": sum(task.is_correct(*answer) for answer in answers) / len(answers),
        "entropy": rollout.entropies[written].mean().item(),  # nats per written token
        "signal": signal.float().mean().item(),  # share of groups that disagree
        **stats,
    }


def step_rewards(rollout, tokenizer, task, prompts, chat, asked):
    """r_t (B, m): the reward of the greedy completion of each state, 0 for prompts that are not asked for (prompts,).

    Equal answers to a prompt are judged once."""
    batch, m, n = rollout.greedy_ids.shape
    prompt = torch.arange(len(prompts)).repeat_interleave(batch // len(prompts))  # (B,) index
    rows = torch.cat([prompt.view(-1, 1, 1).expand(batch, m, 1), rollout.greedy_ids.cpu()], 2)[asked[prompt]]
    distinct, index = rows.view(-1, 1 + n).unique(dim=0, return_inverse=True)  # (D, 1 + n)
    answers = zip(decode(tokenizer, distinct[:, 1:]), distinct[:, 0].tolist())
    rewards = torch.tensor([task.reward(answer, prompts[i], chat=chat) for answer, i in answers])  # (D,)
    r = torch.zeros(batch, m)
    if len(rewards):
        r[asked[prompt]] = rewards[index].view(-1, m).to(r.dtype)
    return r


# -------------------------------------------------------------------------------------------------- programs


def run(run_config, config):
    """The main job: base model, test, reinforce, test, and everything a person would want to look at."""
    started = time.perf_counter()
    device_of(run_config)
    if run_config.resume and (Path(run_config.resume) / "summary.json").exists():
        return runs.say(f"{run_config.resume} is finished: {runs.command(1)} --evaluate {run_config.resume}")
    if run_config.prompts_per_step < runs.processes():
        raise ValueError(f"--prompts-per-step {run_config.prompts_per_step}: each process needs a prompt of its own")
    torch.set_num_threads(min(4, torch.get_num_threads()))  # matrices this small do not pay for many threads
    # Whatever may be missing is missed now, and not after hours, nor with a folder left behind.
    task = task_of(run_config)
    task.prepare()
    split = {name: task.load(name, run_config.data) for name in {"train", "validation", run_config.eval_split}}
    train, validation = allowed(split["train"], task, run_config), some(split["validation"], run_config)
    questions = some(split[run_config.eval_split], run_config)
    if run_config.model != "tiny":
        run_config, model, tokenizer = pretrained_model(run_config)
    folder = runs.from_first(lambda: run_folder(run_config, config))
    if run_config.model == "tiny":
        model, tokenizer = base_model(run_config, config, task, cache=folder.parent)
    report = model, tokenizer, task, run_config, config, questions
    base = runs.from_first(lambda: runs.read_json(folder / "base.json"))
    if base is None:
        base = by_sampling_steps(*report)
        runs.from_first(lambda: runs.write_json(folder / "base.json", base))
    history, seconds_before = reinforce(model, run_config, config, task, tokenizer, train, validation, folder, started)
    tables = {"base": base, "final": by_sampling_steps(*report)}
    m = str(config.sampling_steps)
    summary = {
        "task": run_config.task,
        "model": run_config.model,
        "seed": run_config.seed,
        "steps": len(history),
        "seconds": seconds_before + time.perf_counter() - started,
        **{name: table[m] for name, table in tables.items()},
        "by_sampling_steps": {steps: {name: table[steps] for name, table in tables.items()} for steps in base},
    }
    if runs.rank() == 0:
        save_model(model, tokenizer, folder / "model")
        show(folder, model, tokenizer, task, run_config, config, questions, history, summary)


def show(folder, model, tokenizer, task, run_config, config, questions, history, summary):
    """The ending: table, picture, one answer as it appears, what to try next, and the line that says it all."""
    picture = runs.draw_curve(history, summary["base"], summary["final"], run_config.eval_split, folder / "curve.png")
    runs.write_json(folder / "summary.json", summary)  # last: a run that has it is finished
    runs.print_report(summary["by_sampling_steps"], run_config.eval_split)
    print(f"\na {run_config.eval_split} question, answered by the trained model:")
    policy = evaluated(run_config, config, config.sampling_steps)
    answer(model, tokenizer, task, questions[0], policy, run_config.seed)
    question = shlex.quote(" ".join(task.question(questions[-1]).split()))
    print(f"\n{picture}\nask it yourself: {runs.command(1)} --evaluate {folder} --prompt {question}")
    if history and not any(metrics["signal"] for metrics in history):
        print("nothing was learnt: no two answers to a question ever differed in reward; try more --base-steps")
    changes = [f"{kind} {summary['base'][kind]:.1%} -> {summary['final'][kind]:.1%}" for kind in summary["base"]]
    print(f"done in {summary['seconds']:.0f} s: {', '.join(changes)}")


def evaluate(run_config, config):
    """Measure a finished run or a model, a line per number of sampling steps; or answer one typed question."""
    device_of(run_config)
    folder = Path(run_config.evaluate)
    a_run = runs.read_settings(folder)
    if a_run and not (folder / "summary.json").exists():
        raise ValueError(f"{folder} holds no finished run: {runs.command(1)} --resume {folder}")
    task = task_of(run_config)
    task.prepare()
    name = str(folder / "model") if a_run else HUB_IDS.get(run_config.evaluate, run_config.evaluate)
    model, tokenizer = load_model(name, run_config)
    if run_config.prompt is not None:
        policy = evaluated(run_config, config, config.sampling_steps)
        return answer(model, tokenizer, task, task.parse_question(run_config.prompt), policy, run_config.seed)
    # Of the file that the run was trained on, the part that was held out.
    own = not run_config.data or (a_run and a_run["run"].get("data") == run_config.data)
    questions = task.load(run_config.eval_split, run_config.data) if own else task.read(run_config.data)
    questions = some(questions, run_config)
    if run_config.out or not a_run:
        folder = runs.from_first(lambda: runs.new_folder(run_config.out, f"evaluation-{run_config.task}"))
    report = {"model": name, "task": run_config.task, "questions": run_config.data or run_config.eval_split}
    report |= {"seed": run_config.seed, **runs.provenance(), "rows": []}
    completions = []
    label = run_config.task if own else f"{run_config.task}-{Path(run_config.data).stem}"
    runs.print_evaluation()
    for steps in run_config.eval_steps:
        for policy in run_config.eval_policies:
            records, row = evaluate_once(model, tokenizer, task, questions, steps, policy, run_config, config)
            completions.extend({"steps": steps, "policy": policy} | record for record in records)
            report["rows"].append(row)
            runs.print_evaluation(row)
            runs.from_first(lambda: runs.write_json(folder / f"evaluation-{label}.json", report))
            if run_config.save_completions:
                runs.from_first(lambda: runs.write_lines(folder / f"completions-{label}.jsonl", completions))
    runs.say(folder / f"evaluation-{label}.json")


def evaluate_once(model, tokenizer, task, questions, steps, policy, run_config, config):
    """The answers of one policy, and their row of the evaluation table."""
    sampled = evaluated(run_config, config, steps)
    chosen = sampled if policy == "sampled" else greedy(sampled)
    records = grade(model, tokenizer, task, questions, chosen, run_config, f"{steps} steps, {policy}")
    row = {"steps": steps, "policy": policy, "answers": len(records), "accuracy": mean(records, "correct")}
    return records, row | {name: mean(records, name) for name in ("length", "seconds")}


def answer(model, tokenizer, task, example, config, seed):
    """Show the greedy completion of one question appear step by step, and whether it is right."""
    prompt = encode(tokenizer, task, [example], next(model.parameters()).device)
    shown = agrpo.rollout(model, *prompt, greedy(config), streams(seed, "answer")[1])
    text = decode(tokenizer, shown.completion_ids)[0]
    print(f"    question        {task.question(example)}")
    runs.print_trajectory(shown, tokenizer)
    verdict = "" if example.get("answer", "") is None else "correct" if task.is_correct(text, example) else "wrong"
    print(f"    answer          {text}   {verdict}")


def some(questions, run_config):
    """The first --eval-prompts of the questions; 0: all."""
    return questions[: run_config.eval_prompts or None]


def run_folder(run_config, config):
    """The folder of the run: that of --resume, or a new one with its config.json."""
    if run_config.resume:
        folder = Path(run_config.resume)
        if runs.read_settings(folder) is None:
            raise ValueError(f"{folder} holds no run to resume: it has no config.json that can be read")
        for unfinished in folder.glob("*.tmp"):
            shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink()
        return folder
    folder = runs.new_folder(run_config.out, f"{run_config.task}-seed{run_config.seed}")
    settings = {"run": asdict(run_config), "algorithm": asdict(config)}  # every value that decides the run's numbers
    runs.write_json(folder / "config.json", settings | runs.provenance())
    return folder


def save_model(model, tokenizer, path):
    """The model, or its adapter in peft's format, with its tokenizer: whole or not at all."""
    unfinished = path.with_name(path.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    tiny_dllm.save(model, unfinished)
    tokenizer.save_pretrained(unfinished)
    shutil.rmtree(path, ignore_errors=True)
    unfinished.rename(path)


def main(argv=None):
    run_config, config = parse_arguments(argv, __doc__)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        evaluate(run_config, config) if run_config.evaluate else run(run_config, config)
    except (MemoryError, RuntimeError, OSError, ValueError) as error:
        return runs.leave(f"train.py: {runs.in_one_line(error, run_config)}", 1)
    except KeyboardInterrupt as stop:
        return runs.leave(f"\ntrain.py: stopped; {stop or 'continue with --resume and the folder of the run'}", 130)
    runs.stop_processes()
    return 0


if __name__ == "__main__":
    sys.exit(main())
