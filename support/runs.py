"""What surrounds the algorithm in a run: processes, random numbers, folders, checkpoints and logs.

A run's folder holds config.json (every setting), metrics.jsonl (a line per update), base.json and summary.json (what
was measured before and after), checkpoint-N, model/, curve.png and the lock of the process that works on it. Lines
are appended to metrics.jsonl, and --resume drops those after its checkpoint; all else is written beside its place and
renamed, so that what is there is whole: a run killed at any moment continues as if it had not been."""

import atexit
import contextlib
import inspect
import itertools
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import typing
import uuid
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist

from agrpo import require
from support import in_one_line

LOCK, HELD = "lock", {}  # the file's name; {folder: its open lock} of the run that this process works on


# ---------------------------------------------------------------------------------------------- processes
def device_of(run):
    """Where the model lives: a GPU if there is one, but tiny models are faster, and exactly repeatable, on a CPU. Joins
    the process group that torchrun started this process in, if it did."""
    cuda = run.model != "tiny" and torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        if cuda:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if cuda else "gloo")
        atexit.register(dist.destroy_process_group)
    return device


def leave(message, code):
    """Say why, and end. Among several processes at once: the others may wait for this one, and torchrun ends them."""
    print(message, file=sys.stderr, flush=True)
    if processes() > 1:
        os._exit(code)
    return code


def rank():
    """Which of the processes this is: 0 .. processes() - 1. Rank 0 writes and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def command(number=None, *arguments):
    """How this program is started with so many processes; alone, by this Python, also where `python` is another."""
    number = number or processes()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", number))  # of the processes, those on this machine
    start = f"torchrun --nproc-per-node {number}"
    if here < processes() and here < number and number % here == 0:  # which machine the others find, we cannot know
        start = (
            f"torchrun --nnodes {number // here} --nproc-per-node {here} --rdzv-backend c10d --rdzv-endpoint HOST:PORT"
        )
    if number == 1:
        ours = os.path.dirname(shutil.which("python") or "") == os.path.dirname(sys.executable)
        start = "python" if ours else shlex.quote(os.path.relpath(sys.executable))
    return shlex.join([*shlex.split(start), "train.py", *map(str, arguments)])


def say(*words):
    """Print, once for all processes."""
    if rank() == 0:
        print(*words, flush=True)


def from_first(make):
    """The value of make(), called on rank 0 alone and sent to all."""
    value = None
    if rank() == 0:
        try:
            value = make()
        except (ValueError, OSError) as error:  # all must hear of it, or they would wait for ever
            value = error
    value = gather(value)[0]
    if isinstance(value, Exception):
        raise value
    return value


def gather(value):
    """[value of rank 0, value of rank 1, ...] on every process."""
    values = [value] * processes()
    if processes() > 1:
        dist.all_gather_object(values, value)
    return values


def average_gradients(parameters, share):
    """Replace each gradient by the sum over processes of share x gradient, share = this process's part of the batch:
    that of one process with the whole batch, whose loss is a mean over completions."""
    parameters = list(parameters)
    if processes() == 1 or not any(gather(any(parameter.grad is not None for parameter in parameters))):
        return  # where nothing was learnt anywhere no optimizer step, as in one process
    for parameter in parameters:
        if parameter.grad is None:  # the groups of this process all agreed
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad.mul_(share))


def explain(error, run):
    """What went wrong, for a person: no traceback, and for want of memory the flag to lower."""
    text = in_one_line(error) or type(error).__name__
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        also = "" if run.gradient_checkpointing else ", or use --gradient-checkpointing"
        also = "" if run.evaluate else f"{also}; with --resume too"  # an evaluation keeps no activations
        return f"out of memory: lower --tokens-per-pass (now {run.tokens_per_pass}){also}"
    return f"process {rank()} of {processes()} ends: {text}" if processes() > 1 else text


@contextlib.contextmanager
def failing_as(problem):
    """Within: whatever is raised becomes a ValueError of one line, `problem` and the reason."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise  # explain knows what to lower
    except Exception as error:  # libraries have kinds of their own, which differ between releases
        raise ValueError(f"{problem}: {in_one_line(error, 300)}") from error


