"""The laboratory's commands run, whole and small, write what they say, and go on where they were interrupted."""

import json
from pathlib import Path

import pytest
import torch

import agrpo
from experiments import estimator_runs, estimators, exact, variance


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("estimators")


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """tests/test_unbiased.py measures all rows of the exact table; here two will do."""
    rows = {name: (exact.EXACT | exact.BIASED)[name] for name in ("uniform", "one pass, all masked (diffu-GRPO)")}
    monkeypatch.setattr(
        exact,
        "laboratory_rows",
        lambda seed, sharpness: {name: row(seed, sharpness) for name, row in rows.items()},
    )


@pytest.mark.parametrize("name", [command.__name__ for command in estimators.COMMANDS])
def test_every_command_writes_its_numbers_and_its_picture(out, name):
    estimators.main([name, "--quick", "--out", str(out)])
    written = json.loads((out / f"estimators-{name}.json").read_text())
    assert written["command"] == f"python experiments/estimators.py {name}"
    assert (out / f"estimators-{name}.png").stat().st_size > 5_000


def test_a_finished_run_is_not_repeated(out, monkeypatch):
    estimators.main(["collapse", "--quick", "--out", str(out)])
    monkeypatch.setattr(estimator_runs, "do_one", None)
    before = (out / "estimators-collapse.json").read_text()
    estimators.main(["collapse", "--quick", "--out", str(out)])
    assert (out / "estimators-collapse.json").read_text() == before


@pytest.mark.parametrize("module", [agrpo, estimator_runs, variance])
def test_other_code_is_another_run_and_other_comments_are_not(module, tmp_path, monkeypatch):
    monkeypatch.setattr(estimator_runs, "code", estimator_runs.code.__wrapped__)  # not kept

    def name():
        return estimator_runs.job_name(estimator_runs.measure_exact, {"seed": 0, "sharpness": 1.0})

    before, copy = name(), tmp_path / "copy.py"
    copy.write_text(Path(module.__file__).read_text() + "# a comment\n")
    monkeypatch.setattr(module, "__file__", str(copy))
    assert name() == before
    copy.write_text(copy.read_text() + "changed = True\n")
    assert name() != before


def test_a_run_of_code_that_changed_meanwhile_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="the code was changed"):
        estimator_runs.do_one((estimator_runs.measure_exact, tmp_path / "measure_exact-of-before.json", {"seed": 0}))


def test_quick_numbers_cannot_replace_results():
    with pytest.raises(SystemExit):
        estimators.main(["curves", "--quick"])


def test_an_estimator_is_compared_with_the_reference_of_the_same_seed():
    def result(right):
        return {
            "curve": [{"evaluations": 1, "sampled": right}],
            "updates": 1,
            "cpu_seconds": 1,
            "sampling_steps": 2,
            "test": {"2": {"sampled": right, "greedy": right}, "4": {"sampled": 0.0, "greedy": 0.0}},
            "diversity": {"pass@16": 0.0, "distinct": 0.0},
        }

    easy_and_hard = [0.9, 0.1]  # seeds differ by far more than the estimators
    runs = {"reference": [result(x) for x in easy_and_hard], "other": [result(x + 0.05) for x in easy_and_hard]}
    rows = estimators.learning_rows(runs, "reference")
    assert rows["other"]["sampled minus reference"] == pytest.approx([0.05, 0])
    assert rows["other"]["sampled"][1] > 1 and rows["reference"]["greedy minus reference"] == [0, 0]


@pytest.mark.parametrize("algorithm, passes", [("agrpo", 1), ("egspo", 2)])
def test_evaluations_count_rollouts_updates_and_the_reference(out, monkeypatch, algorithm, passes):
    """With a KL to a reference model, every sequence of an update goes through two models."""
    monkeypatch.setattr(estimator_runs, "FOLDER", out / "runs")
    done = {"evaluations": 5, "entropy": 0.0, "signal": 0.0, "gradient_norm": 0.0}
    monkeypatch.setattr(estimator_runs.train, "update", lambda *_: done)
    flags = estimators.steps_of(4, 2, "--algorithm", algorithm, "--prompts-per-step", "3")
    result = estimator_runs.learn("countdown", flags, 0, evaluations=100, base_steps=5, questions=5, checks=1)
    assert [point["evaluations"] for point in result["curve"]] == [0, 3 * 8 * 4 + 5 * passes]


def test_the_interval_is_students():
    mean, half = estimators.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and half == pytest.approx(1.963, abs=1e-3)  # 2.776 x 1.5811 / sqrt(5)


def small_batch(B=6, m=4, parameters=7):
    """Scores, advantages, entropies and a Rollout that has them, all random."""
    generator = torch.Generator().manual_seed(0)
    S = torch.randn(B, m, parameters, generator=generator)
    A = torch.randn(B, m, generator=generator, dtype=torch.float64)
    # Not near 0: rare draws of huge weight would need more repeats.
    H = 0.1 + 0.9 * torch.rand(B, m, generator=generator, dtype=torch.float64)
    empty = torch.zeros(B, m, dtype=torch.float64)
    steps = torch.arange(m).expand(B, m)
    run = agrpo.Rollout(steps, steps > -1, steps, steps, empty, H, torch.full((B,), m))
    config = agrpo.AGRPOConfig(completion_length=m, sampling_steps=m, mc_samples=2, importance_sampling="entropy")
    return S, A, run, config


def mean_square_error(draw, S, A, repeats):
    """E||sum w A S - sum A S||^2 by repetition, and its standard error, for weights (B, m) = draw()."""
    errors = torch.stack([((draw() - 1) * A).flatten() @ S.double().flatten(0, 1) for _ in range(repeats)])
    squares = errors.square().sum(1)
    return squares.mean().item(), (squares.std() / repeats**0.5).item()


def test_the_variance_of_draws_is_what_repetition_finds():
    S, A, run, config = small_batch()
    B, m, k = *A.shape, config.mc_samples
    q, K = agrpo.proposal(run, config), torch.einsum("bsp,btp->bst", S, S).double()
    generator = torch.Generator().manual_seed(1)

    def sampled(sampler, config):
        steps, weights = sampler(run, config, generator)
        return torch.zeros(B, m, dtype=torch.float64).scatter_add(1, steps, weights * m)

    independent = agrpo.replace(config, low_discrepancy=False)
    p = agrpo.inclusion_probabilities(agrpo.batch_proposal(run, A, config), total=2 * B)
    certain = agrpo.inclusion_probabilities(agrpo.batch_proposal(run, A, config), total=3 * B)
    assert (certain == 1).any() and not (certain == 1).all()
    cases = {
        "independent": (
            variance.added_by_draws(q, A, K, k, run, config, stratified=False),
            lambda: sampled(agrpo.sample_timesteps, independent),
        ),
        "low discrepancy": (
            variance.added_by_draws(q, A, K, k, run, config, stratified=True),
            lambda: sampled(agrpo.sample_timesteps, config),
        ),
        "official": (
            variance.added_by_official(q, A, S, K, k, run, config, bins=B * k),
            lambda: sampled(estimator_runs.batch_stratified, config),
        ),
        "allocation batch": (
            variance.added_by_batch(p, A, S),
            lambda: agrpo.systematic_draw(p, agrpo.uniforms((), generator)) / p,
        ),
        "allocation batch, some steps certain": (
            variance.added_by_batch(certain, A, S),
            lambda: agrpo.systematic_draw(certain, agrpo.uniforms((), generator)) / certain,
        ),
    }
    for name, (exactly, draw) in cases.items():
        # The official draws differ from independent ones, and from a simpler formula, by little.
        measured, error = mean_square_error(draw, S, A, repeats=10_000 if name == "official" else 4000)
        assert abs(measured - exactly) < 4 * error < 0.2 * exactly, name


def test_the_official_draws_of_the_curves_may_take_a_step_twice():
    """One set of strata for the batch, not one per completion: the run's own flags."""
    flags, replacement = estimators.CURVES[estimators.OFFICIAL]
    _, config = estimator_runs.train.parse_arguments(["--task", "countdown", *flags])
    sampler = estimator_runs.REPLACEMENTS[replacement]["sample_timesteps"]
    H = torch.ones(200, 6, dtype=torch.float64)
    at = torch.arange(6).expand(200, 6)
    run = agrpo.Rollout(at, at > -1, at, at, H, H, torch.full((200,), 6))
    config = agrpo.replace(config, completion_length=6)
    steps, weights = sampler(run, config, torch.Generator().manual_seed(0))
    twice = (steps[:, 0] == steps[:, 1]).double().mean().item()
    assert 0.08 < twice < 0.26 and torch.allclose(weights, torch.full_like(weights, 0.5))
    strata = agrpo.inverse_cdf(torch.ones(1, 6), torch.linspace(0, 1, 401, dtype=torch.float64)[None, :-1])
    assert (steps.flatten().bincount() - strata.flatten().bincount()).abs().max() <= 2  # evenly over the batch
