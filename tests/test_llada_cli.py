"""The commands that post-train and evaluate LLaDA, on a small random checkpoint of its structure."""

import csv
import json
import shutil
import sys
import types

import pytest
from conftest import make_llada_folder

import train
from tasks import CHAT_TASKS

SHORT = (
    "--completion-length 24 --block-length 8 --sampling-steps 12 --mc-samples 3 --eval-length 16 --eval-block 8 "
    "--eval-steps 4 --prompts-per-step 2 --num-generations 2 --max-steps 2 --eval-every 2 --eval-prompts 3 "
    "--lora-rank 2"
).split()


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A small file of each task's columns."""
    folder = tmp_path_factory.mktemp("data")
    gsm8k = [{"question": f"What is {i} + 1?", "answer": f"It is one more.\n#### {i + 1:,}"} for i in range(990, 1030)]
    math = [{"problem": f"Solve x = {i}.", "answer": rf"\frac{{{i}}}{{1}}", "level": 2} for i in range(40)]
    countdown = [{"input": f"{i},2,3", "output": str(i + 5)} for i in range(40)]
    with open(folder / "sudoku.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["Puzzle", "Solution"])
        rows.writerows([e["puzzle"], e["solution"]] for e in CHAT_TASKS["sudoku"].load("test")[:40])
    return {
        "gsm8k": write_jsonl(folder / "gsm8k.jsonl", gsm8k),
        "math": write_jsonl(folder / "math.jsonl", math),
        "countdown": write_jsonl(folder / "countdown.jsonl", countdown),
        "sudoku": str(folder / "sudoku.csv"),
    }


@pytest.mark.parametrize("task", ["gsm8k", "math", "countdown", "sudoku"])
def test_every_task_trains_and_is_evaluated_from_a_file(llada_folder, data, task, tmp_path, capsys):
    pytest.importorskip("peft")
    run = tmp_path / "run"
    command = ["--model", str(llada_folder), "--task", task, "--data", data[task], *SHORT, "--out", str(run)]
    assert train.main(command) == 0, capsys.readouterr().err
    summary = json.loads((run / "summary.json").read_text())
    assert summary["model"] == str(llada_folder) and set(summary["final"]) == {"sampled", "greedy"}
    stored = json.loads((run / "config.json").read_text())
    assert stored["run"]["lora_rank"] == 2 and stored["run"]["learning_rate"] == 5e-6  # LLaDA's preset
    assert stored["versions"]["torch"] and stored["commit"]
    assert (run / "model" / "adapter_model.safetensors").exists() and not (run / "model" / "model.safetensors").exists()
    capsys.readouterr()
    file = shutil.copy(data[task], tmp_path)
    steps = ["--eval-steps", "2", "4", "--save-completions", "--data", file, "--eval-prompts", "5"]
    assert train.main(["--evaluate", str(run), *steps]) == 0
    printed = capsys.readouterr().out
    assert "tokens per answer" in printed and "seconds per answer" in printed
    rows = json.loads((run / f"evaluation-{task}-{task}.json").read_text())["rows"]  # named after the file too
    assert [(row["steps"], row["policy"], row["answers"]) for row in rows] == [(2, "greedy", 5), (4, "greedy", 5)]
    answers = [json.loads(line) for line in (run / f"completions-{task}-{task}.jsonl").read_text().splitlines()]
    capsys.readouterr()
    assert train.main(["--evaluate", str(run), "--eval-steps", "2"]) == 0  # of the run's own file what was held out
    rows = json.loads((run / f"evaluation-{task}.json").read_text())["rows"]
    held_out = CHAT_TASKS[task].load("test", data[task])
    assert rows[0]["answers"] == len(held_out) < len(CHAT_TASKS[task].read(data[task]))
    assert len(answers) == 10 and answers[0].keys() >= {"prompt", "completion", "correct", "length"}


@pytest.mark.parametrize("algorithm", ["egspo-sa", "agrpo-sa"])
def test_the_other_algorithms_train_it_too(llada_folder, algorithm, tmp_path):
    """Low-confidence unmasking in blocks, its KL to the adapter's absence, r_t: all on LLaDA's structure."""
    pytest.importorskip("peft")
    flags = [*SHORT, "--num-generations", "3", "--out", str(tmp_path / "run")]
    assert train.main(["--model", str(llada_folder), "--task", "countdown", "--algorithm", algorithm, *flags]) == 0
    stored = json.loads((tmp_path / "run" / "config.json").read_text())["algorithm"]
    assert stored["step_baseline"] != "none"
    assert stored["unmasking"] == ("low_confidence" if algorithm == "egspo-sa" else "random")
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    # No answer of a random model is right: without advantage the KL alone asks for steps.
    assert (row["evaluations"] > 0) == (algorithm == "egspo-sa" or row["signal"] > 0) and row["ratio_error"] < 1e-5


def test_countdown_and_sudoku_need_no_data_and_a_bare_model_is_evaluated(llada_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for task in ("countdown", "sudoku"):
        flags = "--eval-length 16 --eval-block 8 --eval-steps 2 --eval-prompts 2".split()
        assert train.main(["--evaluate", str(llada_folder), "--task", task, *flags]) == 0
        assert (tmp_path / "runs" / f"evaluation-{task}" / f"evaluation-{task}.json").exists()
    capsys.readouterr()
    question = ["--prompt", "What is 2 + 2?", "--task", "gsm8k", "--eval-length", "128"]
    assert train.main(["--evaluate", str(llada_folder), *question]) == 0
    assert "What is 2 + 2?" in capsys.readouterr().out


def test_training_every_weight_and_continuing_an_adapter(llada_folder, tmp_path):
    pytest.importorskip("peft")
    common = ["--model", str(llada_folder), "--task", "countdown", *SHORT]
    assert train.main([*common, "--lora-rank", "0", "--beta", "0.1", "--out", str(tmp_path / "full")]) == 0
    assert (tmp_path / "full" / "model" / "model.safetensors").exists()
    assert train.main([*common, "--out", str(tmp_path / "adapter")]) == 0
    common[1] = str(tmp_path / "adapter" / "model")
    assert train.main([*common, "--beta", "0.1", "--out", str(tmp_path / "more")]) == 0
    stored = json.loads((tmp_path / "more" / "model" / "adapter_config.json").read_text())
    assert stored["base_model_name_or_path"] == str(llada_folder)


def test_grids_of_a_later_test_can_be_kept_out_of_training(llada_folder, data):
    run_config, _ = train.parse_arguments(
        ["--model", str(llada_folder), "--task", "sudoku", "--exclude", data["sudoku"]]
    )
    task = CHAT_TASKS["sudoku"]
    held = {example["solution"] for example in task.read(data["sudoku"])}
    examples = task.load("test")  # 60 grids, of which the file has some
    kept = train.allowed(examples, task, run_config)
    assert kept and len(kept) < len(examples) and not held & {example["solution"] for example in kept}


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
def test_a_malformed_row_names_its_file_and_line(llada_folder, task, line, word, tmp_path, capsys):
    path = tmp_path / f"{task}.jsonl"
    path.write_text("\n" + line + "\n")
    assert train.main(["--evaluate", str(llada_folder), "--task", task, "--data", str(path)]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert word in last, last


def test_without_a_network_the_message_names_the_flag(llada_folder, monkeypatch, capsys):
    def load_dataset(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert train.main(["--evaluate", str(llada_folder), "--task", "gsm8k"]) == 1
    assert "--data PATH" in capsys.readouterr().err.splitlines()[-1]


def test_the_papers_settings_are_the_defaults_for_llada():
    run_config, config = train.parse_arguments(["--model", "llada", "--task", "gsm8k"])
    assert (config.completion_length, config.block_length, config.sampling_steps) == (384, 12, 128)
    assert (config.temperature, config.top_p, config.top_k, config.mc_samples) == (0.6, 0.99, 150, 24)
    assert config.importance_sampling == "entropy" and config.low_discrepancy and config.beta == 0
    assert (run_config.learning_rate, run_config.adam_beta2, run_config.gradient_clip) == (5e-6, 0.99, 1.0)
    assert (run_config.lora_rank, run_config.lora_alpha, run_config.prompts_per_step) == (64, 64, 16)
    assert (run_config.eval_length, run_config.eval_block, run_config.eval_steps) == (256, 32, (128,))


def test_a_sharded_folder_and_one_file_train_alike(tmp_path):
    pytest.importorskip("peft")
    rows = []
    for shards in (1, 3):
        (tmp_path / str(shards)).mkdir()
        make_llada_folder(tmp_path / str(shards), shards)
        command = ["--model", str(tmp_path / str(shards)), "--task", "countdown", *SHORT]
        assert train.main([*command, "--out", str(tmp_path / f"run{shards}")]) == 0
        lines = (tmp_path / f"run{shards}" / "metrics.jsonl").read_text().splitlines()
        rows.append([{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines])
    assert rows[0] == rows[1]