def merge_metrics(metrics, share):
    """One update's numbers over all processes: counts are summed, the largest error kept, means weighted by share."""
    rows = gather((share, metrics))
    merged = {name: sum(share * row[name] for share, row in rows) for name in metrics}
    merged["evaluations"] = sum(row["evaluations"] for _, row in rows)
    errors = [row["ratio_error"] for _, row in rows]
    merged["ratio_error"] = torch.tensor(errors, dtype=torch.float64).max().item()  # unlike Python's max it keeps a nan
    return merged


def streams(seed, purpose, common=False):
    """Random numbers of one purpose: (random.Random, torch.Generator). Separate, so that a cached base model, or
    one evaluation more, changes no other number. All processes have the same Random, which chooses prompts, and each
    a Generator of its own, which draws completions, unless that is to be common too."""
    rng = random.Random(f"{purpose} {seed}")
    draws = rng.getrandbits(62)
    if rank() and not common:
        draws = random.Random(f"{purpose} {seed} process {rank()}").getrandbits(62)
    return rng, torch.Generator().manual_seed(draws)


# ------------------------------------------------------------------------------------------------- folders
def new_folder(out, name):
    """Make the folder of a run: `out`, or runs/NAME, numbered if taken. What is there already is neither changed nor
    believed: only an empty folder may be given, or one in which a run ended before it had written anything."""
    if out:
        folder = Path(out)
        free = not folder.exists() or (folder.is_dir() and {path.name for path in folder.iterdir()} <= {LOCK})
        resume = f", or --resume {shlex.quote(out)}" if read_settings(folder) else ""
        require(free, f"--out {folder} is not empty: choose another, or remove it{resume}")
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    for i in itertools.count(1):
        folder = Path("runs") / (f"{name}-{i}" if i > 1 else name)
        with contextlib.suppress(FileExistsError):  # taken, perhaps by a run that starts just now
            folder.mkdir(parents=True)
            return folder


def hold(folder):
    """Keep other processes from working on the same run until release(), or until this one ends in whatever way."""
    file = open(folder / LOCK, "a")  # noqa: SIM115 (closed by release; closing it unlocks)
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"another process works on {folder}: wait for its end, or stop it") from error
    except (ImportError, OSError):  # Windows, and file systems that know no locks: then there is none
        pass
    HELD[folder] = file


def release():
    while HELD:
        HELD.popitem()[1].close()


def read_json(path):
    """The value, or None where there is no such file. Raises ValueError where it is no JSON."""
    with failing_as(f"{path} cannot be read"):
        return json.loads(path.read_text()) if path.exists() else None


def fits(value, kind):
    """Whether a value from JSON is of a type: a whole number is a float too, True is no int, a list is a tuple."""
    container, inner = typing.get_origin(kind), typing.get_args(kind)
    if container is tuple:
        return isinstance(value, list) and all(fits(item, inner[0]) for item in value)
    if container is dict:
        return isinstance(value, dict) and all(fits(item, inner[1]) for item in value.values())
    return any(fits(value, one) for one in inner) if inner else type(value) in {float: (int, float)}.get(kind, (kind,))


def check_types(cls, values, where):
    """Raises ValueError, which says where, unless all values for fields of the dataclass have the fields' types."""
    require(isinstance(values, dict), f"{where}: {in_one_line(values, 40)} in place of settings")
    for name, kind in typing.get_type_hints(cls).items():
        said = f"{where}: {name} is {in_one_line(repr(values.get(name)), 40)}, not {inspect.formatannotation(kind)}"
        require(name not in values or fits(values[name], kind), said)


def append_line(path, value):
    """Rank 0 appends a line of JSON."""
    if rank() == 0:
        with failing_as(f"{path} could not be written"), open(path, "a") as file:
            file.write(json.dumps(value) + "\n")


