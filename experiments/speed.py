"""What do rollout and update cost beyond the model's own passes? Both are timed in one process, in turns.

    python experiments/speed.py          half a minute; the README quotes the two ratios

A rollout contains one forward pass per step, an update one forward and backward pass per micro-batch. Their inputs are
recorded and the bare passes run again, alone: the ratio is what sampling, bookkeeping and the objective add.
"""

import statistics
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: the project's root
import agrpo
import tasks
import tiny_dllm
import train


class Recorder:
    """A model that remembers its inputs."""

    def __init__(self, model):
        self.model, self.inputs = model, []
        self.mask_token_id, self.eos_token_id = model.mask_token_id, model.eos_token_id

    def __call__(self, *args, **kwargs):
        self.inputs.append((args, kwargs))
        return self.model(*args, **kwargs)


def ratios(model, prompts, mask, config, micro_batch, repeats):
    """{"rollout": (bare seconds, seconds, ratio), "update": ...}: medians over repeats, the ratio within each."""
    run = agrpo.rollout(rolled := Recorder(model), prompts, mask, config, torch.Generator().manual_seed(0))
    advantages = torch.ones(len(prompts))
    agrpo.accumulate_gradient(
        updated := Recorder(model), run, advantages, config, torch.Generator().manual_seed(0), micro_batch
    )

    def forward():
        with torch.no_grad():
            for args, kwargs in rolled.inputs:
                model(*args, **kwargs)

    def forward_backward():
        for args, kwargs in updated.inputs:
            model(*args, **kwargs).sum().backward()

    def rollout():
        agrpo.rollout(model, prompts, mask, config, torch.Generator().manual_seed(0))

    def update():
        generator = torch.Generator().manual_seed(0)
        agrpo.accumulate_gradient(model, run, advantages, config, generator, micro_batch)

    return {"rollout": compare(forward, rollout, repeats), "update": compare(forward_backward, update, repeats)}


def compare(bare, full, repeats):
    times = [(seconds(bare), seconds(full)) for _ in tqdm(range(repeats), leave=False)]
    return *(statistics.median(column) for column in zip(*times)), statistics.median(f / b for b, f in times)


def seconds(function):
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def main(repeats=30):
    tokenizer = tiny_dllm.character_tokenizer()
    for name in tasks.TASKS:
        run_config, config = train.parse_arguments(["--task", name])
        task, model = tasks.TASKS[name], train.new_model(tokenizer, run_config).init_weights(torch.Generator())
        examples = task.load("train")[: run_config.prompts_per_step]
        prompts, mask = (
            x.repeat_interleave(config.num_generations, 0) for x in train.encode(tokenizer, task, examples)
        )
        rows = train.rows_per_pass(run_config, prompts, config)
        for part, (bare, full, ratio) in ratios(model, prompts, mask, config, rows, repeats).items():
            row = f"{name:<10}{part:<9}bare {bare * 1e3:6.1f} ms   in all {full * 1e3:6.1f} ms   ratio {ratio:.3f}"
            print(row)


if __name__ == "__main__":
    main()
