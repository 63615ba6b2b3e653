"""What do rollout and update cost beyond the model's own passes, and how fast are those? All in one process.

    python experiments/speed.py                 the tiny tasks, half a minute: the two ratios that the README quotes
    python experiments/speed.py vocabulary      LLaDA's vocabulary on a small model on the CPU, two minutes
    python experiments/speed.py llada           LLaDA-8B's full size, random weights, LoRA: one GPU of 80 GB
    python experiments/speed.py llada-small     the same script on a CPU, in seconds

A rollout contains one forward pass per step, an update one forward and backward pass per micro-batch. Their inputs are
recorded and the bare passes run again, alone: the ratio is what sampling, bookkeeping and the objective add.
Utilisation compares the floating-point operations that the model needs with the fastest matrix product measured here.
"""

import json
import resource
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: the project's root
import agrpo
import tasks
import tiny_dllm
import train
from agrpo import AGRPOConfig

RESULTS = Path(__file__).parent / "results"


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


def seconds(function, clock=time.perf_counter):
    """How long a call takes, on a GPU until its work is done."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    started = clock()
    function()
    wait()
    return clock() - started


def tiny(repeats=30):
    """The two ratios on the tiny tasks."""
    tokenizer = tiny_dllm.character_tokenizer()
    for name in train.TINY:
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


# --------------------------------------------------------------------------------- LLaDA's shapes, random weights


@dataclass
class Setting:
    """One measurement: a model of LLaDA's structure, prompts of one length, B completions, the algorithm."""

    sizes: dict
    config: AGRPOConfig
    prompt_length: int
    completions: int = 8  # B, one group
    lora_rank: int = 0
    micro_batch: int = 8
    gradient_checkpointing: bool = False
    repeats: int = 3


LLADA = {"d_model": 4096, "n_layers": 32, "n_heads": 32, "mlp_hidden_size": 12288, "rope_theta": 500000.0}
WORDS = {"vocab_size": 126464, "mask_token_id": 126336, "eos_token_id": 126081}
PAPER = {"temperature": 0.6, "top_k": 150, "top_p": 0.99, "importance_sampling": "entropy"}
SETTINGS = {
    "vocabulary": Setting(
        WORDS | {"d_model": 256, "n_layers": 4, "n_heads": 4, "mlp_hidden_size": 768},
        AGRPOConfig(completion_length=64, sampling_steps=32, block_length=32, mc_samples=8, temperature=0.6),
        prompt_length=64,
        micro_batch=4,
    ),
    "llada": Setting(
        WORDS | LLADA,
        AGRPOConfig(completion_length=384, sampling_steps=128, block_length=12, mc_samples=24, **PAPER),
        prompt_length=128,
        lora_rank=64,
        gradient_checkpointing=True,
    ),
    "llada-small": Setting(
        WORDS | {"d_model": 32, "n_layers": 2, "n_heads": 2, "mlp_hidden_size": 64},
        AGRPOConfig(completion_length=24, sampling_steps=8, block_length=12, mc_samples=3, **PAPER),
        prompt_length=8,
        completions=4,
        lora_rank=4,
        gradient_checkpointing=True,
        repeats=1,
    ),
}


def random_model(setting, device, dtype):
    """The model with random weights, made where it stays."""
    with torch.device("meta"):
        model = tiny_dllm.MaskedDiffusionLM(tiny_dllm.Config(**setting.sizes)).to(dtype)
    model = model.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if "norm" in name or "ln_f" in name else parameter.normal_(std=0.02)
    model.gradient_checkpointing = setting.gradient_checkpointing
    if setting.lora_rank:
        model = tiny_dllm.add_lora(model, setting.lora_rank, setting.lora_rank, torch.Generator().manual_seed(0))
    return model


def matmul_peak(device, dtype):
    """Floating-point operations per second of the fastest of some square matrix products: the ceiling here."""
    best = 0.0
    for size in (4096, 8192) if device == "cuda" else (1024, 2048):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in "ab")
        best = max(best, max(2 * size**3 / seconds(lambda a=a, b=b: a @ b) for _ in range(10)))
    return best


def operations(setting, sequences, head_rows, backward):
    """What the passes need: per token 2 per weight of the blocks and 4 d L per layer for attention; the head for its
    rows. A backward pass costs as much for the inputs and, unless the weights are frozen under LoRA, again for the
    weights. Recomputing activations is not counted: it is a cost, not a need."""
    sizes, config = setting.sizes, setting.config
    d, layers, length = sizes["d_model"], sizes["n_layers"], setting.prompt_length + config.completion_length
    per_token = layers * (2 * (4 * d * d + 3 * d * sizes["mlp_hidden_size"]) + 4 * d * length)
    forward = sequences * length * per_token + 2 * head_rows * d * sizes["vocab_size"]
    return forward * (1 + backward * (1 if setting.lora_rank else 2))


def measure(name):
    """Seconds, utilisation, tokens per second and peak memory of one setting; into results/speed-NAME.json."""
    setting, device = SETTINGS[name], "cuda" if torch.cuda.is_available() else "cpu"
    config, dtype = setting.config, torch.bfloat16 if torch.cuda.is_available() else torch.float32
    peak = matmul_peak(device, dtype)
    model = random_model(setting, device, dtype)
    generator = torch.Generator().manual_seed(0)
    shape = setting.completions, setting.prompt_length
    prompts = torch.randint(0, setting.sizes["eos_token_id"], shape, generator=generator).to(device)
    mask = torch.ones_like(prompts, dtype=torch.bool)
    cpu = seconds(lambda: agrpo.rollout(model, prompts, mask, config, generator), time.process_time)
    memory = {"rollout": peak_memory()}
    run = agrpo.rollout(model, prompts, mask, config, generator)
    advantages = torch.tensor([1.0, -1.0]).repeat(setting.completions // 2)
    update = lambda: agrpo.accumulate_gradient(model, run, advantages, config, generator, setting.micro_batch)  # noqa: E731
    cpu = {"rollout": cpu, "update": seconds(update, time.process_time)}
    memory["update"] = peak_memory()
    times = ratios(model, prompts, mask, config, setting.micro_batch, setting.repeats)
    evaluations = update()["evaluations"]
    written = setting.completions * config.completion_length  # head rows of a rollout: each token once
    per_step = config.completion_length / config.sampling_steps
    needed = {
        "rollout": operations(setting, setting.completions * config.sampling_steps, written, backward=False),
        "update": operations(setting, evaluations, evaluations * per_step, backward=True),
    }
    result = {"setting": name, "device": device, "dtype": str(dtype), "torch": torch.__version__, "matmul_peak": peak}
    for part, (bare, full, ratio) in times.items():
        result[part] = {
            "bare_seconds": bare,
            "seconds": full,
            "ratio": ratio,
            "cpu_seconds": cpu[part],
            "utilisation": needed[part] / full / peak,
            "tokens_per_second": written / full,
            "peak_memory_bytes": memory[part],
        }
        print(
            f"{part:<8} {full:8.2f} s   bare {bare:8.2f} s   ratio {ratio:.3f}   CPU {cpu[part]:7.1f} s   "
            f"{result[part]['utilisation']:.0%} of {peak / 1e12:.2f} TFLOP/s   "
            f"{written / full:.1f} completion tokens/s   peak {memory[part] / 1e9:.2f} GB"
        )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"speed-{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def peak_memory():
    """Bytes: of the GPU where there is one, else of this process, libraries included."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(argv):
    name = argv[0] if argv else "tiny"
    if name != "tiny" and name not in SETTINGS:
        print(f"speed.py: unknown setting {name}: choose tiny, {', '.join(SETTINGS)}", file=sys.stderr)
        return 2
    tiny() if name == "tiny" else measure(name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
