"""A run killed at any moment and resumed ends with the very bits of one that was never interrupted."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import runs
from train import main

ROOT = Path(__file__).resolve().parent.parent
FLAGS = (
    "--task sudoku --base-steps 40 --base-batch 16 --max-steps 5 --save-every 2 --eval-every 2 --prompts-per-step 3 "
    "--sampling-steps 4 --eval-steps 4 --eval-prompts 20 --importance-sampling entropy --mc-samples 2"
).split()
KILL = "os.kill(os.getpid(), signal.SIGKILL)"
# Replaces a function by one that counts its calls and kills the process before or after a certain one.
SCRIPT = """
import os, signal, sys
sys.path.insert(0, {root!r})
import agrpo, runs, safetensors.torch, tiny_dllm, train
calls = [0]
original = {target}
def killing(*arguments, **options):
    calls[0] += 1
    if calls[0] == {call} and {before}:
        {kill}
    value = original(*arguments, **options)
    if calls[0] == {call}:
        {kill}
    return value
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
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def uninterrupted(runs_folder):
    assert main([*FLAGS, "--out", str(runs_folder / "whole")]) == 0
    return outcome(runs_folder / "whole")


MOMENTS = {  # what is called when the process dies, which call of it, before or after it is done
    "base model": ("tiny_dllm.diffusion_loss", 20, True),
    "line written, no checkpoint yet": ("runs.append_line", 3, False),
    "between the files of a save": ("safetensors.torch.save_file", 4, False),
    "after a save, before the older one is removed": ("runs.checkpoints", 3, True),
    "last evaluation": ("train.by_sampling_steps", 2, True),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed_is_bit_identical(uninterrupted, runs_folder, moment, tmp_path):
    target, call, before = MOMENTS[moment]
    script = tmp_path / "killed.py"
    script.write_text(SCRIPT.format(root=str(ROOT), target=target, call=call, before=before, kill=KILL))
    folder = (tmp_path if moment == "base model" else runs_folder) / moment.replace(" ", "-").replace(",", "")
    command = [sys.executable, str(script), *FLAGS, "--out", str(folder)]
    killed = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (folder / "summary.json").exists()
    assert main(["--resume", str(folder)]) == 0
    assert outcome(folder) == uninterrupted
    assert not list(folder.glob("*.tmp"))


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
    assert process.returncode == 130 and f"python train.py --resume {folder}" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert runs.checkpoints(folder)[-1].name == f"checkpoint-{steps[-1]}"
    assert main(["--resume", str(folder)]) == 0
    assert outcome(folder) == uninterrupted


def test_a_finished_run_is_not_run_again(uninterrupted, runs_folder, capsys):
    assert main(["--resume", str(runs_folder / "whole")]) == 0
    assert "finished" in capsys.readouterr().out


def test_settings_cannot_change_and_checkpoints_of_other_runs_are_refused(tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    settings = {"run": {"task": "sudoku", "model": "tiny", "seed": 3}, "algorithm": {"completion_length": 16}}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(SystemExit) as exit:
        main(["--resume", str(folder), "--seed", "4"])
    assert exit.value.code == 2 and "--seed cannot change" in capsys.readouterr().err.splitlines()[-1]
    assert main(["--resume", str(tmp_path / "nowhere")]) == 1
    assert "nowhere holds no run" in capsys.readouterr().err
    model, other = torch.nn.Linear(2, 2), torch.nn.Linear(3, 2)
    rng, generator = random.Random(0), torch.Generator()
    optimizer = torch.optim.AdamW(model.parameters())
    runs.save_checkpoint(folder, 1, 0.0, model, optimizer, rng, generator)
    with pytest.raises(ValueError, match="not a checkpoint of this run"):
        runs.load_checkpoint(folder, other, torch.optim.AdamW(other.parameters()), rng, generator)


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    model = torch.nn.Linear(2, 2)
    pieces = model, torch.optim.AdamW(model.parameters()), random.Random(0), torch.Generator()
    runs.save_checkpoint(tmp_path, 1, 0.0, *pieces)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(ValueError, match="No space left"):
        runs.save_checkpoint(tmp_path, 2, 0.0, *pieces)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert runs.load_checkpoint(tmp_path, *pieces)[0] == 1
