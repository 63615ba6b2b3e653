"""Nothing typed is ignored in silence, no stored file is believed unread, and what is advised works."""

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import make_config, make_questions, make_rollout
from llada_folder import make_llada_folder
from safetensors.torch import load_file, save_file

import agrpo
import train
import variants
from support import evaluation, runs, settings, weights
from support.judge import Judge
from support.settings import RunConfig, parse_arguments
from support.words import TASKS

ROOT = Path(__file__).resolve().parent.parent
FLAGS = "--base-steps 3 --max-steps 2 --save-every 1 --eval-steps 2 --eval-prompts 4 --prompts-per-step 2 --out".split()
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run of Countdown."""
    folder = tmp_path_factory.mktemp("trust") / "run"
    assert train.main([*FLAGS, str(folder)]) == 0
    return folder


@pytest.fixture
def copied(whole, tmp_path):
    """A copy of it that a test may spoil."""
    (cache,) = whole.parent.glob("base-*")
    os.symlink(cache, tmp_path / cache.name)
    return Path(shutil.copytree(whole, tmp_path / "run"))


@pytest.fixture
def unfinished(copied):
    (copied / "summary.json").unlink()
    return copied


@pytest.fixture(scope="module")
def llada(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llada")
    make_llada_folder(folder, shards=1)
    return folder


def said(capsys, *arguments):
    """(exit code, the last line on stderr) of the command line in this process."""
    capsys.readouterr()
    try:
        code = train.main([*map(str, arguments)])
    except SystemExit as exit:
        code = exit.code
    stderr = capsys.readouterr().err
    assert "Traceback" not in stderr
    return code, (stderr.splitlines() or [""])[-1]


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


# ---- Flags that did nothing, or something else -------------------------------------------------


@pytest.mark.parametrize("name", ["evaluate", "resume", "data", "exclude", "out", "task", "model", "revision"])
def test_an_empty_flag_is_an_unset_variable_and_refused(name, capsys):
    assert said(capsys, f"--{name}", "") == (
        2,
        f"train.py: error: --{name} is empty: a shell variable that is not set?",
    )


def test_a_tracker_may_be_switched_off_by_an_empty_flag(unfinished):
    stored = json.loads((unfinished / "config.json").read_text())["run"]
    change(unfinished / "config.json", run=stored | {"tracker": "tensorboard"})
    assert parse_arguments(["--resume", str(unfinished), "--tracker", ""])[0].tracker == ""


@pytest.mark.parametrize(
    "flags",
    [
        "--sampling-steps 4",
        "--model llada",
        "--max-steps 3",
        "--mc-samples 9",
        "--algorithm egspo",
        "--prompt 1 --out x",
    ],
)
def test_what_an_evaluation_does_not_heed_is_refused(whole, flags, capsys):
    code, line = said(capsys, "--evaluate", whole, *flags.split())
    assert code == 2 and f"{flags.split()[-2]} does nothing here: --evaluate heeds --" in line


def test_how_a_policy_samples_is_no_setting_of_greedy_answers(llada, capsys):
    code, line = said(capsys, "--evaluate", llada, "--temperature", "2")
    assert code == 2 and "--temperature does nothing here" in line


def test_a_setting_of_the_run_may_be_repeated(whole):
    parse_arguments(["--evaluate", str(whole), *"--sampling-steps 2 --model tiny --max-steps 2".split()])


def test_what_an_evaluation_heeds_is_accepted(whole, llada):
    parse_arguments(["--evaluate", str(whole), *"--temperature 2 --eval-steps 1 2 --eval-split validation".split()])
    parse_arguments(["--evaluate", str(whole), "--prompt", "1 2 3 = 6", "--sampling-steps", "4"])
    parse_arguments(["--evaluate", str(llada), *"--task gsm8k --data a.jsonl --seed 1 --out b".split()])


def test_the_length_and_blocks_typed_are_those_of_the_evaluation(llada):
    run, config = parse_arguments(["--evaluate", str(llada), *"--completion-length 128 --block-length 16".split()])
    assert settings.length(run) == 128
    assert evaluation.policy(types.SimpleNamespace(run=run, config=config), "greedy", 8)[0].block_length == 16


def test_a_length_of_evaluations_that_no_answer_fits_is_refused(copied, capsys):
    stored = json.loads((copied / "config.json").read_text())["run"]
    change(copied / "config.json", run=stored | {"eval_length": 2})
    code, line = said(capsys, "--evaluate", copied)
    assert code == 2 and "--completion-length 2: answers to countdown need 8" in line


@pytest.mark.parametrize("flags", [["--evaluate"], ["--task", "countdown", "--model"]])
@pytest.mark.parametrize("which", ["model", "base"])
def test_a_tiny_model_is_not_asked_in_words(whole, flags, which, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (model,) = whole.glob("model") if which == "model" else whole.parent.glob("base-*")
    code, line = said(capsys, *flags, model)
    assert code == 1 and "holds a tiny model, which reads no words" in line and not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [["--model"], ["--evaluate"]])
def test_a_revision_of_a_local_folder_is_refused(llada, flags, capsys):
    code, line = said(capsys, *flags, llada, "--revision", "main")
    assert code == 2 and "do not come from the hub" in line


def test_a_revision_of_a_tiny_model_or_of_a_run_is_refused(whole, capsys):
    for flags in ([], ["--evaluate", whole]):
        code, line = said(capsys, *flags, "--revision", "main")
        assert code == 2 and "--revision" in line


def test_a_revision_of_the_hub_is_accepted():
    assert parse_arguments(["--model", "llada", "--task", "gsm8k", "--revision", "main"])[0].revision == "main"


@pytest.mark.parametrize("asked", [["--eval-prompts", "4"], ["--prompt", "1 2 3 = 6"]])
def test_a_model_of_nan_has_no_accuracy(copied, asked, capsys):
    file = copied / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.transformer.ff_out.weight"][:] = torch.nan
    save_file(tensors, file)
    stored = json.loads((copied / "config.json").read_text())["run"]
    change(copied / "config.json", run=stored | {"eval_policies": ["greedy"]})  # which draws nothing
    code, line = said(capsys, "--evaluate", copied, *asked)
    assert code == 1 and "the weights hold a nan" in line


# ---- What is stored is read with care ----------------------------------------------------------


def broken_values():
    """Of every field of both dataclasses, values that JSON can hold and it cannot."""
    for part, cls in (("run", RunConfig), ("algorithm", agrpo.AGRPOConfig)):
        for field in dataclasses.fields(cls):
            for value in (None, 2.5, "x", True, [], ["x", 3], {}):
                if not runs.fits(value, field.type):
                    yield part, field.name, value


def test_a_setting_of_another_type_is_refused_whichever_it_is(copied, capsys):
    stored, cases = json.loads((copied / "config.json").read_text()), list(broken_values())
    assert {name for _, name, _ in cases} == set(stored["run"]) | set(stored["algorithm"]) and len(cases) > 200
    for part, name, value in cases:
        (copied / "config.json").write_text(json.dumps(stored | {part: stored[part] | {name: value}}))
        with pytest.raises(SystemExit) as exit:
            parse_arguments(["--resume", str(copied)])
        line = capsys.readouterr().err
        assert exit.value.code == 1 and f"config.json: {name} is {value!r}, not " in line and line.count("\n") == 1


def test_the_settings_that_a_run_stores_pass(whole):
    stored = json.loads((whole / "config.json").read_text())
    runs.check_types(RunConfig, stored["run"], "")
    runs.check_types(agrpo.AGRPOConfig, stored["algorithm"], "")


@pytest.mark.parametrize("flag", ["--evaluate", "--resume"])
@pytest.mark.parametrize("text", [DEEP, '{"run": ' + DEEP + "}", '{"run": {', '{"run": 3, "algorithm": {}}', "\0"])
def test_a_config_that_cannot_be_read_is_one_line(copied, flag, text, capsys):
    (copied / "config.json").write_text(text)
    code, line = said(capsys, flag, copied)
    assert code == 1 and "config.json" in line


@pytest.mark.parametrize("values", [{"eval_policies": ["loud"]}, {"schedule": "steep"}])
def test_a_stored_choice_is_one_of_the_known(copied, values, capsys):
    stored = json.loads((copied / "config.json").read_text())["run"]
    change(copied / "config.json", run=stored | values)
    code, line = said(capsys, "--evaluate", copied)
    assert code == 2 and "choose from" in line


@pytest.mark.parametrize(
    "values",
    [
        {"n_heads": 0},
        {"n_heads": -1},
        {"d_model": 16.0},
        {"d_model": 0},
        {"n_layers": "3"},
        {"n_layers": -1},
        {"rope_theta": None},
        {"rope_theta": 0},
        {"rms_norm_eps": "x"},
        {"rms_norm_eps": float("nan")},
        {"vocab_size": True},
        {"mlp_hidden_size": -1},
        {"eos_token_id": 2.0},
    ],
)
def test_a_models_config_of_impossible_sizes_is_one_line(tmp_path, values):
    make_llada_folder(tmp_path, shards=1)
    change(tmp_path / "config.json", **values)
    with pytest.raises(ValueError, match=f"config.json does not describe .* {next(iter(values))} is ") as error:
        weights.read_weights(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["null", "[]", "3", DEEP])
def test_a_models_config_that_is_no_object_is_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json does not describe a model"):
        weights.read_config(tmp_path / "config.json")


ROW = {"step": 1, "accuracy": 0.5, "entropy": 1.0, "signal": 0, "ratio_error": 0.0}


@pytest.mark.parametrize(
    "line",
    ["[]", "{}", "5", "null", DEEP, '{"step": ', json.dumps(ROW | {"step": "x"}), json.dumps(ROW | {"signal": None})],
)
def test_metrics_that_are_none_are_named_with_their_line_and_kept(tmp_path, line):
    text = json.dumps(ROW) + "\n" + line + "\n"
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match="metrics.jsonl, line 2: not the numbers of an update"):
        runs.rewind_metrics(tmp_path / "metrics.jsonl", 2)
    assert (tmp_path / "metrics.jsonl").read_text() == text


def test_half_a_line_at_the_end_is_what_a_killed_run_leaves(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(ROW) + '\n{"step": 2, "acc')
    assert runs.rewind_metrics(tmp_path / "metrics.jsonl", 2) == [ROW]


@pytest.mark.parametrize("text", ["{}", "[]", "3", '{"2": {}}', '{"2": {"sampled": null, "greedy": 0}}', "{"])
def test_a_base_table_of_another_run_is_refused(unfinished, text, capsys):
    (unfinished / "base.json").write_text(text)
    code, line = said(capsys, "--resume", unfinished)
    assert code == 1 and "base.json" in line


@pytest.mark.parametrize("values", [{"step": "x"}, {"step": None}, {"seconds": "x"}])
def test_a_checkpoint_of_no_step_is_refused(unfinished, values, capsys):
    file = unfinished / "checkpoint-2"
    torch.save(torch.load(file, weights_only=True) | values, file)
    code, line = said(capsys, "--resume", unfinished)
    assert code == 1 and "checkpoint-2 is not a checkpoint of this run: it names no step" in line


@pytest.mark.parametrize("flags", [["--prompt", "what \udcff?"], ["--prompt", "2 + 2?", "--template", "\udcff[2]"]])
def test_a_prompt_that_is_no_text_is_refused(flags, capsys):
    code, line = said(capsys, "--evaluate", "llada", "--task", "gsm8k", *flags)
    assert code == 2 and "no text in UTF-8" in line


@pytest.mark.parametrize("flag", ["--model", "--evaluate"])
def test_a_chat_template_without_a_system_role_is_one_line_before_a_folder_is_made(tmp_path, flag, capsys, monkeypatch):
    make_llada_folder(tmp_path / "model", shards=1)
    monkeypatch.chdir(tmp_path)
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    code, line = said(capsys, flag, "model", "--task", "countdown", "--eval-prompts", "2")
    assert code == 1 and "chat template" in line and "No system role" in line
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# ---- What is advised ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "total, here, number, start",
    [
        (2, 1, None, "torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint HOST:PORT train.py"),
        (16, 8, None, "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:PORT train.py"),
        (8, 8, None, "torchrun --nproc-per-node 8 train.py"),
        (4, 2, 3, "torchrun --nproc-per-node 3 train.py"),
        (1, 1, 4, "torchrun --nproc-per-node 4 train.py"),
    ],
)
def test_the_command_starts_as_many_processes_on_as_many_machines(total, here, number, start, monkeypatch):
    monkeypatch.setattr(runs, "processes", lambda: total)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    assert runs.command(number) == start


def test_printed_commands_quote_the_folder(whole, tmp_path, monkeypatch, capsys):
    folder = Path(shutil.copytree(whole, tmp_path / "my run"))
    assert train.main(["--resume", str(folder)]) == 0
    command = shlex.split(capsys.readouterr().out.partition("is finished: ")[2])
    assert parse_arguments(command[2:])[0].evaluate == str(folder)
    (folder / "summary.json").unlink()
    assert shlex.split(said(capsys, "--evaluate", folder)[1])[-1] == str(folder)
    assert f"--resume '{folder}'" in said(capsys, "--out", folder)[1]


def test_a_file_called_checkpoint_best_is_no_checkpoint(tmp_path):
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-best", "checkpoint-best2", "checkpoint-11.tmp"):
        (tmp_path / name).write_text("")
    assert [path.name for path in runs.checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]


@pytest.mark.parametrize("how", [{"PYTHONSAFEPATH": "1"}, {}])
def test_math_verify_is_found_without_the_folder_on_the_path_and_under_a_memory_limit(how):
    path = f"import sys; sys.path.insert(0, {str(ROOT)!r})"
    script = f"{path}; from support.judge import JUDGE as J; J.start(); print(J.equivalent('2x', 'x+x'))"
    limit = "" if how else "ulimit -v 3500000; "
    command = ["bash", "-c", f"{limit}exec {shlex.quote(sys.executable)} -c {shlex.quote(script)}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | how)
    assert result.stdout == "True\n", result.stderr


@pytest.mark.parametrize("there, advice", [(True, "memory"), (False, "pip install math-verify")])
def test_a_judge_that_does_not_start_is_only_missing_where_it_is(there, advice, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: there or None)
    monkeypatch.setattr(sys, "executable", shutil.which("true"))
    with pytest.raises(ValueError, match=advice):
        Judge().start()


@pytest.mark.parametrize("algorithm", variants.ALGORITHMS)
def test_more_draws_than_steps_cost_no_memory(model, algorithm):
    config = make_config(mc_samples=10**11, num_generations=3)
    run, rewards = make_rollout(model, config), torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    r = lambda rows: torch.zeros(6, run.sampling_steps)  # noqa: E731
    generator = torch.Generator().manual_seed(0)
    _, w = variants.ALGORITHMS[algorithm](run, rewards, config, generator, r)
    assert w.shape == (6, 4) and w.isfinite().all()


@pytest.mark.parametrize("total", [4, 10**8, 10**12, 10**18])
def test_inclusion_probabilities_are_numbers_for_any_total(total):
    p = variants.inclusion_probabilities(torch.tensor([0.5, 0.3, 0.1, 0.1, 0.0], dtype=torch.float64), total)
    assert p.tolist() == [1, 1, 1, 1, 0]


@pytest.mark.parametrize("kind, advice", [("tiny", "--base-steps"), ("llada", "--num-generations")])
def test_what_would_help_a_model_that_learnt_nothing_depends_on_the_model(kind, advice, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(evaluation, "answer_one", lambda *_: None)
    run = types.SimpleNamespace(model=kind, eval_split="test")
    setup = types.SimpleNamespace(run=run, task=types.SimpleNamespace(question=str))
    summary = {"base": {"greedy": 0.0}, "final": {"greedy": 0.0}, "seconds": 1, "by_sampling_steps": {}}
    train.show(setup, tmp_path, ["a question"], [ROW], summary)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("nothing was learnt"))
    assert advice in line and ("--base-steps" in line) == (kind == "tiny")


@pytest.mark.parametrize("answer", [None, 18, ["#### 18"]])
def test_an_answer_of_gsm8k_that_is_no_text_is_named(answer):
    with pytest.raises(ValueError, match="the answer is .*, not a text that ends in ####"):
        TASKS["gsm8k"]._from_row({"question": "9 + 9?", "answer": answer})


def test_out_of_memory_in_an_evaluation_does_not_speak_of_training():
    run = RunConfig(evaluate="runs/mine")
    assert runs.explain(MemoryError(), run) == "out of memory: lower --tokens-per-pass (now 5120)"


def test_a_prompt_is_answered_by_the_first_process_alone(whole, monkeypatch, capsys):
    monkeypatch.setattr(runs, "rank", lambda: 1)
    assert train.main(["--evaluate", str(whole), "--prompt", "1 2 3 = 6"]) == 0
    assert capsys.readouterr().out == ""


# ---- Rounding between rollout and update -------------------------------------------------------


def test_a_mask_that_hides_nothing_changes_no_bit(model):
    ids, _ = make_questions()
    assert torch.equal(model(ids), model(ids, torch.ones_like(ids, dtype=torch.bool)))


def test_whether_a_pass_has_padding_does_not_choose_the_kernel(model, monkeypatch):
    """A row is computed alike beside padded rows and beside none: micro-batches of rollout and update differ."""
    seen, attend = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, v, attn_mask: seen.append(attn_mask) or attend(q, k, v, attn_mask=attn_mask),
    )
    ids, mask = make_questions()
    for rows in (mask.all(1), ~mask.all(1)):
        model(ids[rows], mask[rows])
    assert all(found is not None and found.shape[1:] == (1, 1, ids.shape[1]) for found in seen)


def test_probabilities_are_float32_also_of_bf16_logits():
    logits = torch.tensor([[16.0, 16.125, 3.0]], dtype=torch.bfloat16)
    assert agrpo.token_logprobs(logits, 2, make_config()).dtype == torch.float32


def test_one_step_of_a_bf16_logit_is_tolerable_and_more_than_two_are_not():
    below, above = torch.tensor([16.0, 16.125], dtype=torch.bfloat16)
    assert torch.nextafter(below, above) == above  # neighbours
    for temperature in (1.0, 0.6):
        config = make_config(temperature=temperature)
        limit = train.tolerable_ratio_error(torch.bfloat16, config)
        step = float(above - below) / temperature
        assert torch.tensor(step).expm1() < torch.tensor(2 * step).expm1() <= limit + 1e-6
        assert torch.tensor(3 * step).expm1() > limit


def test_in_float32_a_thousandth_is_alarming():
    assert train.tolerable_ratio_error(torch.float32, make_config()) == pytest.approx(1e-3, rel=1e-2)


def test_a_low_temperature_overflows_nothing():
    assert train.tolerable_ratio_error(torch.bfloat16, make_config(temperature=1e-9)) > 1e9


@pytest.mark.parametrize("error", [0.5, float("nan")])
def test_a_ratio_that_rounding_does_not_explain_is_said_once(error, tmp_path, capsys, monkeypatch):
    update = train.update
    monkeypatch.setattr(train, "update", lambda *everything: update(*everything) | {"ratio_error": error})
    assert train.main([*FLAGS, str(tmp_path / "run")]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "ratio_error" in line]
    assert len(lines) == 1 and lines[0].startswith(
        f"update 1: ratio_error is {error}, and rounding explains 0.001 at most"
    )
    (tmp_path / "run" / "summary.json").unlink()
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    assert "ratio_error" not in capsys.readouterr().out


def test_a_usual_run_speaks_of_no_ratio(tmp_path, capsys):
    assert train.main([*FLAGS, str(tmp_path / "run")]) == 0
    assert "ratio_error" not in capsys.readouterr().out
