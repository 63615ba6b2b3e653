"""A run killed at any moment and resumed ends with the very bits of one that was never interrupted."""

import contextlib
import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_cli import shared

from support import runs
from support.settings import parse_arguments
from train import main

ROOT = Path(__file__).resolve().parent.parent
FLAGS = (
    "--task sudoku --base-steps 40 --max-steps 5 --save-every 2 --eval-every 2 --prompts-per-step 3 "
    "--sampling-steps 4 --eval-steps 4 --eval-prompts 20 --importance-sampling entropy --mc-samples 2"
).split()
# Replaces a function by one that counts its calls and kills the process before, after or halfway through one of them.
SCRIPT = """
import os, signal, sys
sys.path.insert(0, {root!r})
import support.evaluation, support.pictures, support.runs, tiny_dllm, torch, train
calls = [0]
original = {target}
def killing(*arguments, **options):
    calls[0] += 1
    if calls[0] < {call}:
        return original(*arguments, **options)
    if {when!r} != "before":
        original(*arguments, **options)
    if {when!r} == "halfway":
        os.truncate(arguments[1], os.path.getsize(arguments[1]) // 2)
    os.kill(os.getpid(), signal.SIGKILL)
{target} = killing
train.main(sys.argv[1:])
"""


def outcome(folder):
    """All that a run leaves, wall-clock fields aside."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        del row["seconds"]
    summary = json.loads((folder / "summary.json").read_text())
    del summary["seconds"]
    return rows, summary, (folder / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def runs_folder(tmp_path_factory):
    """Runs beside each other share the cached base model, which saves most of their time."""
    return shared(tmp_path_factory)


@pytest.fixture(scope="module")
def uninterrupted(runs_folder):
    assert main([*FLAGS, "--out", str(runs_folder / "whole")]) == 0
    rows, *rest = outcome(runs_folder / "whole")
    assert any(row["gradient_norm"] > 0 for row in rows)  # else every run would end alike
    return rows, *rest


MOMENTS = {  # what is called when the process dies, which call of it, before, halfway through or after it
    "base model": ("tiny_dllm.diffusion_loss", 20, "before"),
    "line written, no checkpoint yet": ("support.runs.append_line", 3, "after"),
    "while the checkpoint is written": ("torch.save", 2, "halfway"),
    "written, not yet renamed": ("torch.save", 2, "after"),
    "renamed, the older one not yet removed": ("support.runs.checkpoints", 3, "before"),
    "last evaluation": ("support.evaluation.by_sampling_steps", 2, "before"),
    "model saved, no summary yet": ("support.pictures.draw_curve", 1, "before"),
}
LEFT = {  # checkpoints that it leaves behind
    "while the checkpoint is written": ["checkpoint-2", "checkpoint-4.PID.tmp"],
    "written, not yet renamed": ["checkpoint-2", "checkpoint-4.PID.tmp"],
    "renamed, the older one not yet removed": ["checkpoint-2", "checkpoint-4"],
}


SLOW = {"base model", "written, not yet renamed", "model saved, no summary yet"}


@pytest.mark.parametrize("moment", [pytest.param(m, marks=[pytest.mark.slow] * (m in SLOW)) for m in MOMENTS])
def test_killed_and_resumed_is_bit_identical(uninterrupted, runs_folder, moment, tmp_path):
    target, call, when = MOMENTS[moment]
    script = tmp_path / "killed.py"
    script.write_text(SCRIPT.format(root=str(ROOT), target=target, call=call, when=when))
    folder = (tmp_path if moment == "base model" else runs_folder) / moment.replace(" ", "-").replace(",", "")
    command = [sys.executable, str(script), *FLAGS, "--out", str(folder)]
    killed = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (folder / "summary.json").exists()
    left = sorted(re.sub(r"\.\d+\.", ".PID.", path.name) for path in folder.glob("checkpoint-*"))
    assert left == LEFT.get(moment, left)
    assert main(["--resume", str(folder)]) == 0
    assert outcome(folder) == uninterrupted
    assert not list(folder.glob("*.tmp")) and [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-5"]


def test_sigterm_saves_and_says_how_to_go_on(uninterrupted, runs_folder):
    folder = runs_folder / "terminated"
    command = [sys.executable, "train.py", *FLAGS, "--out", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment)
    while not (folder / "metrics.jsonl").exists() or not (folder / "metrics.jsonl").read_text():
        assert process.poll() is None
        time.sleep(0.02)
    process.terminate()
    stderr = process.communicate()[1]
    assert process.returncode == 143 and f"train.py --resume {folder}" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert runs.checkpoints(folder)[-1].name == f"checkpoint-{steps[-1]}"
    assert main(["--resume", str(folder)]) == 0
    assert outcome(folder) == uninterrupted


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_that_comes_before_the_updates_ends_the_run_in_one_line(monkeypatch, number, code, capsys):
    monkeypatch.setattr("train.main_job", lambda *_: signal.raise_signal(number))
    assert main([]) == code
    assert "stopped; the same command starts it again" in capsys.readouterr().err.splitlines()[-1]


def test_a_finished_run_is_not_run_again(uninterrupted, runs_folder, capsys):
    assert main(["--resume", str(runs_folder / "whole")]) == 0
    assert "finished" in capsys.readouterr().out


def test_settings_cannot_change(tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    run = {"task": "sudoku", "model": "tiny", "seed": 3, "completion_length": 16, "eval_steps": [4, 8]}
    settings = {"run": run, "algorithm": {"sampling_steps": 8}}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(SystemExit) as exit:
        main(["--resume", str(folder), "--seed", "4"])
    assert exit.value.code == 2 and "--seed cannot change" in capsys.readouterr().err.splitlines()[-1]
    parse_arguments(["--resume", str(folder), "--seed", "3", "--eval-steps", "4", "8"])  # as they were
    assert main(["--resume", str(tmp_path / "nowhere")]) == 1
    assert "nowhere holds no run" in capsys.readouterr().err


# ---- Checkpoints -------------------------------------------------------------------------------


def pieces(inputs=2, outputs=2):
    """What a checkpoint holds the state of: model, optimizer and both sources of random numbers."""
    model = torch.nn.Linear(inputs, outputs)
    return model, torch.optim.AdamW(model.parameters()), random.Random(0), torch.Generator()


def test_a_checkpoint_restores_everything(tmp_path):
    model, optimizer, rng, generator = pieces()
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    rng.random(), torch.rand(3, generator=generator)
    runs.save_checkpoint(tmp_path, 7, 12.5, model, optimizer, rng, generator)
    other, *others = pieces()
    assert runs.load_checkpoint(tmp_path, other, *others) == (7, 12.5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    assert torch.equal(optimizer.state[model.weight]["exp_avg"], others[0].state[other.weight]["exp_avg"])
    assert rng.random() == others[1].random()
    assert torch.equal(torch.rand(3, generator=generator), torch.rand(3, generator=others[2]))


@pytest.mark.parametrize("inputs, outputs", [(3, 1), (2, 2)])
def test_a_checkpoint_of_another_run_is_refused(tmp_path, inputs, outputs):
    runs.save_checkpoint(tmp_path, 1, 0.0, *pieces(2, 1))  # one row would fill two: copying broadcasts
    with pytest.raises(ValueError, match="checkpoint-1 is not a checkpoint of this run: it has other parameters"):
        runs.load_checkpoint(tmp_path, *pieces(inputs, outputs))


def spoilt(path, how):
    whole = path.read_bytes()
    stored = torch.load(path, weights_only=True)
    if how in stored:
        torch.save({name: value for name, value in stored.items() if name != how}, path)
    else:
        path.write_bytes({"truncated": whole[:-100], "empty": b"", "text": b"hello\n"}[how])


@pytest.mark.parametrize("how", ["truncated", "empty", "text", "weights", "optimizer", "rng", "generators", "step"])
def test_a_spoilt_checkpoint_is_refused_in_one_line(tmp_path, how):
    runs.save_checkpoint(tmp_path, 1, 0.0, *pieces())
    spoilt(tmp_path / "checkpoint-1", how)
    with pytest.raises(ValueError, match="checkpoint-1 is not a checkpoint of this run: .") as error:
        runs.load_checkpoint(tmp_path, *pieces())
    assert "\n" not in str(error.value)


class Malice:
    """Unpickled by a careless reader, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, 2))])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, save):
    runs.save_checkpoint(tmp_path, 1, 0.0, *pieces())
    path, victim = tmp_path / "checkpoint-1", tmp_path / "victim"
    save(torch.load(path, weights_only=True) | {"rng": Malice(victim)}, path)
    with pytest.raises(ValueError, match="not a checkpoint of this run") as error:
        runs.load_checkpoint(tmp_path, *pieces())
    assert "\n" not in str(error.value) and not victim.exists()
    with contextlib.suppress(RuntimeError):  # a bare pickle is not torch's format, which shows after it was read
        torch.load(path, weights_only=False)
    assert victim.exists()  # it would have


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    whole = pieces()
    runs.save_checkpoint(tmp_path, 1, 0.0, *whole)

    def full(_, path):
        path.write_bytes(b"half of i")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ValueError, match="No space left"):
        runs.save_checkpoint(tmp_path, 2, 0.0, *whole)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert runs.load_checkpoint(tmp_path, *whole)[0] == 1
