"""--algorithm and --unmasking: every algorithm is the same loop with another function, a reader's own included."""

import json

import pytest
from test_cli import shared

import agrpo
import variants
from support.evaluation import Setup
from support.settings import find_algorithm, parse_arguments
from train import main, with_algorithm

FLAGS = (
    "--task sudoku --base-steps 40 --max-steps 2 --eval-steps 8 --eval-prompts 8 --eval-every 9 --prompts-per-step 4 "
    "--mc-samples 2 --eval-split validation"
).split()
OWN = """
import torch
import agrpo
import variants

def the_same(run, rewards, config, generator, step_rewards=None):
    advantages = agrpo.group_advantages(rewards, config.num_generations)
    return advantages[:, None].expand(-1, run.sampling_steps), agrpo.sample_timesteps(run, config, generator)

def nothing(run, rewards, config, generator, step_rewards=None):
    return torch.zeros_like(run.step_entropies()), torch.ones_like(run.step_entropies())

def too_short(run, rewards, config, generator, step_rewards=None):
    return torch.zeros(len(rewards), 3), torch.ones(len(rewards), 3)

def stepwise(run, rewards, config, generator, step_rewards=None):
    return variants.agrpo_sa(run, rewards, config, generator, step_rewards)

def looking(run, rewards, config, generator, step_rewards=None):
    r = step_rewards(torch.ones(len(rewards), dtype=torch.bool))
    assert r.shape == (len(rewards), run.sampling_steps) and 0 < r.max() <= 1 and r.min() >= 0
    return agrpo.estimate(run, rewards, config, generator)

stepwise.needs_step_rewards = looking.needs_step_rewards = stepwise.needs_advantage = True
number = 3
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs beside each other share the base model, which is most of their time."""
    return shared(tmp_path_factory)


@pytest.fixture(scope="module")
def trained(folder):
    """(flags) -> metrics.jsonl of a short run with them, without its wall-clock field. Equal flags run once."""
    runs = {}

    def train(*flags):
        if flags not in runs:
            path = folder / f"algorithms-{len(runs)}"
            assert main([*FLAGS, *flags, "--out", str(path)]) == 0
            runs[flags] = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
            assert all(row.pop("seconds") > 0 for row in runs[flags])
        return runs[flags]

    return train


@pytest.fixture(scope="module")
def own(folder):
    (folder / "my_file.py").write_text(OWN)
    return lambda function: ("--algorithm", f"{folder / 'my_file.py'}:{function}")


# ---- The algorithms that have names ------------------------------------------------------------


@pytest.mark.parametrize("algorithm", variants.ALGORITHMS)
def test_every_algorithm_is_the_same_loop_with_another_function(trained, algorithm):
    rows, plain = trained("--algorithm", algorithm), trained("--algorithm", "agrpo")
    assert len(rows) == 2 and rows[0]["signal"] > 0
    # 32 completions, k = 2: agrpo-sa takes k on average, agrpo one at least.
    assert all(0 < row["evaluations"] <= 4 * 8 * 2 + 1 and row["ratio_error"] < 1e-5 for row in rows)
    assert all(row["gradient_norm"] > 0 for row in rows)
    # The first rollout comes before the estimator has said anything; what it says differs.
    same = "reward", "accuracy", "entropy", "signal"
    assert [rows[0][name] for name in same] == [plain[0][name] for name in same]
    assert algorithm == "agrpo" or rows[0]["gradient_norm"] != plain[0]["gradient_norm"]


def test_the_name_is_the_function():
    for name, function in variants.ALGORITHMS.items():
        setup = Setup(*parse_arguments(["--algorithm", name, "--beta", "0"]), None, _Model(), None)
        assert with_algorithm(setup).estimate is find_algorithm(name) is function
        assert with_algorithm(setup).accumulate is agrpo.accumulate_gradient  # the same for all
        assert with_algorithm(setup).penalty is None
    assert find_algorithm("agrpo") is agrpo.estimate


class _Model:
    mask_token_id = 2


def test_algorithms_have_their_published_defaults():
    llada = ["--model", "llada", "--task", "gsm8k"]
    run, config = parse_arguments([*llada, "--algorithm", "egspo-sa"])
    assert (config.mc_samples, config.epsilon_high, config.temperature, config.top_k) == (8, 0.5, 0.9, 0)
    assert (run.beta, run.unmasking, run.lora_rank, run.learning_rate) == (0.04, "low_confidence", 128, 3e-5)
    run, config = parse_arguments([*llada])
    assert (config.importance_sampling, config.epsilon_high, config.top_k) == ("entropy", 0.2, 150)
    assert (run.beta, run.unmasking, run.lora_rank, run.learning_rate) == (0.0, "random", 64, 5e-6)
    run, config = parse_arguments(["--algorithm", "egspo"])
    assert (run.beta, run.unmasking, config.epsilon_high, run.completion_length) == (0.04, "random", 0.5, 8)
    for name in ("agrpo-sa", "paper"):  # the rest of them are agrpo's
        run, config = parse_arguments(["--algorithm", name])
        assert (run.beta, config.epsilon_high, config.mc_samples) == (0.0, 0.2, 2)


