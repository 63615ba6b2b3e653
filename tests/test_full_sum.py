"""With k >= T nothing is estimated: the gradient is the full sum, for every sampler, and each step is paid once."""

import pytest
import torch
from conftest import (
    ADVANTAGES,
    EOS,
    MASK,
    accumulate,
    gradient,
    make_config,
    make_infillings,
    make_questions,
    make_rollout,
)

import agrpo
import variants

SAMPLERS = [{"importance_sampling": i, "low_discrepancy": d} for i in ("uniform", "entropy") for d in (True, False)]
FULL = torch.full((6, 4), 1 / 4, dtype=torch.float64)  # every step, weight 1/m


def naive_gradient(model, run, advantages, config):
    """- 1/B sum_i A_i 1/m sum_t log pi(a_t | s_t), one state at a time, without padding, with a softmax of its own."""
    for i, attended in enumerate(run.attention_mask):
        steps, tokens = run.unmask_step[i, attended], run.ids[i, attended]
        for t in range(int(run.steps_taken[i])):
            logits = model(torch.where(steps < t, tokens, model.mask_token_id)[None])[0]  # (L, V)
            logits[:, model.mask_token_id] = -torch.inf
            logp = (logits / config.temperature).log_softmax(1).gather(1, tokens[:, None]).squeeze(1)
            (-advantages[i] * logp[steps == t].sum() / (len(run.ids) * run.sampling_steps)).backward()
    return gradient(model)


@pytest.mark.parametrize("questions", [make_questions, make_infillings])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("k", [4, 6])
def test_k_at_least_T_is_the_sum_over_all_steps(model, sampler, k, questions):
    config = make_config(mc_samples=k, block_length=4, temperature=0.7, **sampler)
    run = make_rollout(model, config, questions=questions)
    stats = accumulate(model, run, ADVANTAGES, config, micro_batch=5)
    assert torch.allclose(gradient(model), naive_gradient(model, run, ADVANTAGES, config), atol=1e-6)
    assert stats["evaluations"] == int(run.steps_taken[ADVANTAGES != 0].sum())


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("m", [3, 4])
def test_spare_draws_weigh_nothing(model, sampler, m):
    """Each executed step weighs 1/m, in float64, not more for the draws that are left over, and no other anything."""
    config = make_config(sampling_steps=m, mc_samples=6, **sampler)
    run = make_rollout(model, config)
    run.steps_taken[:] = torch.tensor([1, 2, 3, m, m, m])
    weights = agrpo.sample_timesteps(run, config, torch.Generator())
    assert torch.equal(weights, (torch.arange(m) < run.steps_taken[:, None]).double() / m)


def test_a_step_drawn_twice_counts_twice_and_is_run_once(model):
    config = make_config(mc_samples=2)
    run = make_rollout(model, config)
    u = torch.tensor([[0.3, 0.4]] * 6)  # both in [1/4, 1/2): step 1
    weights = agrpo.timestep_weights(agrpo.proposal(run, config), u)
    assert torch.equal(weights, torch.tensor([[0.0, 1.0, 0.0, 0.0]] * 6, dtype=torch.float64))  # 2 / (2 x 1/4) / 4
    assert accumulate(model, run, torch.ones(6), config, weights)["evaluations"] == 6
    twice = gradient(model)
    accumulate(model, run, torch.ones(6), config, weights / 2)
    assert torch.allclose(twice, 2 * gradient(model), atol=1e-7)


def test_what_weighs_nothing_is_not_run_and_zero_advantages_only_for_a_penalty(model):
    config = make_config(mc_samples=4)
    run = make_rollout(model, config)
    stats = accumulate(model, run, torch.zeros(6), config, FULL)
    assert stats["evaluations"] == stats["loss"] == 0 and all(p.grad is None for p in model.parameters())
    penalty = variants.entropy_penalty(0.1, config, MASK)
    assert accumulate(model, run, torch.zeros(6), config, FULL, penalty=penalty)["evaluations"] == 24
    half = FULL * torch.tensor([1, 0, 1, 0])
    assert accumulate(model, run, torch.ones(6), config, half, penalty=penalty)["evaluations"] == 12


def test_advantages_may_differ_by_step(model):
    config = make_config()
    run, by_step = make_rollout(model, config), torch.randn(6, 4, generator=torch.Generator().manual_seed(5))
    accumulate(model, run, by_step, config, FULL)
    actual, parts = gradient(model), 0
    for t in range(4):  # the gradient is linear in the advantages
        accumulate(model, run, by_step * (torch.arange(4) == t), config, FULL)
        parts = parts + gradient(model)
    assert torch.allclose(actual, parts, atol=1e-6)
    accumulate(model, run, by_step[:, :1].expand(6, 4), config, FULL)
    constant = gradient(model)
    accumulate(model, run, by_step[:, 0], config, FULL)
    assert torch.allclose(constant, gradient(model), atol=1e-7)


