"""With k >= T nothing is estimated: the gradient is the full sum, for every sampler, and each step is paid once."""

import pytest
import torch
from conftest import gradient, make_config, make_prompts, make_rollout

import agrpo
from agrpo import accumulate_gradient, sample_timesteps

SAMPLERS = [{"importance_sampling": i, "low_discrepancy": d} for i in ("uniform", "entropy") for d in (True, False)]


def naive_gradient(model, run, advantages, config):
    """- 1/B sum_i A_i 1/m sum_t log pi(a_t | s_t), one state at a time, with a softmax of its own."""
    batch, n = run.completion_ids.shape
    for i in range(batch):
        for t in range(int(run.steps_taken[i])):
            ids = torch.where(run.unmask_step[i] < t, run.completion_ids[i], model.mask_token_id)
            keep = torch.cat([run.prompt_mask[i], torch.ones(n, dtype=torch.bool)])
            logits = model(torch.cat([run.prompt_ids[i], ids])[keep][None])[0, -n:]
            logits[:, model.mask_token_id] = -torch.inf
            logp = (logits / config.temperature).log_softmax(1)
            chosen = (run.unmask_step[i] == t).nonzero()[:, 0]
            (
                -advantages[i] * logp[chosen, run.completion_ids[i, chosen]].sum() / (batch * config.sampling_steps)
            ).backward()
    return gradient(model)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("k", [4, 6])
def test_k_at_least_T_is_the_sum_over_all_steps(model, sampler, k):
    config = make_config(mc_samples=k, block_length=4, temperature=0.7, **sampler)
    run = make_rollout(model, config)
    advantages = torch.tensor([1.0, -0.5, 0.0, 2.0, -1.0, 0.25])
    stats = accumulate_gradient(model, run, advantages, config, torch.Generator(), 5)
    assert torch.allclose(gradient(model), naive_gradient(model, run, advantages, config), atol=1e-6)
    assert stats["evaluations"] == int(run.steps_taken[advantages != 0].sum())


def test_spare_slots_weigh_nothing(model):
    config = make_config(mc_samples=6)
    run = make_rollout(model, config)
    run.steps_taken[:] = torch.tensor([1, 2, 3, 4, 4, 4])
    steps, weights = sample_timesteps(run, config, torch.Generator())
    assert ((weights == 0.25).sum(1) == run.steps_taken).all() and ((weights == 0).sum(1) == 6 - run.steps_taken).all()
    assert (steps < run.steps_taken[:, None]).all()


def test_a_step_drawn_twice_is_paid_once_and_counts_twice(model, monkeypatch):
    config = make_config(mc_samples=2)
    run = make_rollout(model, config)
    draws = {"twice": [[1, 1]] * 6, "once": [[1, 2]] * 6}
    gradients, evaluations = {}, {}
    for name, weights in (("twice", [0.1, 0.3]), ("once", [0.4, 0.0])):
        draw = torch.tensor(draws[name]), torch.tensor([weights] * 6, dtype=torch.float64)
        monkeypatch.setattr(agrpo, "sample_timesteps", lambda *_, draw=draw: draw)
        evaluations[name] = accumulate_gradient(model, run, torch.ones(6), config, None, 8)["evaluations"]
        gradients[name] = gradient(model)
    assert torch.allclose(gradients["twice"], gradients["once"], atol=1e-7)
    assert evaluations == {"twice": 6, "once": 6}


def test_timesteps_are_drawn_once_on_all_rows_and_agreeing_groups_cost_nothing(model, monkeypatch):
    calls, original = [], agrpo.sample_timesteps
    monkeypatch.setattr(
        agrpo, "sample_timesteps", lambda r, *rest: calls.append(len(r.steps_taken)) or original(r, *rest)
    )
    config = make_config()
    run = make_rollout(model, config)
    stats = accumulate_gradient(model, run, torch.zeros(6), config, torch.Generator(), 8)
    assert calls == [6] and stats["evaluations"] == 0 and all(p.grad is None for p in model.parameters())


def test_advantages_may_differ_by_step(model):
    config = make_config(mc_samples=4)
    run = make_rollout(model, config)
    by_step = torch.randn(6, 4, generator=torch.Generator().manual_seed(5))
    accumulate_gradient(model, run, by_step, config, torch.Generator(), 8)
    actual, parts = gradient(model), 0
    for t in range(4):  # the gradient is linear in the advantages
        accumulate_gradient(model, run, by_step * (torch.arange(4) == t), config, torch.Generator(), 8)
        parts = parts + gradient(model)
    assert torch.allclose(actual, parts, atol=1e-6)
    accumulate_gradient(model, run, by_step[:, :1].expand(6, 4), config, torch.Generator(), 8)
    constant = gradient(model)
    accumulate_gradient(model, run, by_step[:, 0], config, torch.Generator(), 8)
    assert torch.allclose(constant, gradient(model), atol=1e-7)


def test_the_scale_does_not_depend_on_the_batch(model):
    config = make_config(mc_samples=4)
    run, advantages = make_rollout(model, config), torch.randn(6, generator=torch.Generator().manual_seed(5))
    twice = torch.arange(6).repeat(2)
    accumulate_gradient(model, run, advantages, config, torch.Generator(), 8)
    once = gradient(model)
    accumulate_gradient(model, run[twice], advantages[twice], config, torch.Generator(), 8)
    assert torch.allclose(once, gradient(model), atol=1e-6)


def test_low_discrepancy_spreads_the_draws_of_each_completion():
    """k = 2 of m = 4, uniform: one draw in each half, always."""
    from conftest import EOS, MASK

    config = make_config(completion_length=4, mc_samples=2)
    prompts, _ = make_prompts(500)

    class Uniform:
        mask_token_id, eos_token_id = MASK, EOS

        def __call__(self, ids, attention_mask, positions):
            return torch.zeros(int(positions.sum()), 12)

    run = agrpo.rollout(Uniform(), prompts, prompts >= 0, config, torch.Generator().manual_seed(0))
    steps, _ = sample_timesteps(run, config, torch.Generator().manual_seed(0))
    assert (steps[:, 0] < 2).all() and (steps[:, 1] >= 2).all()
    assert len(steps.unique(dim=0)) == 2  # one uniform for both: 0 with 2, 1 with 3


def test_egspo_takes_the_steps_of_highest_entropy_each_with_the_weight_of_a_uniform_draw(model):
    config = make_config(importance_sampling="top_entropy")
    run = make_rollout(model, config)
    steps, weights = sample_timesteps(run, config, torch.Generator())
    H = torch.zeros(6, 4, dtype=torch.float64).scatter_add(1, run.unmask_step, run.entropies)
    assert torch.equal(steps.sort(1).values, H.topk(2).indices.sort(1).values)
    assert torch.equal(weights, torch.full((6, 2), 1 / 2, dtype=torch.float64))
