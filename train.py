"""Train a masked diffusion language model by policy gradients: a tiny one on a laptop, LLaDA-8B on a GPU.

    python train.py                                          tiny, Countdown: a minute or two on two CPU cores
    python train.py --task sudoku                            tiny, 4x4 Sudoku: four minutes; also tracking
    python train.py --model llada --task countdown           LLaDA-8B-Instruct with LoRA; also gsm8k, math, sudoku
    python train.py --resume runs/countdown-seed0            continue a run that was stopped or killed
    python train.py --evaluate runs/countdown-seed0 --prompt "3 12 7 = 16"
    python train.py --evaluate llada --task gsm8k --eval-steps 32 64 128

A run measures the base model (the tiny one is trained first), improves it with rewards alone (agrpo.py), and measures
it again. --model and --task choose the defaults that --help shows.
"""

import glob
import hashlib
import inspect
import json
import math
import signal
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

import tasks
import tiny_dllm
import variants
from agrpo import require
from support import evaluation, in_one_line, pictures, runs, weights
from support.data import say_if_changed, sha256
from support.evaluation import Setup, decode, encode
from support.judge import JUDGE
from support.settings import HUB_IDS, PATHS, TINY, find_algorithm, parse_arguments


# ---------------------------------------------------------------------------------------- policy gradients
def reinforce(setup, train, validation, folder, started):
    """Policy-gradient updates up to max_steps, in place, from the newest checkpoint. Every update appends its numbers
    to metrics.jsonl. Ctrl-C and SIGTERM end it after a last checkpoint. Returns the numbers of all updates, and the
    seconds that the run had taken before it was resumed."""
    run, setup = setup.run, with_algorithm(setup)
    rng, generator = runs.streams(run.seed, "reinforce")
    parameters = list(runs.trainable(setup.model).values())
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, run.adam_beta2), weight_decay=run.weight_decay, fused=True)
    done, seconds_before = runs.load_checkpoint(folder, setup.model, optimizer, rng, generator)
    history = runs.from_first(lambda: runs.rewind_metrics(folder / "metrics.jsonl", done))
    track = runs.tracker(run.tracker, folder, asdict(run) | asdict(setup.config), done)
    tolerable = tolerable_ratio_error(weights.unwrapped(setup.model).model.transformer.wte.weight.dtype, setup.config)
    bar = {"desc": "AGRPO", "initial": done, "total": run.max_steps, "disable": runs.rank() > 0}
    with runs.finish_what_was_begun() as stop:
        for step in (steps := tqdm(range(done, run.max_steps), **bar)):
            optimizer.param_groups[0]["lr"] = learning_rate(run, step)
            prompts = rng.choices(train, k=run.prompts_per_step)
            metrics = {"step": step + 1} | update(setup, prompts, optimizer, generator)
            if (step + 1) % run.eval_every == 0:
                metrics["validation"] = evaluation.accuracies(setup, validation, description="validating")
            if not metrics["ratio_error"] <= tolerable and all(row["ratio_error"] <= tolerable for row in history):
                said = f"ratio_error is {metrics['ratio_error']:.2g}, and rounding explains {tolerable:.2g} at most"
                runs.say(f"\nupdate {step + 1}: {said}: two policies wrote and learnt (docs/large-models.md)")
            history.append(metrics)
            runs.append_line(folder / "metrics.jsonl", metrics)
            track(step + 1, metrics)
            steps.set_postfix({name: f"{metrics[name]:.2f}" for name in ("reward", "accuracy", "entropy", "signal")})
            stopped = max(runs.gather(max(stop, default=0)))  # the signal that any process got, or 0
            if (step + 1) % run.save_every == 0 or step + 1 == run.max_steps or stopped:
                elapsed = seconds_before + time.perf_counter() - started
                runs.save_checkpoint(folder, step + 1, elapsed, setup.model, optimizer, rng, generator)
            if stopped:
                runs.interrupt(stopped)
    return history, seconds_before


# By how much rounding may shift a log-probability between two passes over one state, at temperature 1. Between 16 and
# 32 bfloat16 moves in steps of 0.125: the token's logit may take one, the normaliser another.
ROUNDING = {torch.bfloat16: 0.25}  # float32, whose steps are 2^16 times finer: 1e-3


def tolerable_ratio_error(dtype, config):
    """The largest |rho - 1| right after a rollout that rounding explains, which may also move a word over top_p's edge.
    Beyond it, rollout and update were two policies: other weights, dropout, a mask."""
    return math.exp(min(ROUNDING.get(dtype, 1e-3) / config.temperature, 50)) / config.top_p - 1


