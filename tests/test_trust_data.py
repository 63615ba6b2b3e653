"""What is asked, loaded and judged is what the user believes it is: data files, adapters, judges."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import run
from llada_folder import make_llada_folder

import tasks
from support import judge, settings, weights, words
from support.words import TASKS

ROOT = Path(__file__).resolve().parent.parent
SHORT = (
    "--completion-length 24 --block-length 8 --sampling-steps 12 --mc-samples 3 --eval-steps 4 --prompts-per-step 2 "
    "--num-generations 2 --eval-prompts 3 --lora-rank 2 --max-steps 1"
).split()


def rows(numbers):
    return "".join(json.dumps({"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"}) + "\n" for i in numbers)


def parts(path, text=None):
    """{split: its questions} of a GSM8K file, which is written first if there is a text."""
    if text is not None:
        path.write_text(text)
    return {split: [e["question"] for e in TASKS["gsm8k"].load(split, str(path))] for split in tasks.SPLITS}


# ---- Splits of a data file


def test_a_row_more_moves_no_other_question_between_splits(tmp_path):
    before = parts(tmp_path / "a.jsonl", rows(range(200)))
    after = parts(tmp_path / "a.jsonl", rows([*range(200), 5000]))
    for split in tasks.SPLITS:
        assert [question for question in after[split] if question != "What is 5000 + 1?"] == before[split]


def test_a_question_has_the_same_split_in_every_file_and_every_process(tmp_path):
    both = parts(tmp_path / "a.jsonl", rows(range(200))), parts(tmp_path / "b.jsonl", rows(reversed(range(100, 300))))
    for first in tasks.SPLITS:
        assert not any(set(both[0][first]) & set(both[1][second]) for second in tasks.SPLITS if second != first)
    code = f"from support.words import TASKS; print(len(TASKS['gsm8k'].load('test', {str(tmp_path / 'a.jsonl')!r})))"
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    printed = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=environment, text=True)
    assert int(printed) == len(both[0]["test"])


def test_a_tenth_is_for_testing_and_a_twentieth_for_validation(tmp_path):
    found = parts(tmp_path / "a.jsonl", rows(range(3000)))
    assert 240 < len(found["test"]) < 360 and 105 < len(found["validation"]) < 195
    assert sum(map(len, found.values())) == 3000


def test_a_small_file_still_has_every_split_and_says_that_others_stand_in(tmp_path, capsys):
    for i in range(0, 100, 5):
        assert all(parts(tmp_path / "a.jsonl", rows(range(i, i + 5))).values())
    lines = [line for line in capsys.readouterr().out.splitlines() if "a.jsonl" in line]
    assert lines and all("of 5 questions" in line for line in lines)


def test_a_file_may_grow_from_three_rows_and_no_trained_question_is_ever_held_out(tmp_path):
    trained = set()
    for number in range(3, 90):
        try:
            found = parts(tmp_path / "a.jsonl", rows(range(number)))
        except ValueError as error:
            assert "too few" in str(error) and number < 9
            continue
        assert not trained & {*found["test"], *found["validation"]}
        trained |= set(found["train"])


def test_two_questions_are_too_few_to_divide(tmp_path):
    with pytest.raises(ValueError, match="2 different questions are too few"):
        parts(tmp_path / "a.jsonl", rows(range(2)))


@pytest.mark.parametrize("chats", [False, True])
@pytest.mark.parametrize("name, beginning", [("countdown", ["b11f47ff", "ca172449"]), ("sudoku", ["e546a1fb"] * 2)])
def test_the_generated_games_keep_their_splits(name, beginning, chats):
    examples = (words.TASKS if chats else tasks.TASKS)[name].load("test")
    assert hashlib.sha256(json.dumps(examples).encode()).hexdigest()[:8] == beginning[chats]


# ---- A run knows the file that it was trained on


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a model llada, a file train.jsonl, and a finished run `run` of one update on it."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("trained")
    (folder / "llada").mkdir()
    make_llada_folder(folder / "llada")
    (folder / "train.jsonl").write_text(rows(range(60)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        small = {"eval_length": 16, "eval_block": 8, "eval_steps": (4,)}
        patch.setitem(settings.PRESETS, ("llada", "gsm8k"), settings.PRESETS["llada", "gsm8k"] | small)
        command = ["--model", "llada/", "--task", "gsm8k", "--data", "train.jsonl", *SHORT]
        assert run(*command, "--out", "run") == 0
    return folder


@pytest.fixture
def place(trained, tmp_path, monkeypatch):
    """A copy of train.jsonl and of the run in a folder of the test's own, as if they had been made there."""
    for name in ("llada", "run"):
        shutil.copytree(trained / name, tmp_path / name)
    shutil.copy(trained / "train.jsonl", tmp_path)
    for file in ("config.json", "model/adapter_config.json"):
        text = (tmp_path / "run" / file).read_text()
        (tmp_path / "run" / file).write_text(text.replace(str(trained), str(tmp_path)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def asked(folder, *flags):
    """The questions that --evaluate asks, in order."""
    assert run("--evaluate", "run", "--eval-steps", "2", *flags, "--out", folder) == 0
    (file,) = Path(folder).glob("completions*.jsonl")
    return [json.loads(line)["prompt"] for line in file.read_text().splitlines()]


def test_config_json_has_the_sha256_of_the_file(place):
    stored = json.loads((place / "run" / "config.json").read_text())
    assert stored["data_sha256"] == hashlib.sha256((place / "train.jsonl").read_bytes()).hexdigest()


@pytest.mark.parametrize("typed", ["train.jsonl", "./train.jsonl", "llada/../train.jsonl", "absolute", "link", "copy"])
def test_its_file_by_any_name_asks_the_held_out_questions_alone(place, typed):
    held_out = parts(place / "train.jsonl")["test"]
    if typed == "link":
        (place / "link").symlink_to(place)
    if typed == "copy":
        shutil.copy("train.jsonl", "copy.jsonl")
    typed = {"absolute": place / "train.jsonl", "link": "link/train.jsonl", "copy": "copy.jsonl"}.get(typed, typed)
    assert asked("out", "--data", typed) == held_out and len(held_out) < 15


def test_it_is_found_from_another_folder_too(place, monkeypatch, capsys):
    held_out = parts(place / "train.jsonl")["test"]
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    (place / "elsewhere" / "run").symlink_to(place / "run")
    assert asked("out") == held_out
    assert "changed" not in capsys.readouterr().out


def test_another_file_is_asked_whole(place):
    Path("other.jsonl").write_text(rows(range(500, 505)))
    assert len(asked("out", "--data", "other.jsonl")) == 5


@pytest.mark.parametrize("flags", [[], ["--data", "./train.jsonl"]])
def test_a_changed_file_is_named_in_one_line_on_evaluate(place, flags, capsys):
    held_out = parts(place / "train.jsonl")["test"]
    with open("train.jsonl", "a") as file:
        file.write(rows([5000]))
    assert set(asked("out", *flags)) - {"What is 5000 + 1?"} == set(held_out)
    assert sum("train.jsonl has changed" in line for line in capsys.readouterr().out.splitlines()) == 1


def unfinished():
    Path("run/summary.json").unlink()
    shutil.rmtree("run/model")


def test_a_changed_file_is_named_in_one_line_on_resume(place, capsys):
    unfinished()
    with open("train.jsonl", "a") as file:
        file.write(rows([5000]))
    run("--resume", "run")
    assert sum("train.jsonl has changed" in line for line in capsys.readouterr().out.splitlines()) == 1


def test_the_same_file_typed_otherwise_may_be_given_on_resume(place, capsys):
    unfinished()
    assert run("--resume", "run", "--data", "./llada/../train.jsonl") == 0
    assert "changed" not in capsys.readouterr().out
    unfinished()
    with pytest.raises(SystemExit) as exit:
        run("--resume", "run", "--data", "other.jsonl")
    assert exit.value.code == 2 and "--data cannot change" in capsys.readouterr().err


# ---- Adapters


@pytest.fixture
def adapter(tmp_path):
    """A base model, and the folder of an adapter on it that is not zero."""
    pytest.importorskip("peft")
    (tmp_path / "base").mkdir()
    make_llada_folder(tmp_path / "base")
    model = weights.add_lora(weights.load(tmp_path / "base"), 2, 4, torch.Generator().manual_seed(1))
    weights.save(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def change_keys(folder, change):
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


CHANGES = {
    "one is missing": lambda tensors: dict(sorted(tensors.items())[1:]),
    "none is left": lambda tensors: {},
    "all are renamed": lambda tensors: {name.replace("transformer", "model"): t for name, t in tensors.items()},
    "one is too many": lambda tensors: tensors | {"base_model.model.extra.lora_A.weight": torch.zeros(2, 16)},
    "another adapter's names": lambda tensors: {name.replace("lora_", "ia3_"): t for name, t in tensors.items()},
}


@pytest.mark.parametrize("how", CHANGES)
def test_an_adapter_with_other_keys_than_its_base_needs_is_refused_in_one_line(adapter, how, recwarn):
    change_keys(adapter, CHANGES[how])
    with pytest.raises(ValueError, match="adapter") as error:
        weights.load(adapter)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert not [warning for warning in recwarn if "adapter" in str(warning.message)]


def test_an_incomplete_adapter_ends_the_program_with_1(adapter, capsys):
    change_keys(adapter, CHANGES["one is missing"])
    assert run("--evaluate", adapter, "--task", "countdown", "--prompt", "3 12 7 = 16") == 1
    assert "of 28 tensors 1 are missing, 0 do not belong" in capsys.readouterr().err.splitlines()[-1]


def test_an_adapter_records_the_absolute_path_of_a_local_base(adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights.save(weights.add_lora(weights.load("base/"), 2, 4, torch.Generator().manual_seed(1)), "relative")
    stored = json.loads(Path("relative/adapter_config.json").read_text())
    assert stored["base_model_name_or_path"] == str((tmp_path / "base").resolve())
    monkeypatch.chdir("/")
    weights.load(tmp_path / "relative")
    weights.load_tokenizer(tmp_path / "relative")


def test_an_adapter_that_records_a_relative_path_is_saved_again_with_the_absolute_one(adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "base/"}))
    weights.save(weights.load(adapter), "again")
    stored = json.loads(Path("again/adapter_config.json").read_text())
    assert stored["base_model_name_or_path"] == str((tmp_path / "base").resolve())


def test_an_adapter_records_a_hub_id_as_it_is(adapter, tmp_path, monkeypatch):
    here = weights.local_folder
    monkeypatch.setattr(weights, "local_folder", lambda name, *_: here(tmp_path / "base") if name == "o/m" else name)
    model = weights.add_lora(weights.load("o/m"), 2, 4, torch.Generator().manual_seed(1))
    weights.save(model, tmp_path / "hub")
    assert json.loads((tmp_path / "hub" / "adapter_config.json").read_text())["base_model_name_or_path"] == "o/m"


# ---- Answers that are numbers


@pytest.mark.parametrize("answer, text", [(0, "0"), (3, "3"), (-2.5, "-2.5"), ("0", "0"), (0.0, "0.0")])
def test_math_takes_a_number_as_answer_zero_too(answer, text):
    row = {"problem": "Solve.", "answer": answer, "level": 1}
    assert TASKS["math"]._from_row(row)["answer"] == text


@pytest.mark.parametrize("answer", [None, "", " ", True, False, float("nan"), [0], {}])
def test_math_refuses_what_is_neither_a_text_nor_a_number(answer):
    with pytest.raises(ValueError, match="answer"):
        TASKS["math"]._from_row({"problem": "Solve.", "answer": answer, "level": 1})


# ---- Judges, several at a time


@pytest.fixture
def judges(monkeypatch):
    """The judge of this thread, started, and two threads to judge in."""
    judges = judge.Judge()
    with ThreadPoolExecutor(2) as threads:
        monkeypatch.setattr(judge.Judge, "THREADS", threads)
        judges.start()
        yield judges
    judges.process.communicate()


def test_verdicts_come_in_the_order_of_the_answers(judges):
    golds = [rf"\frac{{{i}}}{{3}}" for i in range(24)]
    answers = [f"{i + i % 2}/3" for i in range(24)]
    assert judges.map(judges.equivalent, golds, answers) == [True, False] * 12


def test_two_answers_are_judged_at_once_in_two_processes(judges):
    meet = threading.Barrier(2, timeout=60)

    def process(answer):
        meet.wait()  # for the other: neither comes first
        assert judges.equivalent("2", answer)
        return judges.process.pid

    assert len(set(judges.map(process, ["4/2", "6/3"]))) == 2


def test_a_hanging_judge_costs_its_own_answer_only(judges):
    started = time.perf_counter()
    answers = ["4/2"] * 8 + ["9^{9^{9^{9}}}"] + ["4/2"] * 8
    assert judges.map(judges.equivalent, ["2"] * 17, answers) == [True] * 8 + [False] + [True] * 8
    assert time.perf_counter() - started < 30


def test_a_crashing_judge_costs_its_own_answer_only(judges):
    def equivalent(number):
        if number == 8:
            judges.start()
            started, judges.start = judges.start, lambda: None
            judges.process.kill()
            judges.process.wait()
            verdict = judges.equivalent("2", "4/2")
            judges.start = started
            return verdict
        return judges.equivalent("2", "4/2")

    assert judges.map(equivalent, range(17)) == [True] * 8 + [False] + [True] * 8


def test_a_judge_is_bounded_in_memory(judges):
    limits = Path(f"/proc/{judges.process.pid}/limits")
    if not limits.exists():
        pytest.skip("no /proc")
    line = next(line for line in limits.read_text().splitlines() if line.startswith("Max address space"))
    assert line.split()[3] == str(judge.Judge.BYTES)


def test_games_are_judged_in_this_thread_and_start_no_process():
    judges = judge.Judge()
    assert judges.map(lambda _: threading.get_ident(), range(3)) == [threading.get_ident()] * 3
    assert judges.process is None


def test_there_are_no_more_judges_than_cores_shared_among_the_processes_of_a_machine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(12), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert judge.cores() == 12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert judge.cores() == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert judge.cores() == 1


def test_a_rollout_its_step_rewards_and_an_evaluation_are_judged_in_parallel(monkeypatch, trained, tmp_path):
    calls, map_of = [], judge.Judge.map
    monkeypatch.setattr(judge.Judge, "map", lambda self, f, *lists: calls.append(f.__name__) or map_of(self, f, *lists))
    monkeypatch.chdir(trained)
    command = ["--model", "llada/", "--task", "gsm8k", "--data", "train.jsonl", *SHORT, "--algorithm", "egspo-sa"]
    small = {"eval_length": 16, "eval_block": 8, "eval_steps": (4,)}
    monkeypatch.setitem(settings.PRESETS, ("llada", "gsm8k"), settings.PRESETS["llada", "gsm8k"] | small)
    assert run(*command, "--out", tmp_path / "run") == 0
    assert calls.count("reward") == 2 and calls.count("is_correct") >= 3
