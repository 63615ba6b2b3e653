"""The laboratory's commands run, whole and small, write what they say, and go on where they were interrupted."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import agrpo
import variants
from experiments import (
    clip,
    collapse,
    confirm,
    curves,
    dial,
    draws,
    exact,
    report,
    runner,
    steps,
    tracking,
    variance,
)
from support import settings

FINDINGS = [clip, collapse, confirm, curves, dial, exact, steps, tracking, variance]
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("laboratory")


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    """Folders and processes are the module's own again after each test."""
    for module, name in ((runner, "FOLDER"), (runner, "WORKERS"), (report, "RESULTS")):
        monkeypatch.setattr(module, name, getattr(module, name))


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """tests/test_unbiased.py measures all rows of the exact table; here two will do."""
    for table in ("EXACT", "BIASED"):
        name, row = list(getattr(exact, table).items())[-1]
        monkeypatch.setattr(exact, table, {name: row})


def call(module, out):
    finding = module.table if module is exact else module.finding
    lengths = (4,) if module is tracking else ()
    runner.main(finding, module.__doc__, ["--quick", "--out", str(out)], lengths)


@pytest.mark.parametrize("module", FINDINGS, ids=lambda module: module.__name__.rpartition(".")[2])
def test_every_command_writes_its_numbers_and_its_picture(out, module, capsys):
    name = Path(module.__file__).stem
    call(module, out)
    written = json.loads((out / f"estimators-{name}.json").read_text())
    assert written["command"] == f"python experiments/{name}.py"
    assert (out / f"estimators-{name}.png").stat().st_size > 5_000
    said = capsys.readouterr().out
    assert all(f"{claim}: not settled (" in said for claim in written.get("claims", []))  # nothing was learnt


def test_a_finished_run_is_not_repeated(out, monkeypatch):
    call(collapse, out)
    monkeypatch.setattr(runner, "do_one", None)
    before = (out / "estimators-collapse.json").read_text()
    call(collapse, out)
    assert (out / "estimators-collapse.json").read_text() == before


def test_an_interrupted_command_ends_cleanly_and_goes_on(tmp_path):
    command = [sys.executable, "experiments/collapse.py", "--quick", "--out", str(tmp_path)]
    started = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while started.poll() is None and not list(tmp_path.glob("runs/make_base-*.json")):
        time.sleep(0.05)
    started.send_signal(signal.SIGTERM)
    said = started.communicate(timeout=60)[1]
    assert started.returncode == 143 and "goes on from here" in said and "Traceback" not in said
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*.json")}
    call(collapse, tmp_path)
    assert (tmp_path / "estimators-collapse.json").exists()
    assert all(path.stat().st_mtime_ns == written for path, written in done.items())


@pytest.mark.parametrize("module", [agrpo, variants, draws, runner, variance, exact.oracle])
def test_other_code_is_another_run_and_other_comments_are_not(module, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "code", runner.code.__wrapped__)  # not kept

    def name():
        functions = {variance: variance.measure_variance, exact.oracle: variance.measure_variance}
        return runner.job_name(functions.get(module, runner.learn), {"seed": 0})

    before, copy = name(), tmp_path / "copy.py"
    copy.write_text(Path(module.__file__).read_text() + "# a comment\n")
    monkeypatch.setattr(module, "__file__", str(copy))
    assert name() == before
    copy.write_text(copy.read_text() + "changed = True\n")
    assert name() != before


def test_how_a_finding_is_told_repeats_no_run(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "code", runner.code.__wrapped__)
    before, copy = runner.job_name(runner.learn, {}), tmp_path / "copy.py"
    copy.write_text("changed = True\n")
    monkeypatch.setattr(report, "__file__", str(copy))
    assert runner.job_name(runner.learn, {}) == before


def test_a_run_of_code_that_changed_meanwhile_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="the code was changed"):
        runner.do_one((runner.learn, tmp_path / "learn-of-before.json", {"seed": 0}))


def test_quick_numbers_cannot_replace_results():
    with pytest.raises(SystemExit):
        runner.main(curves.finding, "", ["--quick"])


def result(right, signal=0.5):
    return {
        "curve": [{"evaluations": 1, "sampled": 0.0, "signal": signal}],
        "updates": 1,
        "cpu_seconds": 1,
        "sampling_steps": 2,
        "test": {"2": {"sampled": right, "greedy": right}, "4": {"sampled": 0.0, "greedy": 0.0}},
        "diversity": {"pass@16": 0.0, "distinct": 0.0},
    }


def test_an_estimator_is_compared_with_the_reference_of_the_same_seed():
    easy_and_hard = [0.9, 0.1]  # seeds differ by far more than the estimators
    reference, other = [result(x) for x in easy_and_hard], [result(x + 0.05) for x in easy_and_hard]
    row = report.learning_row(other, reference)
    assert row["sampled minus reference"] == pytest.approx([0.05, 0]) and row["sampled"][1] > 1
    assert report.paired(other, reference, "greedy", 4) == [0, 0]
    assert report.paired([result(0, 0.7)] * 2, reference, "signal") == pytest.approx([0.2, 0])


def test_runs_are_compared_after_equally_many_updates():
    curve = [{"updates": u, "sampled": s} for u, s in ((0, 0.2), (10, 0.4), (30, 0.8))]
    assert [report.after({"curve": curve}, u) for u in (0, 5, 10, 20, 30, 99)] == pytest.approx(
        [0.2, 0.3, 0.4, 0.6, 0.8, 0.8]
    )


@pytest.mark.parametrize("difference, said", [(0.05, "yes"), (-0.05, "no, the opposite"), (0.01, "not settled")])
def test_a_verdict_says_whether_the_interval_excludes_zero(difference, said, capsys):
    report.verdict("ours is better", [difference, 0.02])
    assert capsys.readouterr().out == f"ours is better: {said} ({100 * difference:+.1f} +- 2.0 points)\n"