def test_egspos_penalty_is_in_the_log(trained):
    rows = trained("--algorithm", "egspo")
    assert rows[0]["penalty"] == pytest.approx(0, abs=1e-6) and rows[1]["penalty"] > 0  # still the reference at first
    assert all(row["penalty"] == 0 for row in trained("--algorithm", "agrpo"))


@pytest.mark.parametrize("unmasking", ["low_confidence", "low_confidence_kept"])
def test_low_confidence_trains_by_what_it_draws_or_by_what_it_keeps(trained, unmasking):
    rows = trained("--unmasking", unmasking, "--top-k", "3", "--algorithm", "egspo-sa")
    assert all(0 < row["evaluations"] <= 64 and row["ratio_error"] < 1e-5 for row in rows)
    other = trained("--unmasking", "low_confidence", "--top-k", "3", "--algorithm", "egspo-sa")
    assert rows[0]["reward"] == other[0]["reward"]  # one rollout, two scores
    assert unmasking == "low_confidence" or rows[0]["gradient_norm"] != other[0]["gradient_norm"]


# ---- A reader's own ----------------------------------------------------------------------------


def test_my_own_function_trains(trained, own):
    assert trained(*own("the_same")) == trained("--algorithm", "agrpo")
    rows = trained(*own("nothing"))
    assert all(row["evaluations"] == row["gradient_norm"] == row["loss"] == 0 for row in rows)


def test_my_own_function_may_ask_for_step_rewards(trained, own):
    assert trained(*own("stepwise")) == trained("--algorithm", "agrpo-sa")
    assert trained(*own("looking")) == trained("--algorithm", "agrpo")  # noting greedy completions changes no draw


def test_its_name_decides_nothing_else(folder):
    (folder / "egspo_of_mine.py").write_text(OWN)
    run, config = parse_arguments(["--algorithm", f"{folder / 'egspo_of_mine.py'}:the_same"])
    assert (run.beta, config.epsilon_high) == (0.0, 0.2)  # not EGSPO's


def test_a_finished_run_is_asked_without_its_estimator(folder, own, tmp_path, capsys):
    (tmp_path / "gone.py").write_text(OWN)
    flags = "--base-steps 3 --max-steps 0 --eval-steps 2 --eval-prompts 8 --out".split()
    assert main(["--algorithm", f"{tmp_path / 'gone.py'}:the_same", *flags, str(tmp_path / "run")]) == 0
    (tmp_path / "gone.py").write_text("raise SystemExit('was run')")
    assert main(["--evaluate", str(tmp_path / "run"), "--prompt", "3 12 7 = 16"]) == 0
    (tmp_path / "gone.py").unlink()
    assert main(["--evaluate", str(tmp_path / "run"), "--prompt", "3 12 7 = 16"]) == 0


def test_tables_of_the_wrong_shape_are_one_line(own, tmp_path, capsys):
    assert main([*FLAGS, *own("too_short"), "--base-steps", "1", "--out", str(tmp_path / "run")]) == 1
    stderr = capsys.readouterr().err
    assert "too_short: weights of shape (32, 3), not (32, 8)" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    "name, content, word",
    [
        ("missing.py:f", None, "there is no file"),
        ("f.py:absent", OWN, "no attribute 'absent'"),
        ("f.py:number", OWN, "number is not a function"),
        ("f.py:", OWN, "no attribute ''"),
        ("f.py", OWN, "FILE.py:FUNCTION"),
        ("f.py:f", "1 / 0", "ZeroDivisionError: division by zero"),
        ("f.py:f", "import no_such_module", "No module named 'no_such_module'"),
        ("f.py:f", "def f(:\n    pass\n", "SyntaxError"),
        ("f.txt:f", OWN, "FILE.py:FUNCTION"),
    ],
)
def test_a_file_or_function_that_is_not_there_or_raises_is_one_line(tmp_path, name, content, word, capsys):
    if content:
        (tmp_path / name.partition(":")[0]).write_text(content)
    with pytest.raises(SystemExit) as exit:
        parse_arguments(["--algorithm", str(tmp_path / name)])
    stderr = capsys.readouterr().err
    assert exit.value.code == 2 and "Traceback" not in stderr
    assert word in stderr.splitlines()[-1] and "--algorithm" in stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--algorithm", "agrpo-sa", "--beta", "0.1"], "--beta"),
        (["--algorithm", "agrpo-sa", "--entropy-bonus", "0.1"], "--entropy-bonus"),
        (["--algorithm", "agrpo-sa", "--num-generations", "2"], "--num-generations 3"),
    ],
)
def test_what_agrpo_sa_cannot_do_is_one_line(flags, word, capsys):
    with pytest.raises(SystemExit) as exit:
        parse_arguments(flags)
    assert exit.value.code == 2 and word in capsys.readouterr().err.splitlines()[-1]


def test_nor_my_own_function_that_needs_an_advantage(own, capsys):
    with pytest.raises(SystemExit) as exit:
        parse_arguments([*own("stepwise"), "--beta", "0.1"])
    assert exit.value.code == 2 and "--beta" in capsys.readouterr().err.splitlines()[-1]
