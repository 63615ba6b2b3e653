"""No state is run twice in one call, and the gradient stays what it was; a common order per question is exact; in a
second update the clip acts."""

import itertools
from unittest.mock import patch

import pytest
import torch
from conftest import ADVANTAGES, MASK, Recorder, accumulate, distinct, gradient, make_config, make_questions
from test_full_sum import naive_gradient

import agrpo
import train
import variants
from experiments import exact, oracle


def few_questions(batch=6):
    """Two questions, three rows each: what a group of completions starts from."""
    ids, mask = make_questions(batch)
    return ids[[0, 0, 0, 1, 1, 1]], mask[[0, 0, 0, 1, 1, 1]]


def sharp(model):
    """It writes the same in most completions, as a trained model does."""
    with torch.no_grad():
        model.model.transformer.ff_out.weight.mul_(20)
    return model


def once(calls):
    """Whether no state stands twice in what a model was asked for."""
    states = torch.cat([ids.masked_fill(~mask, -1) for ids, mask, _ in calls])
    return len(states) == len(states.unique(dim=0))


@pytest.mark.parametrize("micro_batch", [1, 2, 50])
@pytest.mark.parametrize("shared_order", [False, True])
def test_no_state_is_run_twice_in_a_call(model, micro_batch, shared_order):
    """Also not in two micro-batches: sequences are counted, and there are as many as distinct states."""
    config = make_config(num_generations=3, mc_samples=4, shared_order=shared_order)
    rolled, updated, (ids, mask) = Recorder(sharp(model)), Recorder(model), few_questions()
    run = agrpo.rollout(rolled, ids, mask, config, torch.Generator().manual_seed(1), micro_batch)
    stats = accumulate(updated, run, torch.ones(6), config, micro_batch=micro_batch)
    assert once(rolled.calls) and once(updated.calls)
    seen = torch.cat([run.state_at(torch.full((6,), t)) for t in range(4)])
    states, _ = distinct(seen, mask.repeat(4, 1))
    assert sum(len(ids) for ids, _, _ in rolled.calls) == stats["evaluations"] == len(states) < len(seen)
    assert all(len(ids) <= micro_batch for ids, _, _ in rolled.calls + updated.calls)


@pytest.mark.parametrize("options", [{}, {"block_length": 4, "temperature": 0.7}])
def test_the_gradient_is_that_of_one_state_after_the_other(model, options):
    config = make_config(num_generations=3, mc_samples=4, shared_order=True, **options)
    run = agrpo.rollout(sharp(model), *few_questions(), config, torch.Generator().manual_seed(1))
    accumulate(model, run, ADVANTAGES, config)
    shared, alone = gradient(model), naive_gradient(model, run, ADVANTAGES, config)
    assert (shared - alone).norm() < 1e-5 * alone.norm()


def test_a_penalty_counts_for_every_completion_that_shares_a_state(model):
    """Against each row by itself: nothing can be shared there."""
    config = make_config(num_generations=3, mc_samples=4, shared_order=True)
    run = agrpo.rollout(sharp(model), *few_questions(), config, torch.Generator().manual_seed(1))
    penalty = variants.entropy_penalty(0.3, config, MASK)
    together = accumulate(model, run, torch.zeros(6), config, penalty=penalty)
    expected = gradient(model)
    alone = [accumulate(model, run[i : i + 1], torch.zeros(1), config, penalty=penalty) for i in range(6)]
    assert torch.allclose(gradient(model) / 6, expected, atol=1e-6) and expected.norm() > 0
    assert together["penalty"] == pytest.approx(sum(stats["penalty"] for stats in alone) / 6, rel=1e-5)
    assert together["evaluations"] < sum(stats["evaluations"] for stats in alone)


def test_completions_of_a_question_have_one_order_and_questions_their_own(model):
    config = make_config(num_generations=3, shared_order=True)
    ids, mask = make_questions(60)
    run = agrpo.rollout(model, ids, mask, config, torch.Generator().manual_seed(0))
    orders = run.unmask_step.view(20, 3, -1)
    assert (orders == orders[:, :1]).all() and len(orders[:, 0].unique(dim=0)) > 15
    assert (run.ids.view(20, 3, -1)[:, 0] != run.ids.view(20, 3, -1)[:, 1]).any()  # but draw their own tokens


def in_order(rank):
    """agrpo.draw_order, but every row has this order: ranks of the written positions."""
    draw = agrpo.draw_order

    def draw_order(batch, plan, config, generator):
        uniforms = agrpo.uniforms  # of the oracle, which hands out an order first

        def ranks(shape, generator):
            uniforms(shape, generator)
            return torch.tensor(rank, dtype=torch.float64).expand(shape)

        with patch.object(agrpo, "uniforms", ranks):
            return draw(batch, plan, config, generator)

    return draw_order


@pytest.mark.parametrize("G, estimate", [(2, agrpo.estimate), (3, agrpo.estimate), (3, exact.RAMP)])
@pytest.mark.parametrize("policy", [{}, exact.BLOCKS], ids=["one block", "blocks of two, early stop"])
def test_a_common_order_is_exact(monkeypatch, G, estimate, policy):
    """J is the mean over orders of J given the order, and a group with a common order draws its completions
    independently given it: so the estimator must be exact for every single order, and it is."""
    for rank in list(itertools.permutations(range(4)))[::5]:
        oracle.problem.cache_clear()
        with monkeypatch.context() as patched:
            patched.setattr(agrpo, "draw_order", in_order(rank))
            x = oracle.problem(0, 4.0, **policy)
            orders = x.run.unmask_step[x.run.steps_taken == 4].unique(dim=0)
            assert len(orders) == 1  # but for early stops
            bias = exact.measure(x, exact.ENTROPY | {"num_generations": G}, estimate)["bias"]
        assert bias < 1e-10
    oracle.problem.cache_clear()


def test_agrpo_sa_is_exact_with_a_common_order(monkeypatch):
    for rank in itertools.permutations(range(2)):
        oracle.problem.cache_clear()
        with monkeypatch.context() as patched:
            patched.setattr(agrpo, "draw_order", in_order(rank))
            x = oracle.problem(0, ids=exact.QUESTION[:-2], sampling_steps=2, num_generations=3, mc_samples=1)
            table = 1.5 * oracle.expected_table(x, variants.agrpo_sa, x.config)
            assert oracle.compare(x.expected(table), x.gradient)["bias"] < 1e-10
    oracle.problem.cache_clear()


def test_in_a_second_update_the_clip_acts_and_what_it_clips_has_no_gradient(model):
    config = make_config(mc_samples=4)
    run = agrpo.rollout(model, *make_questions(), config, torch.Generator().manual_seed(0))
    assert accumulate(model, run, ADVANTAGES, config)["clip_fraction"] == 0
    with torch.no_grad():
        for p in model.parameters():
            p -= 2.0 * p.grad
    model.zero_grad()
    stats = accumulate(model, run, ADVANTAGES, config)
    clipped_gradient = gradient(model)
    assert 0 < stats["clip_fraction"] < 1
    keep = []
    for t in range(4):  # the same without the clipped tokens, one step and row at a time
        for i in range(6):
            row, w = run[i : i + 1], torch.zeros(1, 4, dtype=torch.float64)
            w[0, t] = 1 / 4
            positions, tokens, old = row.action_at(torch.tensor([t]))
            logits = model(row.state_at(torch.tensor([t])), row.attention_mask, positions)
            logp = agrpo.token_logprobs(logits, MASK, config).gather(1, tokens[:, None]).squeeze(1)
            A, ratio = ADVANTAGES[i], (logp - old).exp()
            free = ~((A > 0) & (ratio > 1.2) | (A < 0) & (ratio < 0.8))
            keep.append(free)
            (-(ratio * A)[free].sum() / 4 / 6).backward()
    assert torch.allclose(gradient(model), clipped_gradient, atol=1e-6)
    assert 1 - torch.cat(keep).double().mean().item() == pytest.approx(stats["clip_fraction"] * 40 / 48)


def test_updates_per_rollout_are_that_many_optimizer_steps_on_one_rollout(tmp_path, monkeypatch):
    """One line of the log, one checkpoint: and only the first update has a ratio of 1."""
    steps, rollouts = [], []
    step, rollout = torch.optim.AdamW.step, agrpo.rollout
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *_: steps.append(1) or step(self))
    monkeypatch.setitem(variants.ROLLOUTS, "random", lambda *a: rollouts.append(1) or rollout(*a))
    flags = "--task sudoku --base-steps 5 --max-steps 2 --eval-steps 4 --eval-prompts 4 --prompts-per-step 2"
    more = "--updates-per-rollout 3 --sampling-steps 4 --eval-split validation"
    assert train.main([*flags.split(), *more.split(), "--out", str(tmp_path / "run")]) == 0
    assert len(steps) == 5 + 2 * 3 and len(rollouts) == 2
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2 and '"ratio_error": 0.0' in lines[0]