def test_the_interval_is_students():
    mean, half = report.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and half == pytest.approx(1.963, abs=1e-3)  # 2.776 x 1.5811 / sqrt(5)


@pytest.mark.parametrize("flags, passes", [("", 1), ("--beta 0.04", 2)])
def test_evaluations_count_rollouts_updates_and_the_reference(out, monkeypatch, flags, passes):
    """With a KL to a reference model, every sequence of an update goes through two models; validations do not count."""
    monkeypatch.setattr(runner, "FOLDER", out / "runs")
    done, update, rolled, roll_out = [], runner.train.update, [], runner.train.roll_out
    monkeypatch.setattr(runner.train, "update", lambda *inputs: done.append(update(*inputs)) or done[-1])
    monkeypatch.setattr(runner.train, "roll_out", lambda *inputs: rolled.append(roll_out(*inputs)) or rolled[-1])
    variant = {"label": "", "m": 4, "flags": flags}
    scale = {"evaluations": 9, "base_steps": 5, "prompts": 3, "questions": 5, "checks": 1}
    points = runner.learn("countdown", 0, variant, scale)["curve"]
    run = rolled[0][0]  # a rollout runs each distinct state of a step once
    states = sum(len(run.state_at(torch.full_like(run.steps_taken, t)).unique(dim=0)) for t in range(4))
    assert [point["evaluations"] for point in points] == [0, states + done[0]["evaluations"] * passes]
    assert 4 * 3 <= states < 3 * 8 * 4
    assert done[0]["evaluations"] > 0 or passes == 1  # without a signal, a KL alone asks for an update


# ------------------------------------------------------------------------------------------------ variance
def small_batch(B=6, m=4, parameters=7):
    """Scores (B m, .), advantages (B, m), and a Rollout whose steps write a token each with random entropies."""
    generator = torch.Generator().manual_seed(0)
    S = torch.randn(B * m, parameters, generator=generator)
    A = torch.randn(B, m, generator=generator, dtype=torch.float64)
    # Not near 0: rare draws of huge weight would need more repeats.
    H = 0.1 + 0.9 * torch.rand(B, m, generator=generator, dtype=torch.float64)
    steps = torch.arange(m).expand(B, m)
    run = agrpo.Rollout(steps, steps > -1, steps, 0 * H, H, torch.full((B,), m), m, 0, 1)
    return S, A, run


def mean_square_error(draw, S, A, repeats):
    """E||sum w A S - sum A S||^2 by repetition, and its standard error, for weights (B, m) of mean 1 = draw()."""
    errors = torch.stack([((draw() - 1) * A).flatten() @ S.double() for _ in range(repeats)])
    squares = errors.square().sum(1)
    return squares.mean().item(), (squares.std() / repeats**0.5).item()


def test_the_variance_of_draws_is_what_repetition_finds():
    S, A, run = small_batch()
    config = agrpo.AGRPOConfig(sampling_steps=4, mc_samples=2, importance_sampling="entropy")
    independent, generator = agrpo.replace(config, low_discrepancy=False), torch.Generator().manual_seed(1)
    products = (S @ S.T).double()
    # Shared draws take as many steps as the official ones of completions that have an advantage: here one and all.
    few, all_of_them = torch.zeros_like(A), torch.ones_like(A)
    few[0] = 1
    q = agrpo.proposal(run, config)
    p = variants.batch_proposal(run, A)

    def shared(plain):
        p_of = variants.inclusion_probabilities(p, ((1 - (1 - q) ** 2) * (plain != 0)).sum())
        return lambda: variants.systematic_draw(p_of, agrpo.uniforms((), generator)) / p_of

    cases = {
        "entropy, independent": lambda: 4 * agrpo.sample_timesteps(run, independent, generator),
        "entropy, low discrepancy": lambda: 4 * agrpo.sample_timesteps(run, config, generator),
        variance.SHARED: shared(all_of_them),
    }
    found = variance.added_by_draws(run, A, all_of_them, products, k=2)
    for name, draw in cases.items():
        measured, error = mean_square_error(draw, S, A, repeats=4000)
        assert abs(measured - found[name]) < 4 * error < 0.2 * found[name], name
    measured, error = mean_square_error(shared(few), S, A, repeats=4000)
    assert abs(measured - variance.added_by_draws(run, A, few, products, k=2)[variance.SHARED]) < 4 * error


def test_the_official_draws_may_take_a_step_twice():
    """One set of strata for the batch, not one per completion."""
    _, config = settings.parse_arguments(
        ["--task", "countdown", "--sampling-steps", "6", *curves.OFFICIAL.flags.split()]
    )
    at = torch.arange(6).expand(200, 6)
    H = torch.ones(200, 6, dtype=torch.float64)
    run = agrpo.Rollout(at, at > -1, at, H, H, torch.full((200,), 6), 6, 0, 1)
    weights = getattr(draws, curves.OFFICIAL.draw)(run, torch.zeros(200), config, torch.Generator().manual_seed(0))[1]
    counts = (weights * config.mc_samples).round().long()  # a step drawn once weighs 1 / (k q m) = 1 / k
    assert torch.equal(counts / config.mc_samples, weights.float()) and (counts.sum(1) == config.mc_samples).all()
    assert 0.08 < (counts == 2).any(1).double().mean() < 0.26
    strata = agrpo.inverse_cdf(torch.ones(1, 6), torch.linspace(0, 1, 401, dtype=torch.float64)[None, :-1])
    assert (counts.sum(0) - strata.flatten().bincount()).abs().max() <= 2  # evenly over the batch
