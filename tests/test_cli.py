"""The command line, tiny and whole: what a user runs, what lands in the folder, what misuse says."""

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import json_lines, last_line

import agrpo
import tasks
from agrpo import AGRPOConfig
from support import runs, settings
from support.settings import RunConfig, parse_arguments
from train import main

ROOT = Path(__file__).resolve().parent.parent
# Sudoku: a base model that has barely learnt to write digits gets some cells right: there is a gradient to compare.
SHORT = (
    "--task sudoku --base-steps 40 --max-steps 4 --eval-every 2 --prompts-per-step 4 --eval-prompts 40 "
    "--sampling-steps 4 --eval-steps 4"
).split()


def train(*arguments):
    """In a process of its own, as a user runs it; one thread, as the tests have, so that bits can be compared."""
    command, environment = [sys.executable, "train.py", *map(str, arguments)], os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


def here(*arguments):
    """In this process, which has loaded everything already."""
    return main([*map(str, arguments)])


def metrics(folder):
    """metrics.jsonl without its wall-clock field."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in json_lines(folder / "metrics.jsonl")]


def shared(tmp_path_factory):
    """The folder of all short runs of Sudoku in these tests: side by side they share the base model."""
    (folder := tmp_path_factory.getbasetemp() / "sudoku").mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A whole run, cut short: (folder, what it printed)."""
    folder = shared(tmp_path_factory) / "cli"
    result = train(*SHORT, "--out", folder)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


@pytest.fixture(scope="module")
def countdown(tmp_path_factory):
    """A run of Countdown without policy gradients."""
    folder = tmp_path_factory.mktemp("runs") / "countdown"
    assert here(*"--base-steps 20 --max-steps 0 --eval-steps 2 --eval-prompts 40 --out".split(), folder) == 0
    return folder


# ---- What a run leaves -------------------------------------------------------------------------


def test_a_run_leaves_what_the_readme_promises(done):
    folder, printed = done
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["task"] == "sudoku" and summary["model"] == "tiny" and summary["seed"] == 0 and summary["steps"] == 4
    assert set(summary["base"]) == set(summary["final"]) == {"sampled", "greedy"}
    assert summary["by_sampling_steps"]["4"] == {"base": summary["base"], "final": summary["final"]}
    assert all(0 <= x <= 1 for x in summary["final"].values()) and summary["seconds"] > 0
    assert [row["step"] for row in metrics(folder)] == [1, 2, 3, 4]
    assert any(row["signal"] > 0 and row["gradient_norm"] > 0 for row in metrics(folder))  # not all zeros
    assert all(row["ratio_error"] < 1e-5 and row["clip_fraction"] == 0 for row in metrics(folder))
    assert [("validation" in row) for row in metrics(folder)] == [False, True, False, True]
    assert json.loads((folder / "config.json").read_text())["algorithm"]["sampling_steps"] == 4
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "model" / "model.safetensors").exists() and not list(folder.rglob("*.tmp"))
    assert "before step 0   ________________" in printed and printed.splitlines()[-1].startswith("done in ")


def test_the_same_seed_gives_the_same_bits_with_a_fresh_and_with_a_reused_base(done, tmp_path, capsys):
    folder, _ = done
    assert here(*SHORT, "--out", folder.parent / "reused") == 0 and "reusing" in capsys.readouterr().out
    assert here(*SHORT, "--out", tmp_path / "fresh") == 0 and "reusing" not in capsys.readouterr().out
    summary = json.loads((folder / "summary.json").read_text())
    for other in (tmp_path / "fresh", folder.parent / "reused"):
        assert metrics(other) == metrics(folder)
        again = json.loads((other / "summary.json").read_text())
        assert all(again[name] == summary[name] for name in ("base", "final", "by_sampling_steps"))
        weights = [(run / "model" / "model.safetensors").read_bytes() for run in (other, folder)]
        assert weights[0] == weights[1]