def update(setup, prompts, optimizer, generator):
    """One rollout of the prompts, shared among the processes, and its optimizer steps. Returns the step's numbers."""
    begun, parameters = time.perf_counter(), optimizer.param_groups[0]["params"]
    mine = prompts[runs.rank() :: runs.processes()]
    share = len(mine) / len(prompts)
    run, rewards, step_rewards, metrics = roll_out(setup, mine, generator)
    updates = []
    for _ in range(setup.run.updates_per_rollout):  # in the first rho is 1; the clip acts in further ones
        optimizer.zero_grad()
        stats = add_gradient(setup, run, rewards, step_rewards, generator)
        runs.average_gradients(parameters, share)
        norm = torch.nn.utils.clip_grad_norm_(parameters, setup.run.gradient_clip, error_if_nonfinite=True)
        optimizer.step()
        updates.append(stats | {"gradient_norm": norm.item()})
    metrics |= updates[-1] | {"ratio_error": updates[0]["ratio_error"]}  # later ones are meant to differ from 1
    metrics["evaluations"] = sum(stats["evaluations"] for stats in updates)
    metrics = runs.merge_metrics(metrics, share) | {"learning_rate": optimizer.param_groups[0]["lr"]}
    return metrics | {"seconds": time.perf_counter() - begun}  # the only field that differs between equal runs


def roll_out(setup, prompts, generator):
    """G answers to each prompt: the Rollout, rewards R (B,), step rewards or None, and what is said of them."""
    G, task = setup.config.num_generations, setup.task
    # Each prompt G times in a row: the G neighbours are the group whose rewards are compared.
    ids, attention_mask, answer = (x.repeat_interleave(G, 0) for x in encode(setup, prompts))  # (B, L)
    asked = [prompt for prompt in prompts for _ in range(G)]

    def judge(questions, ids):  # of step rewards: (N,), (N, L) -> (N,)
        texts = decode(setup, ids, answer[:1].to(ids.device).expand(ids.shape))
        return torch.tensor(JUDGE.map(task.reward, texts, [prompts[i] for i in questions.tolist()]))

    needs_step_rewards = getattr(setup.estimate, "needs_step_rewards", False)
    model = variants.GreedyCompletions(setup.model) if needs_step_rewards else setup.model
    inputs = ids, attention_mask, setup.config, generator, evaluation.rows_per_pass(setup, ids)
    run = variants.ROLLOUTS[setup.run.unmasking](model, *inputs)
    texts = decode(setup, run.ids, answer)
    rewards = torch.tensor(JUDGE.map(task.reward, texts, asked))  # R (B,)
    written = (run.unmask_step >= 0) & (run.unmask_step < run.sampling_steps)  # (B, L): by the policy
    groups = rewards.view(-1, G)
    said = {
        "reward": rewards.mean().item(),
        "accuracy": sum(JUDGE.map(task.is_correct, texts, asked)) / len(texts),
        "entropy": run.entropies[written].mean().item(),  # nats per written token
        "signal": (groups != groups[:, :1]).any(1).float().mean().item(),  # share of groups that disagree
    }
    return run, rewards, model.step_rewards(run, judge, G) if needs_step_rewards else None, said


def add_gradient(setup, run, rewards, step_rewards, generator):
    """Estimate, and add the gradient to .grad. Returns the statistics of agrpo.accumulate_gradient."""
    A, w = setup.estimate(run, rewards, setup.config, generator, step_rewards)  # (B, m) each
    shape = len(rewards), run.sampling_steps
    require(w.shape == shape, f"{setup.run.algorithm}: weights of shape {tuple(w.shape)}, not {shape}")
    options = {"micro_batch": evaluation.rows_per_pass(setup, run.ids), "penalty": setup.penalty}
    return setup.accumulate(setup.model, run, advantages=A, weights=w, config=setup.config, **options)


def with_algorithm(setup):
    """The setup with its estimator, and its penalty; a KL is to the model as it is now."""
    run, penalties, mask_token_id = setup.run, [], setup.model.mask_token_id
    if run.beta:
        reference = weights.frozen_copy(setup.model)
        penalties.append(variants.kl_penalty(reference, run.beta, setup.config, mask_token_id))
    if run.entropy_bonus:
        penalties.append(variants.entropy_penalty(run.entropy_bonus, setup.config, mask_token_id))
    penalty = (lambda *inputs: sum(penalty(*inputs) for penalty in penalties)) if penalties else None
    return replace(setup, estimate=find_algorithm(run.algorithm), penalty=penalty)


def learning_rate(run, step):
    """linear: ten updates of warm-up, constant, to zero over the last fifth. cosine: 1% of warm-up, half a cosine."""
    share = step / run.max_steps
    if run.schedule == "constant":
        return run.learning_rate
    if run.schedule == "cosine":
        return run.learning_rate * min((step + 1) / (0.01 * run.max_steps), 0.5 + 0.5 * math.cos(math.pi * share))
    return run.learning_rate * min(1, (step + 1) / 10, 5 * (1 - share))


