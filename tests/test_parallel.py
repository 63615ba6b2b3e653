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

import agrpo
import train
from support import runs
from tiny_dllm import Config, MaskedDiffusionLM

ROOT = Path(__file__).resolve().parent.parent
ON_LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
EOS, MASK, VOCAB = 0, 1, 12
ADVANTAGES = torch.tensor([1.0, -0.5, 0.75, 2.0, -1.0, 0.25])


def pieces():
    """A model, a rollout of six completions of eight tokens, and a setting with k = m: nothing is left to draw."""
    config = Config(VOCAB, MASK, EOS, d_model=16, n_layers=2, n_heads=2, mlp_hidden_size=32)
    model = MaskedDiffusionLM(config).init_weights(torch.Generator().manual_seed(0))
    setting = agrpo.AGRPOConfig(sampling_steps=4, mc_samples=4)
    ids = torch.randint(2, VOCAB, (6, 5), generator=torch.Generator().manual_seed(1))
    ids = torch.cat([ids, torch.full((6, 8), MASK)], 1)  # (6, 13)
    run = agrpo.rollout(model, ids, torch.ones_like(ids, dtype=torch.bool), setting, torch.Generator().manual_seed(2))
    return model, run, setting


def accumulate(model, run, advantages, setting):
    weights = agrpo.sample_timesteps(run, setting, torch.Generator().manual_seed(0))
    tables = {"advantages": advantages, "weights": weights}
    agrpo.accumulate_gradient(model, run, **tables, config=setting, micro_batch=3)


def gradient(model):
    """What has been accumulated in .grad, as one vector."""
    return torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in model.parameters()])


# Which completions have no advantage, and which of the six each process has: shares may differ in size.
CASES = {"all": [], "one without signal": [4, 5], "none": [0, 1, 2, 3, 4, 5]}
ROWS = [[0, 1, 2, 3], [4, 5]]


def advantages(case):
    return ADVANTAGES.index_fill(0, torch.tensor(CASES[case], dtype=torch.long), 0.0)


def worker(rank, folder):
    """What one of two processes makes of every case: {case: (a gradient before, after averaging, which)}, numbers."""
    os.environ |= ON_LOOPBACK
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results, mine = {}, torch.tensor(ROWS[rank])
    for case in CASES:
        model, run, setting = pieces()
        accumulate(model, run[mine], advantages(case)[mine], setting)
        before = any(parameter.grad is not None for parameter in model.parameters())
        runs.average_gradients(model.parameters(), share=len(mine) / 6)
        after = any(parameter.grad is not None for parameter in model.parameters())
        results[case] = before, after, gradient(model)
    rng, draws = runs.streams(0, "reinforce")
    _, common = runs.streams(0, "LoRA", common=True)
    numbers = rng.random(), draws.initial_seed(), common.initial_seed()
    merged = runs.merge_metrics({"reward": float(rank), "evaluations": 3 + rank, "ratio_error": 0.1 * rank}, 0.5)
    torch.save((results, numbers, merged), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What the two processes found."""
    folder = tmp_path_factory.mktemp("two")
    mp.spawn(worker, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_have_the_gradient_of_one(both, case):
    model, run, setting = pieces()
    accumulate(model, run, advantages(case), setting)
    expected, learns = gradient(model), case != "none"
    assert (expected.norm() > 0) == learns
    for rows, (results, *_) in zip(ROWS, both):
        before, after, found = results[case]
        assert torch.allclose(found, expected, atol=1e-6)
        assert after == learns  # without signal anywhere no optimizer step, as in one process
        assert before == any(row not in CASES[case] for row in rows)


def test_they_share_what_chooses_prompts_and_not_what_draws_completions(both):
    (_, (prompts, draws, adapter), _), (_, (same_prompts, other_draws, same_adapter), _) = both
    assert prompts == same_prompts and adapter == same_adapter and draws != other_draws


def test_their_numbers_become_one_row(both):
    for *_, merged in both:
        assert merged == {"reward": 0.5, "evaluations": 7, "ratio_error": 0.1}  # a mean, a sum, the largest


def torchrun(arguments, **environment):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    command += ["--master-port", str(20000 + os.getpid() % 10000), *map(str, arguments)]
    environment = os.environ | ON_LOOPBACK | environment
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=120)


SHORT = "--task sudoku --base-steps 20 --prompts-per-step 3 --eval-steps 4 --sampling-steps 4 --save-every 1".split()


def json_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_two_processes_leave_one_folder_and_grade_every_answer_against_its_own_question(tmp_path):
    folder = tmp_path / "run"  # with fewer questions to evaluate than processes
    arguments = [*SHORT, "--max-steps", 2, "--eval-every", 1, "--eval-prompts", 1, "--out", folder]
    result = torchrun(["train.py", *arguments])
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("done in") == 1
    assert [row["step"] for row in json_lines(folder / "metrics.jsonl")] == [1, 2]
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary["final"]) == {"sampled", "greedy"}
    assert json.loads((folder / "config.json").read_text())["processes"] == 2
    evaluation = ["--evaluate", folder, "--eval-prompts", 24]
    assert torchrun(["train.py", *evaluation, "--out", tmp_path / "two"]).returncode == 0
    assert train.main([*map(str, evaluation), "--out", str(tmp_path / "one")]) == 0
    greedy = []  # what is sampled differs: every process has random numbers of its own
    for name in ("two", "one"):
        rows = json_lines(tmp_path / name / "completions-sudoku-test-24-sampled-greedy-4.jsonl")
        assert len(rows) == 2 * 24 and [row.pop("seconds") for row in rows]
        greedy.append([row for row in rows if row["policy"] == "greedy"])
    assert greedy[0] == greedy[1] and len({row["completion"] for row in greedy[0]}) > 1


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_dying_process_ends_the_run_with_a_message(tmp_path):
    script = tmp_path / "dies.py"
    script.write_text(
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import train\n"
        "from support import runs\n"
        "save = runs.save_checkpoint\n"
        "def dying(*arguments):\n"
        "    if runs.rank() == 1:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    save(*arguments)\n"
        "runs.save_checkpoint = dying\n"
        "sys.exit(train.main(sys.argv[1:]))\n"
    )
    started = time.monotonic()
    result = torchrun([script, *SHORT, "--max-steps", 3, "--eval-prompts", 5, "--out", tmp_path / "run"])
    assert result.returncode != 0 and time.monotonic() - started < 90
    assert "train.py: process 0 of 2 ends" in result.stderr or "Signal 9 (SIGKILL)" in result.stderr