@contextlib.contextmanager
def whole(path, owner=None):
    """Within: a file or folder is written under the yielded name. It is then renamed to `path`, so that what is there
    is whole, after a power failure too; or one line says why not, and nothing is left. A run that was killed meanwhile
    finds its leftover by the owner's name."""
    unfinished = path.with_name(f"{path.name}.{owner or os.getpid()}.tmp")
    try:
        with failing_as(f"{path} could not be written"):  # a full disk, say
            yield unfinished
            for part in (*unfinished.rglob("*"), unfinished):
                flush(part)
            try:
                unfinished.replace(path)
            except OSError:  # it is there: by a run that started at the same time, or by this one before it was killed
                if not (unfinished.is_dir() and path.is_dir()):
                    raise
            flush(path.parent)
    finally:
        remove(unfinished)


def flush(path):
    """Wait until a file, or a folder's list of names, is on the disk: a rename may get there before what it names."""
    a_folder = path.is_dir()
    with contextlib.suppress(*[OSError] * a_folder):  # Windows opens none, and some mounted drives flush none
        descriptor = os.open(path, os.O_RDONLY if a_folder else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove(path):
    """A file or folder, if it is there."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def try_to_write(folder):
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"?")


def write_text(path, text):
    with whole(path) as unfinished:
        unfinished.write_text(text)


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_lines(path, rows):
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_settings(folder):
    """{"run": ..., "algorithm": ...} of a run's folder, or None where the folder holds no run."""
    stored = read_json(Path(folder) / "config.json")
    return stored if isinstance(stored, dict) and {"run", "algorithm"} <= stored.keys() else None


def provenance():
    """What else decides a run's numbers: library versions, processes, the commit of this code."""
    git = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty= with changes"]
    commit = None
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        commit = subprocess.check_output(git, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, text=True).strip()
    versions = {"python": sys.version.split()[0]}
    for package in ("torch", "transformers", "safetensors", "peft", "datasets", "math-verify"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {"commit": commit, "processes": processes(), "versions": versions}


def say_what_changed(folder):
    """A line if a run is resumed with other code or libraries than it was begun with: its numbers may not be those."""
    file = folder / "config.json"
    with failing_as(f"{file} does not say what the run was begun with"):
        then, now = (of.get("versions", {}) | {"commit": of.get("commit")} for of in (read_json(file), provenance()))
    other = [f"{name} {then[name]}, now {now[name]}" for name in now if name in then and then[name] != now[name]]
    if other:
        say(f"{folder} was begun with {'; '.join(other)}: its numbers may differ")


# --------------------------------------------------------------------------------------------- checkpoints
def trainable(model):
    """{name: parameter} of what training changes: the adapter under LoRA, everything otherwise."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_checkpoint(folder, step, seconds, model, optimizer, rng, generator):
    """Everything that the updates after `step` depend on, in folder/checkpoint-STEP. The schedule is a function of the
    step. Raises ValueError where it cannot be written: the checkpoint before it stays."""
    states = gather(generator.get_state())  # each process draws its own random numbers
    everything = {"step": step, "seconds": seconds, "weights": trainable(model)}
    everything |= {"optimizer": optimizer.state_dict(), "rng": rng.getstate(), "generators": states}

    def save():
        for lines in folder.glob("metrics.jsonl"):
            flush(lines)  # a checkpoint without the lines before it would leave a gap
        with whole(folder / f"checkpoint-{step}") as unfinished:
            torch.save(everything, unfinished)
        for other in checkpoints(folder)[:-1]:
            other.unlink()

    from_first(save)  # and all wait: torchrun ends the others when one does, also in the middle of a save


def checkpoints(folder):
    """The folder's complete checkpoints, oldest first."""
    numbered = (path for path in folder.glob("checkpoint-*") if re.fullmatch("checkpoint-[0-9]+", path.name))
    return sorted(numbered, key=lambda path: int(path.name.partition("-")[2]))


def load_checkpoint(folder, model, optimizer, rng, generator):
    """Restore the newest checkpoint in place; returns (step, seconds), (0, 0) without one."""
    found = checkpoints(folder)
    shared = len(set(gather(found[-1].name if found else None))) == 1
    require(shared, f"{folder} must be one folder that all nodes see: they find different checkpoints in it")
    if not found:
        return 0, 0.0
    try:
        stored = torch.load(found[-1], map_location="cpu", weights_only=True)  # tensors and numbers, no code
        made_by = len(stored["generators"])
        require(made_by == processes(), f"it was made by {made_by} processes: {command(made_by, '--resume', folder)}")
        require(fits(stored["step"], int) and fits(stored["seconds"], float), "it names no step")
        theirs, mine = ({k: v.shape for k, v in of.items()} for of in (stored["weights"], trainable(model)))
        require(theirs == mine, "it has other parameters")
        model.load_state_dict(stored["weights"], strict=False)  # not strict: what is frozen is not in it
        optimizer.load_state_dict(stored["optimizer"])
        generator.set_state(stored["generators"][rank()])
        rng.setstate(stored["rng"])
        return stored["step"], stored["seconds"]
    except Exception as error:
        reason = error if isinstance(error, ValueError) else f"it cannot be read ({type(error).__name__})"
        raise ValueError(f"{found[-1]} is not a checkpoint of this run: {reason}") from error


def rewind_metrics(path, step):
    """Keep the lines of metrics.jsonl up to `step`, which the updates after it will write again; returns them."""
    rows, text = [], path.read_text(errors="replace") if path.exists() else ""
    for number, line in enumerate(text.rpartition("\n")[0].splitlines(), 1):  # behind the last \n: half a line
        with failing_as(f"{path}, line {number}: not the numbers of an update"):
            row = json.loads(line)
            named = {name: row[name] for name in ("step", "accuracy", "entropy", "signal", "ratio_error")}
            require(fits(row["step"], int) and fits(named, dict[str, float]), in_one_line(line, 40))
            rows.append(row)
    rows = [row for row in rows if row["step"] <= step]
    write_lines(path, rows)
    return rows


def interrupt(number, _=None):
    """Handler of a signal: the program is to end with 128 + its number, 130 after Ctrl-C and 143 after SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: None)  # Slurm and torchrun both send it: one is enough
    advice = "the same command starts it again" if rank() == 0 else "the first process says how to go on"
    for folder in HELD:
        advice = f"continue with: {command()} --resume {shlex.quote(str(folder))}"
    raise KeyboardInterrupt(128 + number, f"stopped; {advice}")


@contextlib.contextmanager
def finish_what_was_begun():
    """Within: the first Ctrl-C or SIGTERM only puts its number into the yielded list, so that an update can be finished
    and saved; a second Ctrl-C interrupts at once. A second SIGTERM does nothing: Slurm and torchrun both send it."""
    stop = []

    def handler(number, _):
        if stop and number == signal.SIGINT:
            interrupt(number)
        if not stop:
            say("\nfinishing this update, then saving; Ctrl-C to stop at once")
        stop.append(number)

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    yield stop
    for number in before:  # not where it ends by an exception: the program does too, and may say why undisturbed
        signal.signal(number, before[number])


# -------------------------------------------------------------------------------------------------- logs
def tracker(name, folder, settings, done):
    """A function of (step, metrics) that sends the numbers to TensorBoard or Weights & Biases, or nowhere for name "".
    After a resume, what was sent of updates beyond `done` is sent again, not doubled."""
    if not name or rank() > 0:
        return lambda step, metrics: None

    def flat(validation=None, **metrics):  # reward=x, validation={"greedy": y} -> {"reward": x, "validation/greedy": y}
        return metrics | {f"validation/{kind}": value for kind, value in (validation or {}).items()}

    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder), purge_step=done + 1, max_queue=1)  # nothing to lose when it is killed
        return lambda step, metrics: [writer.add_scalar(*pair, step) for pair in flat(**metrics).items()]
    import wandb

    key = uuid.uuid5(uuid.NAMESPACE_URL, folder.resolve().as_uri()).hex  # every checkout may have such a folder
    with failing_as("--tracker wandb"):  # no login, no network
        run = wandb.init(project="agrpo", name=folder.name, dir=str(folder), id=key, resume="allow", config=settings)
    return lambda step, metrics: run.log(flat(**metrics), step=step)
