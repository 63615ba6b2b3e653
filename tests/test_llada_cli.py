"""The commands that post-train and evaluate LLaDA, on a small random checkpoint of its structure."""

import csv
import json
import shutil
import sys
import types
from pathlib import Path

import pytest
from conftest import json_lines, last_line, run
from llada_folder import make_llada_folder

import train
from support import runs, settings
from support.settings import parse_arguments
from support.words import TASKS

ROOT = Path(__file__).resolve().parent.parent
SHORT = (
    "--completion-length 24 --block-length 8 --sampling-steps 12 --mc-samples 3 --eval-steps 4 --prompts-per-step 2 "
    "--num-generations 2 --max-steps 2 --eval-every 2 --eval-prompts 3 --lora-rank 2"
).split()


SMALL = {"eval_length": 16, "eval_block": 8, "eval_steps": (4,), "sampling_steps": 8}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def short_answers(monkeypatch):
    """LLaDA's presets measure answers of 256 tokens, for which there is no flag."""
    for key in [key for key in settings.PRESETS if key[0] == "llada"]:
        monkeypatch.setitem(settings.PRESETS, key, settings.PRESETS[key] | SMALL)


@pytest.fixture(scope="module")
def llada(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llada")
    make_llada_folder(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A small file of each task's columns."""
    folder = tmp_path_factory.mktemp("data")
    gsm8k = [{"question": f"What is {i} + 1?", "answer": f"It is one more.\n#### {i + 1:,}"} for i in range(990, 1030)]
    math = [{"problem": f"Solve x = {i}.", "answer": rf"\frac{{{i}}}{{1}}", "level": 2} for i in range(40)]
    countdown = [{"input": f"{i},2,3", "output": str(i + 5)} for i in range(40)]
    with open(folder / "sudoku.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["Puzzle", "Solution"])
        rows.writerows([e["puzzle"], e["solution"]] for e in TASKS["sudoku"].load("test")[:40])
    return {
        "gsm8k": write_jsonl(folder / "gsm8k.jsonl", gsm8k),
        "math": write_jsonl(folder / "math.jsonl", math),
        "countdown": write_jsonl(folder / "countdown.jsonl", countdown),
        "sudoku": str(folder / "sudoku.csv"),
    }


# ---- Training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["gsm8k", "math", "countdown", "sudoku"])
def test_every_task_trains_and_is_evaluated_from_a_file(llada, data, task, tmp_path, capsys, short_answers):
    pytest.importorskip("peft")
    folder = tmp_path / "run"
    command = ["--model", llada, "--task", task, "--data", data[task], *SHORT, "--out", folder]
    assert run(*command) == 0, capsys.readouterr().err
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["model"] == llada and set(summary["final"]) == {"sampled", "greedy"}
    stored = json.loads((folder / "config.json").read_text())
    assert stored["run"]["lora_rank"] == 2 and stored["run"]["learning_rate"] == 5e-6  # LLaDA's preset
    assert stored["versions"]["torch"] and "commit" in stored
    if (ROOT / ".git").exists() and shutil.which("git"):  # a downloaded zip has no commit
        assert stored["commit"]
    assert (folder / "model" / "adapter_model.safetensors").exists()
    assert not (folder / "model" / "model.safetensors").exists()
    other = tmp_path / Path(data[task]).name
    other.write_text(Path(data[task]).read_text() + "\n")  # a byte more: the same file would be asked in part
    measured_on_another_file(folder, task, other, capsys)
    assert run("--evaluate", folder, "--eval-steps", "2") == 0  # of the run's own file what was held out
    held_out = TASKS[task].load("test", data[task])
    rows = json.loads((folder / f"evaluation-{task}-{task}-test-{len(held_out)}-greedy-2.json").read_text())["rows"]
    assert rows[0]["answers"] == len(held_out) < len(TASKS[task].read(data[task]))


def measured_on_another_file(folder, task, file, capsys):
    """A run measured on another file: all of it, and every answer saved."""
    capsys.readouterr()
    assert run("--evaluate", folder, "--eval-steps", "2", "4", "--data", file, "--eval-prompts", "5") == 0
    printed = capsys.readouterr().out
    assert "tokens per answer" in printed and "seconds per answer" in printed
    rows = json.loads((folder / f"evaluation-{task}-{task}-5-greedy-2-4.json").read_text())["rows"]
    assert [(row["steps"], row["policy"], row["answers"]) for row in rows] == [(2, "greedy", 5), (4, "greedy", 5)]
    answers = json_lines(folder / f"completions-{task}-{task}-5-greedy-2-4.jsonl")
    assert len(answers) == 10 and answers[0].keys() >= {"prompt", "completion", "correct", "length"}


@pytest.mark.parametrize("algorithm", ["egspo-sa", "agrpo-sa", "paper"])
def test_the_other_algorithms_train_it_too(llada, algorithm, tmp_path, short_answers):
    """Low-confidence unmasking in blocks, its KL to the adapter's absence, r_t: all on LLaDA's structure."""
    pytest.importorskip("peft")
    flags = [*SHORT, "--num-generations", "3", "--out", tmp_path / "run"]
    assert run("--model", llada, "--task", "countdown", "--algorithm", algorithm, *flags) == 0
    stored = json.loads((tmp_path / "run" / "config.json").read_text())["run"]
    assert stored["algorithm"] == algorithm
    assert stored["unmasking"] == ("low_confidence" if algorithm == "egspo-sa" else "random")
    row = json_lines(tmp_path / "run" / "metrics.jsonl")[0]
    # No answer of a random model is right: without advantage the KL alone asks for steps.
    assert (row["evaluations"] > 0) == (algorithm == "egspo-sa" or row["signal"] > 0) and row["ratio_error"] < 1e-5


def test_training_every_weight_and_continuing_an_adapter(llada, tmp_path, short_answers):
    pytest.importorskip("peft")
    common = ["--model", llada, "--task", "countdown", *SHORT]
    assert run(*common, "--lora-rank", "0", "--beta", "0.1", "--out", tmp_path / "full") == 0
    assert (tmp_path / "full" / "model" / "model.safetensors").exists()
    assert run(*common, "--out", tmp_path / "adapter") == 0
    common[1] = tmp_path / "adapter" / "model"
    assert run(*common, "--beta", "0.1", "--out", tmp_path / "more") == 0
    stored = json.loads((tmp_path / "more" / "model" / "adapter_config.json").read_text())
    assert stored["base_model_name_or_path"] == llada


@pytest.mark.slow
def test_a_sharded_folder_and_one_file_train_alike(tmp_path, short_answers):
    pytest.importorskip("peft")
    rows = []
    for shards in (1, 3):
        folder, out = tmp_path / str(shards), tmp_path / f"run{shards}"
        folder.mkdir()
        make_llada_folder(folder, shards)
        assert run("--model", folder, "--task", "countdown", *SHORT, "--out", out) == 0
        rows.append([{k: v for k, v in row.items() if k != "seconds"} for row in json_lines(out / "metrics.jsonl")])
    assert rows[0] == rows[1]


def test_an_adapter_is_resumed_to_the_same_bits(llada, tmp_path, short_answers, monkeypatch):
    pytest.importorskip("peft")
    # No answer of a random model is right; the bonus alone gives it a gradient.
    command = ["--model", llada, "--task", "countdown", "--entropy-bonus", "0.1", *SHORT, "--out"]
    assert run(*command, tmp_path / "whole") == 0
    save = runs.save_checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(runs, "save_checkpoint", lambda *everything: save(*everything) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(*command, tmp_path / "stopped")
    assert len(json_lines(tmp_path / "stopped" / "metrics.jsonl")) == 1
    assert run("--resume", tmp_path / "stopped") == 0
    adapters = [tmp_path / name / "model" / "adapter_model.safetensors" for name in ("whole", "stopped")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    assert all(row["gradient_norm"] > 0 for row in json_lines(tmp_path / "stopped" / "metrics.jsonl"))


def test_grids_of_a_later_test_can_be_kept_out_of_training(llada, data):
    settings, _ = parse_arguments(["--model", llada, "--task", "sudoku", "--exclude", data["sudoku"]])
    task = TASKS["sudoku"]
    held = {example["solution"] for example in task.read(data["sudoku"])}
    examples = task.load("test")  # 60 grids, of which the file has some
    kept = train.allowed(examples, task, settings)
    assert kept and len(kept) < len(examples) and not held & {example["solution"] for example in kept}


def test_the_papers_settings_are_the_defaults_for_llada():
    run, config = parse_arguments(["--model", "llada", "--task", "gsm8k"])
    assert (run.completion_length, config.block_length, config.sampling_steps) == (384, 12, 128)
    assert (config.temperature, config.top_p, config.top_k, config.mc_samples) == (0.6, 0.99, 150, 24)
    assert config.importance_sampling == "entropy" and config.low_discrepancy
    assert run.beta == 0 and run.unmasking == "random" and run.algorithm == "agrpo"
    assert (run.learning_rate, run.adam_beta2, run.gradient_clip) == (5e-6, 0.99, 1.0)
    assert (run.lora_rank, run.lora_alpha, run.prompts_per_step) == (64, 64, 16)
    assert (run.eval_length, run.eval_block, run.eval_steps) == (256, 32, (128,))


# ---- Measuring and asking ----------------------------------------------------------------------


def test_countdown_and_sudoku_need_no_data_and_a_bare_model_is_evaluated(llada, tmp_path, monkeypatch, short_answers):
    monkeypatch.chdir(tmp_path)
    for task in ("countdown", "sudoku"):
        assert run("--evaluate", llada, "--task", task, "--eval-steps", "2", "--eval-prompts", "2") == 0
        folder = tmp_path / "runs" / f"evaluation-{task}"
        assert (folder / f"evaluation-{task}-test-2-greedy-2.json").exists()
        assert len(json_lines(folder / f"completions-{task}-test-2-greedy-2.jsonl")) == 2


def test_a_typed_question_is_answered_with_the_presets_of_llada(llada, capsys):
    assert run("--evaluate", llada, "--task", "gsm8k", "--prompt", "What is 2 + 2?", "--sampling-steps", "16") == 0
    printed = capsys.readouterr().out
    states = [line[20:] for line in printed.splitlines() if "before step" in line]
    assert "What is 2 + 2?" in printed and states[0] == "_" * 256
    assert "correct" not in printed and "wrong" not in printed  # nobody knows the answer


@pytest.mark.parametrize("thoughts", [5, 70])  # 73 [MASK] are three blocks of the preset, which 128 steps do not fit
def test_its_answers_may_be_given_in_part(llada, thoughts, capsys):
    template = f"<think>[{thoughts}]</think>\n<answer>[3]</answer>."
    question = ["--task", "gsm8k", "--prompt", "What is 2 + 2?", "--template", template]
    assert run("--evaluate", llada, *question) == 0
    printed = capsys.readouterr().out
    assert f"before step 0   <think>{'_' * thoughts}</think>\n<answer>___</answer>." in printed
    finished = printed.partition("finished        ")[2]
    assert finished.startswith("<think>") and "</think>\n<answer>" in finished and "</answer>." in finished


def test_a_question_that_contains_the_mask_token_is_refused(llada, tmp_path, capsys, short_answers):
    question = ["--prompt", "What is <|mask|> + 2?", "--task", "gsm8k", "--sampling-steps", "8"]
    assert run("--evaluate", llada, *question) == 1
    assert "a question contains the mask token" in last_line(capsys)
    rows = [{"question": f"What is {i} + <|mask|>?", "answer": "#### 3"} for i in range(3)]
    data = write_jsonl(tmp_path / "gsm8k.jsonl", rows)
    command = ["--task", "gsm8k", "--data", data, "--eval-steps", "2", "--out", tmp_path / "out"]
    assert run("--evaluate", llada, *command) == 1
    assert "a question contains the mask token" in last_line(capsys)


# ---- What goes wrong ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "task, line, word",
    [
        ("gsm8k", '{"question": "1+1?"}', "gsm8k.jsonl:2: there is no column 'answer'"),
        ("gsm8k", '{"question": "1+1?", "answer": "two"}', "gsm8k.jsonl:2: the answer does not end in ####"),
        ("gsm8k", '{"question": ', "gsm8k.jsonl:2: not JSON"),
        ("gsm8k", "[1, 2]", "gsm8k.jsonl:2: not a JSON object"),
        ("gsm8k", '{"question": null, "answer": "#### 1"}', "gsm8k.jsonl:2: the question is None"),
        ("gsm8k", "", "holds no questions"),
        ("countdown", '{"nums": [-3, 5.0, 7], "target": 3}', "countdown.jsonl:2: '[-3, 5.0, 7]' and '3' are not"),
        ("math", '{"problem": "x?", "solution": "42"}', "math.jsonl:2: there is no answer"),
        ("countdown", '{"input": "1,2,3", "output": "many"}', "countdown.jsonl:2: '1,2,3' and 'many' are not"),
        ("sudoku", '{"Puzzle": "1", "Solution": "2"}', "sudoku.jsonl:2: '0000000000000001'"),
    ],
)
def test_a_malformed_row_names_its_file_and_line(llada, task, line, word, tmp_path, capsys):
    path = tmp_path / f"{task}.jsonl"
    path.write_text("\n" + line + "\n")
    assert run("--evaluate", llada, "--task", task, "--data", path) == 1
    assert word in last_line(capsys)


def test_without_a_network_the_message_names_the_flag(llada, monkeypatch, capsys):
    def load_dataset(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert run("--evaluate", llada, "--task", "gsm8k") == 1
    assert "--data PATH" in last_line(capsys)