def test_the_scale_does_not_depend_on_the_batch_and_parts_of_it_add_up(model):
    """A part of a batch whose weights are scaled by its share of B: what several processes accumulate."""
    config = make_config()
    run = make_rollout(model, config)
    accumulate(model, run, ADVANTAGES, config, FULL)
    once, twice = gradient(model), torch.arange(6).repeat(2)
    accumulate(model, run[twice], ADVANTAGES[twice], config, FULL[twice])
    assert torch.allclose(once, gradient(model), atol=1e-6)
    for rows in (torch.arange(4), torch.arange(4, 6)):
        accumulate(model, run[rows], ADVANTAGES[rows], config, FULL[rows] * len(rows) / 6)
    assert torch.allclose(once, gradient(model), atol=1e-6)


def test_a_step_without_entropy_can_still_be_drawn(model):
    """Its gradient need not be 0 where rounding says that the model had no choice. Also if no step has any."""
    config = make_config(importance_sampling="entropy")
    run = make_rollout(model, config)
    run.entropies.masked_fill_(run.unmask_step == 1, 0)
    q = agrpo.proposal(run, config)
    assert (q > 0).all() and (q[:, 1] < 1e-8).all() and torch.allclose(q.sum(1), torch.ones(6).double())
    run.entropies.zero_()
    assert torch.allclose(agrpo.proposal(run, config), FULL)
    assert (variants.batch_proposal(run, torch.ones(6, 4)) > 0).all()


class Uniform:
    mask_token_id, eos_token_id = MASK, EOS

    def __call__(self, ids, attention_mask, positions):
        return torch.zeros(int(positions.sum()), 12)


def test_low_discrepancy_spreads_the_draws_of_each_completion():
    """k = 2 of m = 4, uniform: one draw in each half, always; and one uniform for both: 0 with 2, 1 with 3."""
    config = make_config(mc_samples=2)
    run = agrpo.rollout(Uniform(), *make_questions(500, n=4), config, torch.Generator().manual_seed(0))
    drawn = agrpo.sample_timesteps(run, config, torch.Generator().manual_seed(0)) > 0
    assert {tuple(row) for row in drawn.tolist()} == {(True, False, True, False), (False, True, False, True)}


def test_egspo_takes_the_steps_of_highest_entropy_each_with_the_weight_of_a_uniform_draw(model):
    config = make_config(num_generations=3)
    run = make_rollout(model, config)
    _, weights = variants.egspo(run, torch.arange(6.0), config, None)
    H = torch.stack([run.entropies.where(run.unmask_step == t, 0).sum(1) for t in range(4)], 1)
    assert torch.equal(run.step_entropies(), H)
    assert torch.equal(weights, torch.zeros_like(H).scatter(1, H.topk(2).indices, 1 / 2))  # T / (k m)


def test_egspos_weights_are_doubles(model):
    """A coefficient of 1/3 held in float32 is off by 1.5e-8, and so is the gradient."""
    config = make_config(sampling_steps=3, mc_samples=2, num_generations=3)
    run = make_rollout(model, config)
    run.steps_taken[:] = torch.tensor([1, 2, 3, 3, 3, 3])
    weights = variants.egspo(run, torch.arange(6.0), config, None)[1].sum(1)
    assert torch.equal(weights, run.steps_taken.double() / 3)
    weights = variants.egspo(run, torch.arange(6.0), make_config(mc_samples=1, num_generations=3), None)[1]
    assert torch.equal(weights.amax(1), run.steps_taken.double() / 3)


@pytest.mark.parametrize("name", variants.ALGORITHMS)
@pytest.mark.parametrize("k", [2, 4])
def test_every_algorithm_is_a_pair_of_tables(model, name, k):
    """Advantages and weights (B, m); what weighs anything was executed; k >= m is every step once, but for the paper's
    horizon; and agrpo-sa takes no step without an advantage."""
    config = make_config(mc_samples=k, num_generations=3)
    run, rewards = make_rollout(model, config), torch.tensor([1.0, 0.0, 0.25, 1.0, 1.0, 1.0])
    generator = torch.Generator().manual_seed(0)
    r = torch.rand(6, 4, generator=generator)
    advantages, weights = variants.ALGORITHMS[name](run, rewards, config, generator, lambda rows: r * rows[:, None])
    assert advantages.shape == weights.shape == (6, 4) and weights.dtype == torch.float64
    assert (weights >= 0).all() and weights[:3].any() and (advantages[:3] != 0).any(1).all()
    assert (advantages[3:] != 0).any() == (name == "egspo-sa")  # the others skip the group that agrees
    if name == "agrpo-sa":
        assert ((weights > 0) <= (advantages != 0)).all()
        weights = weights.where(advantages != 0, 1 / 4)
    assert name == "paper" or k < 4 or torch.equal(weights, FULL)
    assert accumulate(model, run, advantages, config, weights)["ratio_error"] < 1e-6