def test_another_seed_gives_other_numbers(tmp_path):
    flags = "--base-steps 3 --max-steps 1 --eval-steps 2 --eval-prompts 20".split()
    assert [here(*flags, "--seed", seed, "--out", tmp_path / str(seed)) for seed in (0, 1)] == [0, 0]
    assert metrics(tmp_path / "0")[0]["entropy"] != metrics(tmp_path / "1")[0]["entropy"]


def test_countdown_without_policy_gradients_is_the_supervised_control(countdown):
    summary = json.loads((countdown / "summary.json").read_text())
    assert summary["task"] == "countdown" and summary["steps"] == 0 and summary["final"] == summary["base"]
    assert metrics(countdown) == [] and (countdown / "curve.png").exists()


def test_settings_can_be_chosen_without_reading_the_test_questions(tmp_path, monkeypatch, capsys):
    read = []
    load = tasks.Countdown.load
    monkeypatch.setattr(tasks.Countdown, "load", lambda self, split, *_: read.append(split) or load(self, split))
    flags = "--base-steps 3 --max-steps 1 --eval-steps 2 --eval-prompts 20 --eval-split validation"
    assert here(*flags.split(), "--out", tmp_path / "run") == 0
    assert "validation" in read and "test" not in read
    assert "test accuracy" not in capsys.readouterr().out


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


# ---- Asking and measuring a finished run -------------------------------------------------------


def test_a_finished_run_answers_a_typed_question(done, capsys):
    assert here("--evaluate", done[0], "--prompt", "0310 2004 0400 1043") == 0
    printed = capsys.readouterr().out
    assert "before step 1" in printed and "answer" in printed


def test_a_finished_run_is_measured_again_and_every_answer_is_saved(done, capsys):
    folder, _ = done
    assert here("--evaluate", folder, "--eval-prompts", 40) == 0
    final, printed = json.loads((folder / "summary.json").read_text())["final"], capsys.readouterr().out
    assert f"{final['sampled']:.1%}" in printed and f"{final['greedy']:.1%}" in printed
    report = json.loads((folder / "evaluation-sudoku-test-40-sampled-greedy-4.json").read_text())
    answers = json_lines(folder / "completions-sudoku-test-40-sampled-greedy-4.jsonl")
    for row in report["rows"]:
        own = [a for a in answers if (a["steps"], a["policy"]) == (row["steps"], row["policy"])]
        assert len(own) == row["answers"] == 40 and row["accuracy"] == final[row["policy"]]
        assert sum(a["correct"] for a in own) / 40 == row["accuracy"]
        assert all(a["prompt"] and isinstance(a["completion"], str) and 0 <= a["length"] <= 16 for a in own)
    assert [(row["steps"], row["policy"]) for row in report["rows"]] == [(4, "sampled"), (4, "greedy")]
    assert len(answers) == 80


def test_infilling_keeps_the_given_characters_from_the_first_state_on(countdown, capsys):
    assert here("--evaluate", countdown, "--prompt", "03 07 12=16", "--template", "[2]+[2]-[2]") == 0
    lines = capsys.readouterr().out.splitlines()
    states = [line.split()[-1] for line in lines if "before step" in line or "finished" in line]
    assert len(states) == 3 and states[0] == "__+__-__" and "_" not in states[-1]  # Countdown: m = 2
    assert all(state[2] == "+" and state[5] == "-" for state in states)
    assert [state.count("_") for state in states] == [6, 3, 0]
    written = [(a, b) for state, later in zip(states, states[1:]) for a, b in zip(state, later)]
    assert all(a in ("_", b) for a, b in written)  # what was written stays
    assert next(line for line in lines if "answer" in line).split()[1] == states[-1].replace(".", "")


def test_a_whole_answer_but_one_token_may_be_given(countdown, capsys):
    assert here("--evaluate", countdown, "--prompt", "03 07 12=16", "--template", "12+07-0[1]") == 0
    printed = capsys.readouterr().out
    assert "before step 0   12+07-0_" in printed and re.search(r"finished +12\+07-0[^_]\n", printed)


