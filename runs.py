"""What surrounds the algorithm in a run: processes, folders, checkpoints, logs, tables and the picture.

A run's folder holds config.json (every setting), metrics.jsonl (a line per update), base.json and summary.json (what
was measured before and after), checkpoint-N, model/ and curve.png. Lines are appended to metrics.jsonl, and --resume
drops those after its checkpoint; all else is written beside its place and renamed, so that what is there is whole.
A run killed at any moment continues with --resume as if it had not been.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist

# ---------------------------------------------------------------------------------------------- processes


def start_processes(device_type):
    """Join the process group that torchrun started this process in, if it did; returns this process's device."""
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        if device_type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    return torch.device(device_type, torch.cuda.current_device()) if device_type == "cuda" else torch.device("cpu")


def leave(message, code):
    """Say why, and end. Among several processes at once: the others may wait for this one, and torchrun ends them."""
    print(message, file=sys.stderr, flush=True)
    if processes() > 1:
        os._exit(code)
    return code


def stop_processes():
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    """Which of the processes this is: 0 .. processes() - 1. Rank 0 writes and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def command(number=None):
    """How this program is started with so many processes; alone, by this Python, also where `python` is another."""
    number = number or processes()
    if number > 1:
        return f"torchrun --nproc-per-node {number} train.py"
    found = shutil.which("python")
    ours = found and os.path.dirname(found) == os.path.dirname(sys.executable)
    return f"{'python' if ours else os.path.relpath(sys.executable)} train.py"


def say(*words):
    """Print, once for all processes."""
    if rank() == 0:
        print(*words, flush=True)


def from_first(make):
    """The value of make(), called on rank 0 alone and sent to all."""
    if processes() == 1:
        return make()
    box = [None]
    if rank() == 0:
        try:
            box = [make()]
        except (ValueError, OSError) as error:  # all must hear of it, or they would wait for ever
            box = [error]
    dist.broadcast_object_list(box, src=0)
    if isinstance(box[0], Exception):
        raise box[0]
    return box[0]


def gather(value):
    """[value of rank 0, value of rank 1, ...] on every process."""
    values = [value]
    if processes() > 1:
        values = [None] * processes()
        dist.all_gather_object(values, value)
    return values


def average_gradients(parameters, share):
    """Replace each gradient by the sum over processes of share x gradient, share = this process's part of the batch.

    A loss that is a mean over completions then has the gradient of one process with the whole batch. A process whose
    groups all agreed has no gradient, and takes part with zeros. One message carries all gradients of a dtype.
    """
    if processes() == 1:
        return
    parameters = list(parameters)
    if not any(gather(any(parameter.grad is not None for parameter in parameters))):
        return  # nothing was learnt anywhere: no optimizer step, as in one process
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for dtype in sorted({parameter.grad.dtype for parameter in parameters}, key=str):
        gradients = [parameter.grad for parameter in parameters if parameter.grad.dtype == dtype]
        flat = torch.cat([gradient.flatten() for gradient in gradients]).mul_(share)  # (all their elements,)
        dist.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
            gradient.copy_(part.view_as(gradient))


def in_one_line(error, run_config):
    """What went wrong, for a person: no traceback, and for want of memory the flag to lower."""
    text = " ".join(str(error).split())
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        also = "" if run_config.gradient_checkpointing else ", or use --gradient-checkpointing"
        return f"out of memory: lower --tokens-per-pass (now {run_config.tokens_per_pass}){also}; with --resume too"
    if processes() > 1:
        return f"process {rank()} of {processes()} ends: {text}"
    return text or type(error).__name__


def merge_metrics(metrics, share):
    """One update's numbers over all processes: counts are summed, the largest error kept, means weighted by share."""
    rows = gather((share, metrics))
    if len(rows) == 1:
        return metrics
    merged = {name: sum(share * row[name] for share, row in rows) for name in metrics}
    merged["evaluations"] = sum(row["evaluations"] for _, row in rows)
    # A nan is the largest error of all; max alone would lose it.
    merged["ratio_error"] = max((row["ratio_error"] for _, row in rows), key=lambda x: (math.isnan(x), x))
    return merged


# ------------------------------------------------------------------------------------------------- folders


def new_folder(out, name):
    """Make the folder of a run: `out`, or runs/NAME, numbered if taken. One that already holds a run is not touched."""
    if out:
        folder = Path(out)
        if (folder / "config.json").exists():
            raise ValueError(f"{folder} already holds a run: --resume {folder}, choose another --out, or remove it")
    else:
        for i in itertools.count(1):
            folder = Path("runs") / (f"{name}-{i}" if i > 1 else name)
            with contextlib.suppress(FileExistsError):  # taken, perhaps by a run that starts just now
                folder.mkdir(parents=True)
                return folder
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def read_json(path):
    """The value, or None where there is no such file."""
    return json.loads(path.read_text()) if path.exists() else None


