"""The command line, tiny and whole: what a user runs, what lands in the folder, what misuse says."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import agrpo
import runs
import tasks
from agrpo import AGRPOConfig
from settings import RunConfig, parse_arguments
from train import main

ROOT = Path(__file__).resolve().parent.parent
FLAGS = "--base-steps 60 --base-batch 16 --max-steps 4 --eval-every 2 --prompts-per-step 4 --eval-prompts 40"
# Sudoku: a base model that has barely learnt to write digits gets some cells right: there is a gradient to compare.
SHORT = ["--task", "sudoku", *FLAGS.split(), "--sampling-steps", "4", "--eval-steps", "4"]


def train(*arguments):
    """In a process of its own, as a user runs it; one thread, as the tests have, so that bits can be compared."""
    command, environment = [sys.executable, "train.py", *map(str, arguments)], os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


def here(*arguments):
    """In this process, which has loaded everything already."""
    return main([*map(str, arguments)])


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A whole run, cut short: (folder, what it printed)."""
    folder = tmp_path_factory.mktemp("runs") / "sudoku"
    result = train(*SHORT, "--out", folder)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def metrics(folder):
    """metrics.jsonl without its wall-clock field."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def test_a_run_leaves_what_the_readme_promises(done):
    folder, printed = done
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["task"] == "sudoku" and summary["model"] == "tiny" and summary["seed"] == 0 and summary["steps"] == 4
    assert set(summary["base"]) == set(summary["final"]) == {"sampled", "greedy"}
    assert summary["by_sampling_steps"]["4"] == {"base": summary["base"], "final": summary["final"]}
    assert all(0 <= x <= 1 for x in summary["final"].values()) and summary["seconds"] > 0
    assert [row["step"] for row in metrics(folder)] == [1, 2, 3, 4]
    assert any(row["signal"] > 0 and row["gradient_norm"] > 0 for row in metrics(folder))  # not all zeros
    assert [("validation" in row) for row in metrics(folder)] == [False, True, False, True]
    assert json.loads((folder / "config.json").read_text())["algorithm"]["sampling_steps"] == 4
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "model" / "model.safetensors").exists() and not list(folder.rglob("*.tmp"))
    assert "before step 0   ________________" in printed and printed.splitlines()[-1].startswith("done in ")


def test_the_same_seed_gives_the_same_bits_with_a_fresh_and_with_a_reused_base(done, tmp_path, capsys):
    folder, _ = done
    assert here(*SHORT, "--out", folder.parent / "reused") == 0 and "reusing" in capsys.readouterr().out
    assert here(*SHORT, "--out", tmp_path / "fresh") == 0 and "reusing" not in capsys.readouterr().out
    for other in (tmp_path / "fresh", folder.parent / "reused"):
        assert metrics(other) == metrics(folder)
        for name in ("base", "final", "by_sampling_steps"):
            assert (
                json.loads((other / "summary.json").read_text())[name]
                == json.loads((folder / "summary.json").read_text())[name]
            )
        assert (other / "model" / "model.safetensors").read_bytes() == (
            folder / "model" / "model.safetensors"
        ).read_bytes()


def test_another_seed_gives_other_numbers(done, tmp_path):
    folder, _ = done
    assert here(*SHORT, "--seed", 1, "--max-steps", 1, "--out", tmp_path / "run") == 0
    assert metrics(tmp_path / "run")[0] != metrics(folder)[0]


def test_a_finished_run_answers_a_typed_question_and_is_measured_again(done, capsys):
    folder, _ = done
    assert here("--evaluate", folder, "--prompt", "0310 2004 0400 1043") == 0
    printed = capsys.readouterr().out
    assert "before step 1" in printed and "answer" in printed
    assert here("--evaluate", folder, "--eval-prompts", 40, "--eval-policies", "sampled", "greedy") == 0
    final, printed = json.loads((folder / "summary.json").read_text())["final"], capsys.readouterr().out
    assert f"{final['sampled']:.1%}" in printed and f"{final['greedy']:.1%}" in printed


def test_settings_can_be_chosen_without_reading_the_test_questions(tmp_path, monkeypatch, capsys):
    read = []
    load = tasks.Countdown.load
    monkeypatch.setattr(tasks.Countdown, "load", lambda self, split, data=None: read.append(split) or load(self, split))
    flags = "--base-steps 3 --base-batch 8 --max-steps 1 --eval-steps 2 --eval-prompts 20 --eval-split validation"
    assert main([*flags.split(), "--out", str(tmp_path / "run")]) == 0
    assert "validation" in read and "test" not in read
    assert "test accuracy" not in capsys.readouterr().out


def test_want_of_memory_names_the_flag_to_lower(tmp_path, monkeypatch, capsys):
    def rollout(*_):
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    monkeypatch.setattr(agrpo, "rollout", rollout)
    assert here(*SHORT, "--base-steps", 1, "--out", tmp_path / "run") == 1
    assert "--tokens-per-pass" in capsys.readouterr().err.splitlines()[-1]


def test_tensorboard_gets_every_number(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track = runs.Tracker("tensorboard", tmp_path, {}, done=0)
    track(1, {"reward": 0.5, "validation": {"greedy": 0.25}})
    track.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Scalars("reward")[0].value == 0.5 and events.Scalars("validation/greedy")[0].value == 0.25


def test_a_missing_tracker_is_asked_for_before_anything_runs(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        parse_arguments(["--tracker", "wandb"])
    assert "pip install wandb" in capsys.readouterr().err.splitlines()[-1]


def test_the_commands_it_prints_work_where_they_are_pasted(monkeypatch):
    folder = os.path.dirname(sys.executable)
    monkeypatch.setenv("PATH", folder)  # an activated environment
    assert runs.command(1) == "python train.py"
    monkeypatch.setenv("PATH", "/nowhere")
    assert runs.command(1) == f"{os.path.relpath(sys.executable)} train.py"


def test_runs_that_start_together_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [runs.new_folder("", "countdown-seed0") for _ in range(3)]
    assert [str(folder) for folder in folders] == [f"runs/countdown-seed0{end}" for end in ("", "-2", "-3")]


def test_countdown_without_policy_gradients_is_the_supervised_control(tmp_path):
    flags = "--base-steps 12 --base-batch 16 --max-steps 0 --eval-steps 2 --eval-prompts 40"
    assert here(*flags.split(), "--out", tmp_path / "run") == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["task"] == "countdown" and summary["steps"] == 0 and summary["final"] == summary["base"]
    assert metrics(tmp_path / "run") == [] and (tmp_path / "run" / "curve.png").exists()


@pytest.mark.parametrize("algorithm", ["agrpo-sa", "egspo", "egspo-sa"])
def test_every_algorithm_is_the_same_loop_with_other_settings(tmp_path, algorithm):
    flags = "--task sudoku --base-steps 40 --base-batch 32 --max-steps 2 --eval-steps 8 --eval-prompts 8 --eval-every 9"
    sizes = "--prompts-per-step 4 --mc-samples 2 --eval-split validation"
    folder = tmp_path.parent / algorithm  # side by side: they share the base model
    assert here(*flags.split(), *sizes.split(), "--algorithm", algorithm, "--out", folder) == 0
    rows = metrics(folder)
    assert len(rows) == 2 and all(0 < row["evaluations"] <= 4 * 8 * 2 and row["ratio_error"] < 1e-5 for row in rows)


def test_algorithms_have_their_published_defaults():
    _, config = parse_arguments(["--model", "llada", "--task", "gsm8k", "--algorithm", "egspo-sa"])
    assert (config.importance_sampling, config.mc_samples, config.epsilon_high) == ("top_entropy", 8, 0.5)
    assert (config.beta, config.step_baseline, config.unmasking) == (0.04, "constant", "low_confidence")
    assert config.step_coefficient == pytest.approx(0.5 / (1 + 0.5)) and config.top_k == 0
    run_config, config = parse_arguments(["--model", "llada", "--task", "gsm8k"])
    assert config.importance_sampling == "entropy" and config.step_baseline == "none" and run_config.lora_rank == 64


def test_help_is_short_and_names_every_option(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    lines = capsys.readouterr().out.splitlines()
    flags = ["--" + f.name.replace("_", "-") for cls in (RunConfig, AGRPOConfig) for f in dataclasses.fields(cls)]
    assert len(lines) < 120 and all(any(line.strip().startswith(flag) for line in lines) for flag in flags)


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["--task", "chess"], "countdown, sudoku"),
        (["--task", "gsm8k"], "countdown, sudoku"),
        (["--model", "llada", "--task", "chess"], "gsm8k"),
        (["--lora-rank", "4"], "--lora-rank"),
        (["--tracker", "paper"], "wandb"),
        (["--save-completions"], "--evaluate"),
        (["--evaluate", "a", "--resume", "b"], "choose one"),
        (["--eval-policies", "best"], "greedy"),
        (["--evaluate", "a", "--prompt", ""], "empty"),
        (["--adam-beta2", "1"], "[0, 1)"),
        (["--sampling-steps", "9"], "exceeds"),
        (["--mc-samples", "0"], "mc_samples"),
        (["--num-generations", "1"], "group"),
        (["--block-length", "3"], "multiple"),
        (["--unmasking", "low_confidence", "--top-k", "4"], "--top-k 0"),
        (["--algorithm", "grpo"], "egspo-sa"),
        (["--allocation", "batch", "--beta", "0.1"], "uniform_share"),
        (["--allocation", "batch", "--importance-sampling", "top_entropy"], "top_entropy"),
        (["--allocation", "batch", "--no-low-discrepancy"], "low_discrepancy"),
        (["--uniform-share", "2"], "[0, 1]"),
        (["--temperature", "0"], "evaluation"),
        (["--prompt", "1 2 3 = 6"], "--evaluate"),
        (["--completion-length", "6"], "need 8"),
        (["--learning-rate", "nan"], "finite"),
        (["--max-steps", "-1"], "negative"),
        (["--base-noise", "1.5"], "[0, 1]"),
        (["--top-p", "0.9"], "top_k"),
        (["--eval-steps", "16"], "--eval-steps 16"),
        (["--max-steps", "x"], "invalid"),
        (["--steps", "3"], "--steps"),
    ],
)
def test_misuse_says_one_line_and_exits_with_2(arguments, word, capsys):
    with pytest.raises(SystemExit) as exit:
        parse_arguments(arguments)
    assert exit.value.code == 2 and word in capsys.readouterr().err.splitlines()[-1]


def test_other_failures_say_one_line_and_exit_with_1(done, tmp_path, capsys):
    folder, _ = done
    (tmp_path / "broken").mkdir()
    for name in ("config.json", "summary.json"):
        (tmp_path / "broken" / name).write_text("{}")
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.json").write_bytes((folder / "config.json").read_bytes())
    for arguments, word in (
        ([*SHORT, "--out", folder], "already holds a run"),
        (["--evaluate", tmp_path / "broken"], "broken"),
        (["--evaluate", tmp_path / "unfinished"], "no finished run"),
        (["--evaluate", folder, "--prompt", "what is 2 + 2?"], "a valid question is"),
    ):
        assert here(*arguments) == 1
        assert word in capsys.readouterr().err.splitlines()[-1]
    result = train("--evaluate", tmp_path / "nowhere" / "at all")
    assert result.returncode == 1 and "nowhere" in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr
