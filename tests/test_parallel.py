"""Several processes: the gradient is that of one process with the whole batch, and a dying one ends the run."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import EOS, MASK, VOCAB, gradient, make_config, make_rollout

import agrpo
import runs
import train
from tiny_dllm import Config, MaskedDiffusionLM

ROOT = Path(__file__).resolve().parent.parent
ON_LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}


def pieces():
    """A model, a rollout of six completions, and a setting with k = m, so that nothing is left to draw."""
    config = Config(VOCAB, MASK, EOS, d_model=16, n_layers=2, n_heads=2, mlp_hidden_size=32)
    model = MaskedDiffusionLM(config).init_weights(torch.Generator().manual_seed(0))
    setting = make_config(mc_samples=4)
    return model, make_rollout(model, setting), setting


def worker(rank, folder, advantages, rows):
    os.environ |= ON_LOOPBACK
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, run, setting = pieces()
    mine = torch.tensor(rows[rank])
    agrpo.accumulate_gradient(model, run[mine], advantages[mine], setting, torch.Generator().manual_seed(0), 3)
    before = any(parameter.grad is not None for parameter in model.parameters())
    runs.average_gradients(model.parameters(), share=len(mine) / 6)
    after = any(parameter.grad is not None for parameter in model.parameters())
    rng, draws = train.streams(0, "reinforce")
    _, common = train.streams(0, "LoRA", common=True)
    numbers = rng.random(), draws.initial_seed(), common.initial_seed()
    torch.save((before, after, gradient(model), numbers), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("zeros", [[], [4, 5], [0, 1, 2, 3, 4, 5]], ids=["all", "one without signal", "none"])
def test_two_processes_have_the_gradient_of_one(tmp_path, zeros):
    advantages = torch.tensor([1.0, -0.5, 0.75, 2.0, -1.0, 0.25])
    advantages[zeros] = 0
    rows = [[0, 1, 2, 3], [4, 5]]  # shares may differ in size
    model, run, setting = pieces()
    agrpo.accumulate_gradient(model, run, advantages, setting, torch.Generator().manual_seed(0), 3)
    expected = gradient(model)
    mp.spawn(worker, (str(tmp_path), advantages, rows), nprocs=2)
    numbers = []
    for rank in (0, 1):
        before, after, found, random_numbers = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        numbers.append(random_numbers)
        assert torch.allclose(found, expected, atol=1e-6)
        assert after == (len(zeros) < 6)  # without signal anywhere no optimizer step, as in one process
        assert before == any(row not in zeros for row in rows[rank])
    (prompts, draws, adapter), (same_prompts, other_draws, same_adapter) = numbers
    assert prompts == same_prompts and adapter == same_adapter and draws != other_draws


def torchrun(arguments, **environment):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    command += ["--master-port", str(20000 + os.getpid() % 10000), *map(str, arguments)]
    environment = os.environ | ON_LOOPBACK | environment
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=120)


SHORT = (
    "--task sudoku --base-steps 30 --base-batch 16 --prompts-per-step 3 --eval-steps 4 --sampling-steps 4 "
    "--save-every 1"
)


def json_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_two_processes_leave_one_folder_and_grade_every_answer_against_its_own_question(tmp_path):
    arguments = [*SHORT.split(), "--max-steps", 2, "--eval-every", 1, "--eval-prompts", 1, "--out", tmp_path / "run"]
    result = torchrun(["train.py", *arguments])  # with fewer questions to evaluate than processes
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("done in") == 1
    assert [row["step"] for row in json_lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert set(summary["final"]) == {"sampled", "greedy"}
    assert json.loads((tmp_path / "run" / "config.json").read_text())["processes"] == 2
    evaluation = ["--evaluate", tmp_path / "run", "--save-completions", "--eval-prompts", 25]
    assert torchrun(["train.py", *evaluation, "--out", tmp_path / "two"]).returncode == 0
    assert train.main([*map(str, evaluation), "--out", str(tmp_path / "one")]) == 0
    two, one = (json_lines(tmp_path / name / "completions-sudoku.jsonl") for name in ("two", "one"))
    assert len(one) == 25 and [row.pop("seconds") for row in (*one, *two)] and two == one


def test_a_dying_process_ends_the_run_with_a_message(tmp_path):
    script = tmp_path / "dies.py"
    script.write_text(
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import runs, train\n"
        "save = runs.save_checkpoint\n"
        "def dying(*arguments):\n"
        "    if runs.rank() == 1:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    save(*arguments)\n"
        "runs.save_checkpoint = dying\n"
        "sys.exit(train.main(sys.argv[1:]))\n"
    )
    started = time.monotonic()
    result = torchrun([script, *SHORT.split(), "--max-steps", 3, "--eval-prompts", 5, "--out", tmp_path / "run"])
    assert result.returncode != 0 and time.monotonic() - started < 90
    assert "train.py: process 0 of 2 ends" in result.stderr or "Signal 9 (SIGKILL)" in result.stderr