def append_line(path, value):
    """Rank 0 appends a line of JSON."""
    if rank() == 0:
        with open(path, "a") as file:
            file.write(json.dumps(value) + "\n")


def write_text(path, text):
    """Write beside and rename, so that the file is whole whenever it is there."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    unfinished.write_text(text)
    unfinished.replace(path)


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_lines(path, rows):
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_settings(folder):
    """{"run": ..., "algorithm": ...} of a run's folder, or None where the folder holds no run."""
    try:
        stored = json.loads((Path(folder) / "config.json").read_text())
        return stored if isinstance(stored["run"], dict) and isinstance(stored["algorithm"], dict) else None
    except (KeyError, OSError, TypeError, ValueError):
        return None


def provenance():
    """What else decides a run's numbers: library versions, processes, the commit of this code."""
    here = Path(__file__).parent
    git = ["git", "-C", str(here)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout
        commit += " with changes" if changed.strip() else ""
    except (OSError, subprocess.CalledProcessError):
        commit = None
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "safetensors", "peft", "datasets", "math-verify"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {"commit": commit, "processes": processes(), "versions": versions}


# --------------------------------------------------------------------------------------------- checkpoints


def trainable(model):
    """{name: parameter} of what training changes: the adapter under LoRA, everything otherwise."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_checkpoint(folder, step, seconds, model, optimizer, rng, generator):
    """Everything that the updates after `step` depend on, in folder/checkpoint-STEP. No pickles: tensors as
    safetensors, the rest as JSON. The schedule is a function of the step."""
    from safetensors.torch import save_file

    states = gather(generator.get_state())  # each process draws its own random numbers
    if rank() > 0:
        return
    path = folder / f"checkpoint-{step}"
    unfinished = path.with_suffix(".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    weights = {name: parameter.detach().contiguous() for name, parameter in trainable(model).items()}
    moments = optimizer.state_dict()["state"]
    tensors = {f"{i}.{name}": value for i, values in moments.items() for name, value in values.items()}
    tensors |= {f"generator.{i}": state for i, state in enumerate(states)}
    try:
        unfinished.mkdir()
        save_file(weights, unfinished / "weights.safetensors")
        save_file(tensors, unfinished / "state.safetensors")
        write_json(unfinished / "state.json", {"step": step, "seconds": seconds, "rng": rng.getstate()})
        unfinished.rename(path)
    except Exception as error:  # a full disk, say: the checkpoint before this one stays
        shutil.rmtree(unfinished, ignore_errors=True)
        raise ValueError(f"{path} could not be written: {error}") from error
    for other in checkpoints(folder)[:-1]:
        shutil.rmtree(other)


def checkpoints(folder):
    """The folder's complete checkpoints, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.suffix != ".tmp"]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def load_checkpoint(folder, model, optimizer, rng, generator):
    """Restore the newest checkpoint in place; returns (step, seconds), (0, 0) without one."""
    from safetensors.torch import load_file

    found = checkpoints(folder)
    if len(set(gather(found[-1].name if found else None))) > 1:
        raise ValueError(f"{folder} must be one folder that all nodes see: they find different checkpoints in it")
    if not found:
        return 0, 0.0
    path = found[-1]
    try:
        state = json.loads((path / "state.json").read_text())
        weights, tensors = load_file(path / "weights.safetensors"), load_file(path / "state.safetensors")
        mine = trainable(model)
        made_by = sum(name.startswith("generator.") for name in tensors)
        if made_by != processes():
            raise ValueError(f"it was made by {made_by} processes: {command(made_by)} --resume {folder}")
        if weights.keys() != mine.keys():
            raise ValueError("it has other parameters")
        with torch.no_grad():
            for name, parameter in mine.items():
                parameter.copy_(weights[name])
        moments = {}
        for name, tensor in tensors.items():
            if not name.startswith("generator."):
                i, _, key = name.partition(".")
                moments.setdefault(int(i), {})[key] = tensor
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
        generator.set_state(tensors[f"generator.{rank()}"])
        version, numbers, gauss = state["rng"]
        rng.setstate((version, tuple(numbers), gauss))
        return state["step"], state["seconds"]
    except Exception as error:
        raise ValueError(f"{path} is not a checkpoint of this run: {' '.join(str(error).split())}") from error


def rewind_metrics(path, step):
    """Keep the lines of metrics.jsonl up to `step`, which the updates after it will write again; returns them."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):  # the last line may be half there
            rows.append(json.loads(line))
    rows = [row for row in rows if row["step"] <= step]
    write_lines(path, rows)
    return rows


@contextlib.contextmanager
def finish_what_was_begun():
    """Within: the first Ctrl-C or SIGTERM only sets the yielded list's content, so that an update can be finished and
    saved; a second one interrupts at once."""
    stop = []

    def handler(number, _):
        if stop:
            raise KeyboardInterrupt
        stop.append(number)
        say("\nfinishing this update, then saving; once more to stop at once")

    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, action in previous.items():
            signal.signal(number, action)


# -------------------------------------------------------------------------------------------------- logs


class Tracker:
    """Called with (step, metrics), sends the numbers to TensorBoard or Weights & Biases, or nowhere for name "".

    `done` updates were made before the run was resumed: what was sent of later ones is sent again, not doubled."""

    def __init__(self, name, folder, settings, done):
        self.log = self.close = lambda *_: None
        if name == "tensorboard" and rank() == 0:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(folder), purge_step=done + 1)
            self.log = lambda step, numbers: [writer.add_scalar(k, v, step) for k, v in numbers.items()]
            self.close = writer.close
        elif name == "wandb" and rank() == 0:
            import wandb

            # The folder's whole path: every checkout may have a runs/countdown-seed0.
            key = f"{folder.name}-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]}"
            try:
                run = wandb.init(project="agrpo", dir=str(folder), id=key, resume="allow", config=settings)
            except Exception as error:  # its own kinds: no login, no network
                raise ValueError(f"--tracker wandb: {error}") from error
            self.log, self.close = lambda step, numbers: run.log(numbers, step=step), run.finish

    def __call__(self, step, metrics):
        self.log(step, flat(metrics))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def flat(metrics):
    """{"validation": {"greedy": x}} -> {"validation/greedy": x}"""
    pairs = [(k, v.items() if isinstance(v, dict) else [("", v)]) for k, v in metrics.items()]
    return {f"{k}/{name}".rstrip("/"): v for k, inner in pairs for name, v in inner}


# -------------------------------------------------------------------------------------- tables and the picture


def print_report(table, split):
    """Accuracy of base and trained model, one row per number of sampling steps and policy."""
    say(f"\n{split} accuracy    policy         base    trained")
    for steps, row in table.items():
        for policy in row["base"]:
            say(f"{steps:>5} steps       {policy:<9}{row['base'][policy]:>10.1%}{row['final'][policy]:>11.1%}")


def print_evaluation(row=None):
    """One line of the evaluation table: accuracy with its standard error, length, time; or its head."""
    if row is None:
        return say("\nsampling steps   policy      accuracy           tokens per answer   seconds per answer")
    error = math.sqrt(row["accuracy"] * (1 - row["accuracy"]) / row["answers"])
    accuracy = f"{row['accuracy']:.1%} +- {error:.1%}"
    say(f"{row['steps']:>14}   {row['policy']:<12}{accuracy:<19}{row['length']:>17.1f}{row['seconds']:>21.4f}")


def print_trajectory(run, tokenizer, row=0, states=9):
    """One completion as it appears: `_` is [MASK], `.` is <eos>. Of a long one, about `states` states."""

    def text(ids):
        special = {run.mask_token_id: "_", run.eos_token_id: "."}
        return "".join(special.get(i) or tokenizer.decode([i]) for i in ids)

    taken = int(run.steps_taken[row])
    for t in range(0, taken, max(1, taken // states)):
        seen = run.state_at(run.unmask_step.new_full((len(run.unmask_step),), t))[row, run.prompt_ids.shape[1] :]
        print(f"    before step {t}".ljust(20) + text(seen.tolist()))
    print(f"    finished        {text(run.completion_ids[row].tolist())}")


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
    for i, kind in enumerate(base):
        values = [metrics["validation"][kind] for metrics in checked]
        label = f"{kind}, validation prompts"
        top.plot([metrics["step"] for metrics in checked], values, "o-", ms=3, color=f"C{i}", label=label)
        label = f"{kind}, {split} prompts"
        top.plot([0, len(history)], [base[kind], final[kind]], "*", ms=15 - 6 * i, color=f"C{i}", label=label)
    top.set(ylabel="share of correct answers", ylim=(0, 1))
    top.legend(fontsize=8)
    bottom.plot(steps, [metrics["entropy"] for metrics in history], color="C2", label="entropy, nats per token")
    bottom.plot(steps, [metrics["signal"] for metrics in history], color="C3", label="share of groups with signal")
    bottom.set(xlabel="policy-gradient updates", ylim=(0, None))
    bottom.legend(fontsize=8)
    figure.tight_layout()
    unfinished = path.with_suffix(".tmp.png")
    figure.savefig(unfinished, dpi=120)
    unfinished.replace(path)
    plt.close(figure)
    return f"learning curve: {path}"