# ------------------------------------------------------------------------------- where the model comes from
def base_model(run, config, cache, owner=None):
    """Setup of a tiny base model, trained here, or read from `cache` if the same settings and code trained one. The
    owner is the run that it is trained for."""
    tokenizer = tiny_dllm.character_tokenizer()
    ids = tokenizer.mask_token_id, tokenizer.eos_token_id
    model = tiny_dllm.MaskedDiffusionLM(tiny_dllm.Config(len(tokenizer), *ids, **TINY[run.task]))
    setup = Setup(run, config, evaluation.task_of(run), model, tokenizer)
    settings = {k: v for k, v in asdict(run).items() if k.startswith("base_") or k in ("task", "seed")}
    settings |= {"model": asdict(model.config), "completion_length": run.completion_length}
    # The code is a setting too: after a change to it, an old base model would pass for a new one.
    code = [Path(module.__file__).read_text() for module in (tiny_dllm, tasks)]
    code += [inspect.getsource(function) for function in (pretrain, base_model, encode, runs.streams)]
    key = hashlib.sha256(json.dumps([settings, code]).encode()).hexdigest()[:12]
    folder = cache / f"base-{run.task}-{key}"

    def make():
        if folder.exists():
            return runs.say(f"base model: reusing {folder}")
        pretrain(setup)
        save_model(setup, folder, owner)

    runs.from_first(make)
    return replace(setup, model=weights.load(folder))


def pretrain(setup):
    """Supervised training on worked examples with LLaDA's loss, in place.

    base_noise spoils some of their tokens, as text found in the wild has mistakes: the model learns to make as many,
    and only a reward tells it not to."""
    run, model, examples = setup.run, setup.model, setup.task.load("train")
    rng, generator = runs.streams(run.seed, "base")
    model.init_weights(generator)
    all_ids, attention_mask, answer = encode(setup, examples)  # (examples, L)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    padded = {"padding": "max_length", "max_length": run.completion_length, "padding_side": "right"}
    bar = tqdm(range(run.base_steps), desc="base model")
    for step in bar:
        decay = 0.5 + 0.5 * math.cos(math.pi * step / run.base_steps)  # 1 to 0
        optimizer.param_groups[0]["lr"] = run.base_learning_rate * min(1, (step + 1) / 50) * decay
        batch = rng.choices(range(len(examples)), k=run.base_batch)
        texts = [setup.task.solution(examples[i], rng) for i in batch]
        answers = setup.tokenizer(texts, return_tensors="pt", **padded)["input_ids"]  # (base_batch, n)
        spoilt = torch.rand(answers.shape, generator=generator) < run.base_noise
        shuffled = answers.flatten()[torch.randint(answers.numel(), answers.shape, generator=generator)]
        ids = all_ids[batch].masked_scatter(answer[batch], answers.where(~spoilt, shuffled))  # (base_batch, L)
        loss = tiny_dllm.diffusion_loss(model, ids, attention_mask[batch], answer[batch], generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        if step % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.2f}")


def pretrained_model(run, config):
    """Setup of a run that starts from published weights: with a new LoRA adapter, or the one that --model holds. Its
    RunConfig then names the commit and the adapter's sizes, as config.json shall."""
    model, tokenizer = evaluation.load_model(HUB_IDS.get(run.model, run.model), run)
    if model is not weights.unwrapped(model):
        adapter = model.peft_config["default"]
        run = replace(run, lora_rank=adapter.r, lora_alpha=adapter.lora_alpha)
    else:
        run = replace(run, revision=model.revision or run.revision)
        if run.lora_rank:
            _, generator = runs.streams(run.seed, "LoRA", common=True)
            model = weights.add_lora(model, run.lora_rank, run.lora_alpha, generator)
    return Setup(run, config, evaluation.task_of(run), model, tokenizer)