@pytest.mark.parametrize("template", ["", "+-", "[0]", "[]+[k]-[-2]", "12+07-03"])
def test_a_template_that_leaves_nothing_to_write_is_refused(template, capsys):
    with pytest.raises(SystemExit) as exit:
        parse_arguments(["--evaluate", "run", "--prompt", "03 07 12=16", "--template", template])
    assert exit.value.code == 2 and "no [k] says how many tokens to write" in last_line(capsys)


@pytest.mark.parametrize("template, named", [("[2]x[2]", "'x'"), ("[2]+[y]", "'+[y]'"), ("[2]+[2", "'+[2'")])
def test_a_template_of_characters_that_the_model_has_not_is_refused(countdown, template, named, capsys):
    assert here("--evaluate", countdown, "--prompt", "03 07 12=16", "--template", template) == 1
    assert f"the model has no token for {named}" in last_line(capsys)


# ---- What goes wrong ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["--task", "chess"], "countdown, sudoku"),
        (["--task", "gsm8k"], "countdown, sudoku"),
        (["--model", "llada", "--task", "chess"], "gsm8k"),
        (["--lora-rank", "4"], "--lora-rank"),
        (["--tracker", "paper"], "wandb"),
        (["--evaluate", "a", "--resume", "b"], "choose one"),
        (["--prompt", "1 2 3 = 6"], "--evaluate"),
        (["--evaluate", "a", "--prompt", ""], "empty"),
        (["--evaluate", "a", "--template", "[2]"], "--prompt"),
        (["--sampling-steps", "9"], "exceeds"),
        (["--mc-samples", "0"], "mc_samples"),
        (["--num-generations", "1"], "num_generations is 1: at least 2"),
        (["--block-length", "3"], "multiple"),
        (["--block-length", "0"], "block_length"),
        (["--unmasking", "highest"], "low_confidence"),
        (["--algorithm", "grpo"], "egspo-sa"),
        (["--importance-sampling", "top_entropy"], "uniform or entropy"),
        (["--temperature", "0"], "evaluation"),
        (["--temperature", "nan"], "temperature"),
        (["--top-k", "-1"], "top_k"),
        (["--top-p", "0"], "(0, 1]"),
        (["--epsilon-low", "1.5"], "at most 1"),
        (["--beta", "nan"], "--beta"),
        (["--entropy-bonus", "-0.1"], "--entropy-bonus"),
        (["--completion-length", "6"], "need 8"),
        (["--learning-rate", "nan"], "finite"),
        (["--gradient-clip", "0"], "--gradient-clip"),
        (["--prompts-per-step", "0"], "--prompts-per-step"),
        (["--max-steps", "-1"], "negative"),
        (["--max-steps", "x"], "invalid"),
        (["--eval-steps", "16"], "--eval-steps 16"),
        (["--eval-steps", "0"], "--eval-steps 0"),
        (["--eval-split", "train"], "test, validation"),
        (["--steps", "3"], "--steps"),
    ],
)
def test_misuse_says_one_line_and_exits_with_2(arguments, word, capsys):
    with pytest.raises(SystemExit) as exit:
        parse_arguments(arguments)
    assert exit.value.code == 2 and word in last_line(capsys)


def test_what_only_presets_set_is_no_flag(capsys):
    gone = "horizon normalization allocation uniform-share step-baseline step-coefficient save-completions".split()
    presets = [field.name.replace("_", "-") for field in dataclasses.fields(RunConfig)]
    for name in [*gone, *presets[presets.index("schedule") :]]:
        with pytest.raises(SystemExit) as exit:
            parse_arguments([f"--{name}", "1"])
        assert exit.value.code == 2 and f"unrecognized arguments: --{name} 1" in last_line(capsys)


def test_other_failures_say_one_line_and_exit_with_1(done, tmp_path, capsys):
    folder, _ = done
    (tmp_path / "broken").mkdir()
    for name in ("config.json", "summary.json"):
        (tmp_path / "broken" / name).write_text("{}")
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.json").write_bytes((folder / "config.json").read_bytes())
    for arguments, word in (
        ([*SHORT, "--out", folder], "is not empty: choose another, or remove it, or --resume"),
        (["--evaluate", tmp_path / "broken"], "broken"),
        (["--evaluate", tmp_path / "unfinished"], "no finished run"),
        (["--evaluate", folder, "--prompt", "what is 2 + 2?"], "a valid question is"),
        (["--evaluate", tmp_path / "nowhere" / "at all"], "nowhere"),
    ):
        assert here(*arguments) == 1
        assert word in last_line(capsys)


def test_want_of_memory_names_the_flag_to_lower(tmp_path, monkeypatch, capsys):
    def rollout(*_):
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    monkeypatch.setattr(agrpo, "rollout", rollout)
    assert here("--base-steps", 1, "--out", tmp_path / "run") == 1
    assert "--tokens-per-pass" in last_line(capsys)


# ---- --help, and what starting costs -----------------------------------------------------------


def test_help_is_short_names_every_option_and_has_at_most_45(capsys, monkeypatch):
    parsers, parse = [], argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda *a: parsers.append(a[0]) or parse(*a))
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        parse_arguments(["--help"], sys.modules["train"].__doc__)
    lines = capsys.readouterr().out.splitlines()
    shown = {line.split()[0] for line in lines if line.startswith("  --")}
    run = [field.name for field in dataclasses.fields(RunConfig)]
    names = run[: run.index("schedule")] + [field.name for field in dataclasses.fields(AGRPOConfig)]
    assert {option.rstrip(",") for option in shown} == {settings.flag(name) for name in names}
    options = parsers[0]._actions  # hidden ones too
    assert len(options) == len(shown) + 1 <= 45 and all(action.help for action in options)
    assert len(lines) < 130 and max(map(len, lines)) <= 120


def test_starting_loads_nothing_but_torch():
    """So that --help and mistakes are answered at once: what is heavy is imported where it is used."""
    heavy = "transformers", "tokenizers", "peft", "datasets", "matplotlib", "safetensors", "math_verify", "wandb"
    script = f"import sys, train; train.parse_arguments([]); print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


# ---- Trackers ----------------------------------------------------------------------------------


def test_a_missing_tracker_is_asked_for_before_anything_runs(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit):
        parse_arguments(["--tracker", "wandb"])
    assert "pip install wandb" in last_line(capsys)


def test_tensorboard_gets_every_number(tmp_path, monkeypatch):
    sent = []

    class SummaryWriter:
        def __init__(self, folder, purge_step, **_):
            sent.append((folder, purge_step))

        def add_scalar(self, *scalar):
            sent.append(scalar)

        def flush(self):
            pass

    fake = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    track = runs.tracker("tensorboard", tmp_path, {}, done=2)
    track(3, {"reward": 0.5, "validation": {"greedy": 0.25}})
    assert sent == [(str(tmp_path), 3), ("reward", 0.5, 3), ("validation/greedy", 0.25, 3)]


def test_wandb_gets_every_number_and_its_failure_is_one_line(tmp_path, monkeypatch):
    sent = []
    run = types.SimpleNamespace(log=lambda metrics, step: sent.append((metrics, step)))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **options: run))
    runs.tracker("wandb", tmp_path, {}, done=0)(1, {"reward": 0.5, "validation": {"greedy": 0.25}})
    assert sent == [({"reward": 0.5, "validation/greedy": 0.25}, 1)]
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **options: 1 / 0))
    with pytest.raises(ValueError, match="--tracker wandb"):
        runs.tracker("wandb", tmp_path, {}, done=0)
    runs.tracker("", tmp_path, {}, done=0)(1, {"reward": 0.5})  # none: nothing happens
