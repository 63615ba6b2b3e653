"""What do rollout and update cost beyond the model's own passes, and how fast are those? All in one process.

    python experiments/speed.py                 the sizes of the tiny tasks, half a minute
    python experiments/speed.py vocabulary      LLaDA's vocabulary on a small model on the CPU, two minutes
    python experiments/speed.py llada           LLaDA-8B's full size, LoRA: one GPU of 80 GB
    python experiments/speed.py llada-small     the same script on a CPU, in seconds

Random weights and questions, groups of 8 with a common order, logits sharpened until at most a third of the states are
distinct, as in training. The inputs of the passes that rollout and update make, each distinct state once, are recorded,
and the bare passes run again, alone: forward, the head at the wanted positions, one log-softmax. The ratio is what
finding equal states, sampling, bookkeeping and the objective add.
"""

import argparse
import resource
import statistics
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: the project's root
import agrpo
from agrpo import AGRPOConfig
from experiments import report
from support import runs, settings, weights
from tiny_dllm import Config, MaskedDiffusionLM

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Setting:
    sizes: dict
    config: AGRPOConfig
    lengths: tuple  # tokens of a question, and of an answer
    completions: int = 8  # B
    micro_batch: int = 8
    lora_rank: int = 0  # with an adapter, one activation per layer is stored and the others are computed again
    repeats: int = 3


CHARACTERS = {"vocab_size": 38, "mask_token_id": 37, "eos_token_id": 36}
WORDS = {"vocab_size": 126464, "mask_token_id": 126336, "eos_token_id": 126081}
COUNTDOWN, SUDOKU = (CHARACTERS | settings.TINY[name] for name in ("countdown", "sudoku"))
MIDDLE = WORDS | {"d_model": 256, "n_layers": 4, "n_heads": 4, "mlp_hidden_size": 768}
LLADA = WORDS | {"d_model": 4096, "n_layers": 32, "n_heads": 32, "mlp_hidden_size": 12288, "rope_theta": 500000.0}
SMALL = WORDS | {"d_model": 32, "n_layers": 2, "n_heads": 2, "mlp_hidden_size": 64}
ENTROPY = {"importance_sampling": "entropy"}
PAPER = ENTROPY | {"temperature": 0.6, "top_k": 150, "top_p": 0.99, "block_length": 12}
SETTINGS = {
    "countdown": Setting(COUNTDOWN, AGRPOConfig(2, mc_samples=2), (12, 8), 512, 512, repeats=30),
    "sudoku": Setting(SUDOKU, AGRPOConfig(8, mc_samples=4, **ENTROPY), (17, 16), 512, 256, repeats=15),
    "vocabulary": Setting(MIDDLE, AGRPOConfig(32, block_length=32, temperature=0.6), (64, 64), micro_batch=4),
    "llada": Setting(LLADA, AGRPOConfig(128, mc_samples=24, **PAPER), (128, 384), lora_rank=64),
    "llada-small": Setting(SMALL, AGRPOConfig(8, mc_samples=3, **PAPER), (8, 24), 4, lora_rank=4, repeats=1),
}


def random_model(setting):
    """A model with random weights, made where it stays."""
    with torch.device("meta"):
        model = MaskedDiffusionLM(Config(**setting.sizes))
    model = model.to(torch.bfloat16 if DEVICE == "cuda" else torch.float32).to_empty(device=DEVICE)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if "norm" in name or "ln_f" in name else parameter.normal_(std=0.02)
    model.gradient_checkpointing = rank = setting.lora_rank
    return weights.add_lora(model, rank, rank, torch.Generator().manual_seed(0)) if rank else model


def measure(setting):
    """The numbers {"rollout": .., "update": ..} of a Setting."""
    model, generator, (given, n) = random_model(setting), torch.Generator().manual_seed(0), setting.lengths
    G = min(setting.config.num_generations, setting.completions)
    config = replace(setting.config, shared_order=True, num_generations=G)
    questions = torch.randint(model.eos_token_id, (setting.completions // G, given), generator=generator)
    ids = F.pad(questions.repeat_interleave(G, 0), (0, n), value=model.mask_token_id).to(DEVICE)  # (B, L)

    def rollout():
        return agrpo.rollout(model, ids, ids >= 0, config, torch.Generator().manual_seed(0))

    def update():
        tables = {"advantages": torch.ones(len(ids)), "weights": agrpo.sample_timesteps(run, config, generator)}
        agrpo.accumulate_gradient(model, run, **tables, config=config, micro_batch=setting.micro_batch)

    head = weights.unwrapped(model).model.transformer.ff_out.weight
    while sum(len(args[0]) for _, (args, _) in passes_of(rollout, model)) > len(ids) * config.sampling_steps / 3:
        head.data *= 2
    run = rollout()
    return {part.__name__: numbers(part, model, len(ids) * n, setting) for part in (rollout, update)}


def numbers(part, model, tokens, setting):
    """Of rollout or update. The ratio is the median of those of each repeat."""
    cpu = seconds(part, time.process_time)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # of this process, libraries included
    memory = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else memory
    passes, bar = passes_of(part, model), tqdm(range(setting.repeats), leave=False)
    times = [(seconds(partial(bare, model, passes)), seconds(part)) for _ in bar]
    alone, full = (statistics.median(column) for column in zip(*times))
    found = {"bare_seconds": alone, "seconds": full, "ratio": statistics.median(f / b for b, f in times)}
    return found | {"cpu_seconds": cpu, "tokens_per_second": tokens / full, "peak_memory_bytes": memory}


def passes_of(function, model):
    """[(with gradient, (args, kwargs))] of every pass through the model in function()."""
    passes, enabled = [], torch.is_grad_enabled
    hook = model.register_forward_pre_hook(lambda _, *given: passes.append((enabled(), given)), with_kwargs=True)
    function()
    hook.remove()
    return passes


def bare(model, passes):
    """The passes again, alone."""
    for with_gradient, (args, kwargs) in passes:
        with torch.set_grad_enabled(with_gradient):
            logp = model(*args, **kwargs).float().log_softmax(-1)
        if with_gradient:
            logp.sum().backward()


def seconds(function, clock=time.perf_counter):
    """How long a call takes, on a GPU until its work is done."""
    wait = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None
    wait()
    started = clock()
    function()
    wait()
    return clock() - started


def main(argv=None):
    """Print the numbers, and keep them in results/speed-SETTING.json where a setting is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", nargs="?", choices=SETTINGS)
    chosen = parser.parse_args(argv).setting
    for name in [chosen] if chosen else ["countdown", "sudoku"]:
        measured = measure(SETTINGS[name])
        columns = [column.replace("_", " ") for column in measured["rollout"]]
        report.print_table(columns, {part: [f"{x:.3g}" for x in row.values()] for part, row in measured.items()}, name)
    if chosen:
        about = {"setting": chosen, "device": DEVICE, "torch": torch.__version__}
        runs.write_json(report.RESULTS / f"speed-{chosen}.json", about | measured)


if __name__ == "__main__":
    main()