# -------------------------------------------------------------------------------------------- the main job
def main_job(run, config):
    """Base model, test, reinforce, test, and everything a person would want to look at."""
    started = time.perf_counter()
    runs.device_of(run)
    if run.resume and (Path(run.resume) / "summary.json").exists():
        return runs.say(f"{run.resume} is finished: {runs.command(1, '--evaluate', run.resume)}")
    enough = run.prompts_per_step >= runs.processes()
    require(enough, f"--prompts-per-step {run.prompts_per_step}: each process needs a prompt of its own")
    torch.set_num_threads(min(4, torch.get_num_threads()))  # matrices this small do not pay for many threads
    # Whatever may be missing is missed now, and not after hours, nor with a folder left behind.
    task = evaluation.task_of(run)
    task.prepare()
    split = {name: task.load(name, run.data) for name in {"train", "validation", run.eval_split}}
    train, some = allowed(split["train"], task, run), slice(run.eval_prompts or None)
    validation, questions = split["validation"][some], split[run.eval_split][some]
    setup = None if run.model == "tiny" else pretrained_model(run, config)
    run = setup.run if setup else run
    folder = runs.from_first(lambda: run_folder(run, config))
    setup = setup or base_model(run, config, folder.parent, owner=folder.name)
    base = runs.from_first(lambda: evaluation.read_table(setup, folder / "base.json"))
    if base is None:
        base = evaluation.by_sampling_steps(setup, questions)
        runs.from_first(lambda: runs.write_json(folder / "base.json", base))
    history, seconds_before = reinforce(setup, train, validation, folder, started)
    tables = {"base": base, "final": evaluation.by_sampling_steps(setup, questions)}
    summary = {name: getattr(run, name) for name in ("task", "model", "seed")} | {"steps": len(history)}
    summary["seconds"] = seconds_before + time.perf_counter() - started
    summary |= {name: table[str(config.sampling_steps)] for name, table in tables.items()}
    summary["by_sampling_steps"] = {steps: {name: table[steps] for name, table in tables.items()} for steps in base}
    if runs.rank() == 0:
        save_model(setup, folder / "model")
        show(setup, folder, questions, history, summary)


def allowed(examples, task, run):
    """The examples without those that --exclude holds back for a later test."""
    held = {task.key(example) for example in task.read(run.exclude)} if run.exclude else set()
    kept = [example for example in examples if task.key(example) not in held]
    require(kept, f"there is nothing to train on (--exclude {run.exclude or 'is empty'})")
    return kept


def show(setup, folder, questions, history, summary):
    """The ending: table, picture, one answer as it appears, what to try next, and the line that says it all."""
    split = setup.run.eval_split
    picture = pictures.draw_curve(history, summary["base"], summary["final"], split, folder / "curve.png")
    runs.write_json(folder / "summary.json", summary)  # last: a run that has it is finished
    pictures.print_report(summary["by_sampling_steps"], split)
    print(f"\na {split} question, answered by the trained model:")
    evaluation.answer_one(setup, questions[0])
    question = in_one_line(setup.task.question(questions[-1]))
    print(f"\n{picture}\nask it yourself: {runs.command(1, '--evaluate', folder, '--prompt', question)}")
    if history and not any(metrics["signal"] for metrics in history):
        more = "--base-steps" if setup.run.model == "tiny" else "--num-generations, or a higher --temperature"
        print(f"nothing was learnt: no two answers to a question ever differed in reward; try more {more}")
    changes = [f"{kind} {summary['base'][kind]:.1%} -> {summary['final'][kind]:.1%}" for kind in summary["base"]]
    print(f"done in {summary['seconds']:.0f} s: {', '.join(changes)}")


def run_folder(run, config):
    """The folder of the run, for this process alone: that of --resume, or a new one with its config.json."""
    hashes = {f"{name}_sha256": sha256(path) for name in PATHS if (path := getattr(run, name))}
    folder = Path(run.resume) if run.resume else runs.new_folder(run.out, f"{run.task}-seed{run.seed}")
    stored = runs.read_settings(folder) if run.resume else {}
    require(stored is not None, f"{folder} holds no run to resume: it has no config.json that can be read")
    runs.hold(folder)
    base = f"base-{run.task}-{'?' * 12}.{glob.escape(folder.name)}.tmp"
    for unfinished in (*folder.glob("*.tmp"), *folder.parent.glob(base)):
        runs.remove(unfinished)  # what this run was writing when it was killed
    if run.resume:
        runs.say_what_changed(folder)
        for name in PATHS:
            say_if_changed(getattr(run, name), stored.get(f"{name}_sha256"))
    else:
        settings = {"run": asdict(run), "algorithm": asdict(config)}  # every value that decides the run's numbers
        runs.write_json(folder / "config.json", settings | hashes | runs.provenance())
    return folder


def save_model(setup, path, owner=None):
    """The model, or its adapter in peft's format, with its tokenizer, as the folder `path`: whole or not at all."""
    with runs.whole(path, owner) as unfinished:
        weights.save(setup.model, unfinished)
        setup.tokenizer.save_pretrained(unfinished)


def main(argv=None):
    run, config = parse_arguments(argv, __doc__)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, runs.interrupt)
    try:
        evaluation.evaluate(run, config) if run.evaluate else main_job(run, config)
    except (MemoryError, RuntimeError, OSError, ValueError) as error:
        return runs.leave(f"train.py: {runs.explain(error, run)}", 1)
    except KeyboardInterrupt as stop:
        code, message = stop.args
        return runs.leave(f"\ntrain.py: {message}", code)
    finally:
        runs.release()
    return 0


if __name__ == "__main__":
    sys.exit(main())
