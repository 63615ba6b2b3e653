"""The expectation of the gradient that training follows is the policy gradient, to 1e-10: by enumeration, in float64.

What is biased is offered under its name, and its bias is measured here. `pytest -s tests/test_unbiased.py` prints
the table.
"""

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch

import agrpo
from experiments import contrasts, exact


@pytest.mark.parametrize("name", exact.EXACT)
def test_the_expected_gradient_is_the_policy_gradient(name):
    for seed, sharpness in ((0, 1.0), (2, 4.0)):
        assert exact.EXACT[name](seed, sharpness)["bias"] < 1e-10


def test_it_is_for_a_reward_of_81_different_values():
    assert exact.measure(0, exact.ENTROPY, levels=None)["bias"] < 1e-10


@pytest.fixture(scope="module")
def biases():
    rows = exact.table(range(3), exact.BIASED)
    exact.print_table(rows)
    return rows


BEYOND_SCALE = {  # no learning rate makes up for these: at least so much
    "horizon last_non_eos": 0.05,
    "horizon last_non_eos, per-trajectory mean (the paper's)": 0.05,
    "per-trajectory mean, blocks with early stop": 0.05,
    "group mean / standard deviation, G = 4": 0.01,
    "KL per state (beta), against the trajectory's KL": 0.01,
    "entropy per state, against the trajectory's entropy": 0.01,
    "entropy without importance weights": 0.01,
    "k steps of highest entropy (EGSPO)": 0.1,
    "k steps of highest entropy, r_t (EGSPO-SA)": 0.1,
    "r_t, a mean per slot of the draw": 0.001,
    "r_t, a mean per slot, blocks with early stop": 0.01,
    "r_t, own steps in the mean": 0.03,
    "low confidence, kept tokens alone": 0.05,
    "one pass, all masked (diffu-GRPO)": 0.2,
    "ELBO of random masks (ESPO, BGPO)": 0.01,
}


@pytest.mark.parametrize("name", BEYOND_SCALE)
def test_what_is_called_biased_is_biased_beyond_scale(biases, name):
    assert biases[name]["beyond_scale"] > BEYOND_SCALE[name]


def test_the_group_mean_costs_scale_only(biases):
    row = biases["group mean, own sample included, G = 4"]
    assert row["beyond_scale"] < 1e-10
    assert row["scale"] == pytest.approx(3 / 4, abs=1e-10)


def test_kl_and_entropy_per_state_point_the_right_way(biases):
    for name in exact.BIASED:
        assert "per state" not in name or biases[name]["cosine"] > 0.95


def test_every_row_is_held_to_a_claim():
    assert set(exact.BIASED) - set(BEYOND_SCALE) == {"group mean, own sample included, G = 4"}


def test_a_mean_per_slot_does_no_harm_where_there_is_one_slot():
    options = exact.STEP | exact.BLOCKS | {"mc_samples": 1}
    assert exact.measure(0, options, advantage=exact.returns, estimator=exact.slot_by_slot)["bias"] < 1e-10


def test_the_stepwise_advantage_is_r_minus_c_r_t_minus_its_expectation():
    """The c that was asked for: rescaled by G / (G - 1) and averaged over the fellows, nothing else is left."""
    x = exact.problem(0, **exact.BLOCKS, step_baseline="constant", step_coefficient=0.5)
    executed = torch.arange(4) < x.run.steps_taken[:, None]
    r = x.step_rewards.where(executed, x.rewards[:, None])  # (B, m): after the last step the reward is known
    expected = x.p @ (x.rewards[:, None] - 0.5 * r)  # (m,)
    assert torch.allclose(exact.stepwise(x)[executed], (exact.returns(x) - expected)[executed], atol=1e-12)


def test_the_gate_moves_the_advantage():
    """Otherwise the gated rows would say nothing new."""
    x = exact.problem(0, **exact.BLOCKS, step_baseline="ramp", num_generations=3)
    assert (exact.stepwise(x, gate=True) - exact.stepwise(x)).abs().max() > 0.05


@pytest.mark.parametrize(
    "options",
    [
        {"block_length": 2, "temperature": 0.7},
        {"unmasking": "low_confidence", "sampling_steps": 2},
        {"unmasking": "low_confidence", "block_length": 2, "temperature": 0.7},
    ],
)
def test_the_oracle_is_the_slope_of_the_expected_reward(options):
    """The exact gradient, by autograd, against central differences of sum_tau p(tau) R(tau) with agrpo's p(tau).

    Under low confidence the oracle holds the kept tokens fixed, and the differences rank them anew."""
    model, config = exact.micro_model(0), exact.micro_config(**options)

    def expected_reward():
        run, p, _ = exact.enumerate_rollouts(model, config)
        return (p * exact.micro_reward(run.completion_ids, seed=0)).sum().item()

    run, _, order_p = exact.enumerate_rollouts(model, config)
    slope = exact.exact_gradient(model, run, order_p, config, exact.micro_reward(run.completion_ids, seed=0))
    parameters = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    direction = torch.randn(len(parameters), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = []
    for sign in (1, -1):
        torch.nn.utils.vector_to_parameters(parameters + sign * 1e-5 * direction, model.parameters())
        values.append(expected_reward())
    assert (values[0] - values[1]) / 2e-5 == pytest.approx((slope @ direction).item(), rel=1e-6)


def test_justgrpo_is_reinforce_on_the_chain_of_prefixes():
    """Left to right with k = m = n, against autoregressive log-probabilities written out: prefix, then [MASK]s."""
    model, config = exact.micro_model(0), exact.micro_config(unmasking="left_to_right", mc_samples=4)
    prompts = exact.PROMPT.repeat(6, 1)
    run = agrpo.rollout(model, prompts, torch.ones_like(prompts).bool(), config, torch.Generator().manual_seed(0))
    A = torch.randn(6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    agrpo.accumulate_gradient(model, run, A, config, torch.Generator(), micro_batch=24)  # nothing is drawn
    ours, log_p = exact.flat_gradient(model), 0
    for u in range(4):
        o = run.completion_ids
        ids = torch.cat([prompts, o[:, :u], torch.full((6, 4 - u), exact.MASK)], 1)
        log_p = log_p + model(ids)[:, 3 + u, : exact.MASK].log_softmax(-1).gather(1, o[:, u : u + 1]).squeeze(1)
    reinforce = exact.flat_gradient(model, -(A * log_p).mean() / 4)  # 1/m: a constant
    assert torch.allclose(ours, reinforce, atol=1e-14, rtol=1e-10)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"block_length": 2},
        {"top_k": 2, "temperature": 0.7},
        {"top_k": 3, "top_p": 0.8},
        {"sampling_steps": 3},
        {"unmasking": "low_confidence"},
        {"unmasking": "low_confidence", "block_length": 2, "sampling_steps": 4, "temperature": 0.7},
    ],
)
def test_rollouts_have_the_enumerated_probabilities(options):
    """The enumeration is about the very distribution that rollout() samples from: a chi-square test."""
    model, config = exact.micro_model(3), exact.micro_config(**{"sampling_steps": 2} | options)
    everything, p, order_p = exact.enumerate_rollouts(model, config)
    samples = 20_000
    prompts = exact.PROMPT.repeat(samples, 1)
    run = agrpo.rollout(model, prompts, torch.ones_like(prompts).bool(), config, torch.Generator().manual_seed(0))
    index = {str(key): i for i, key in enumerate(trajectory(everything))}
    seen = [index[str(key)] for key in trajectory(run)]
    count = torch.bincount(torch.tensor(seen), minlength=len(p))
    often = samples * p > 5  # where the chi-square approximation holds; the rest is one bin more
    count = torch.cat([count[often], count[~often].sum()[None]]).double()
    expected = samples * torch.cat([p[often], p[~often].sum()[None]])
    count, expected = count[expected > 0], expected[expected > 0]
    chi_square, freedom = ((count - expected) ** 2 / expected).sum().item(), len(count) - 1
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5
    matching = everything[torch.tensor(seen)]
    assert torch.allclose(run.logprobs, matching.logprobs, atol=1e-12)
    assert torch.allclose(run.entropies, matching.entropies, atol=1e-12)
    if run.drawn_ids is not None:
        assert torch.allclose(run.drawn_entropy, matching.drawn_entropy, atol=1e-12)
    oracle = exact.trajectory_logp(model, everything, config).exp() * order_p
    assert torch.allclose(oracle, p, atol=1e-14)


def trajectory(run):
    """All that was drawn, one list per row."""
    parts = [run.completion_ids, run.unmask_step]
    return torch.cat(parts if run.drawn_ids is None else [*parts, run.drawn_ids.flatten(1)], 1).tolist()


@pytest.mark.parametrize(
    "options", [{}, {"block_length": 2}, {"unmasking": "low_confidence", "block_length": 2}, {"top_k": 2}]
)
def test_greedy_ids_are_the_likeliest_completion_of_every_state(options):
    """Against an argmax over the words that are not [MASK], at what a full forward pass says of the state at t."""
    model, config = (
        exact.micro_model(0, sharpness=2),
        exact.micro_config(step_baseline="ramp", num_generations=3, **options),
    )
    prompts = exact.PROMPT.repeat(40, 1)
    run = agrpo.rollout(model, prompts, prompts > -1, config, torch.Generator().manual_seed(0), micro_batch=7)
    assert config.blocks == 1 or run.steps_taken.min() < run.steps_taken.max()  # some stop early
    for t in range(4):
        going, hidden = run.steps_taken > t, run.unmask_step >= t
        words = model(torch.cat([prompts, run.completion_ids.masked_fill(hidden, exact.MASK)], 1))[:, 3:, : exact.MASK]
        expected = words.argmax(-1).where(hidden, run.completion_ids)
        assert run.greedy_ids[going, t].equal(expected[going])
        assert (run.greedy_ids[~going, t] == exact.EOS).all()


def test_low_confidence_keeps_the_likeliest_of_what_it_drew():
    config = exact.micro_config(**exact.CONFIDENT | exact.BLOCKS | {"sampling_steps": 4})
    run, _, _ = exact.enumerate_rollouts(exact.micro_model(0), config)
    for t in range(4):
        chosen, tokens, logp = run.action_at(torch.full_like(run.steps_taken, t))
        kept = run.unmask_step == t
        assert (tokens == run.completion_ids)[kept].all()
        assert (kept <= chosen).all() and (kept.sum(1) == (run.steps_taken > t)).all()
        confident = logp.masked_fill(~chosen, -torch.inf)
        assert (confident.amax(1) == confident.where(kept, -torch.inf).amax(1)).all()


def test_one_call_is_one_draw_of_the_moments():
    """E[g] and E||g||^2 from scores, against one backward pass of accumulate_gradient per trajectory and draw."""
    config = exact.micro_config(**exact.THREE, unmasking="left_to_right", **exact.ENTROPY)
    x = exact.problem(0, 4.0, unmasking="left_to_right", **exact.THREE)
    A, first, second = x.rewards - x.p @ x.rewards, 0, 0
    for outcome, steps, weights in exact.timestep_draws(x.run, config):
        for i in range(len(x.p)):
            with exact.replaced("sample_timesteps", lambda *_, i=i: (steps[i : i + 1], weights[i : i + 1])):  # noqa: B023
                agrpo.accumulate_gradient(x.model, x.run[i : i + 1], A[i : i + 1], config, None, 8)
            g = -3 * exact.flat_gradient(x.model)
            first, second = first + x.p[i] * outcome[i] * g, second + x.p[i] * outcome[i] * (g @ g)
    mean, square = exact.moments(x.run, x.p, x.scores, A, config)
    assert torch.allclose(mean, first, rtol=1e-10, atol=1e-12)
    assert square.item() == pytest.approx(second.item(), rel=1e-10)


@pytest.mark.parametrize(
    "options, draws",
    [
        (exact.ENTROPY, exact.timestep_draws),
        (exact.ENTROPY, exact.unweighted_draws),
        (exact.TOP, exact.timestep_draws),
        ({"temperature": 0.7, "top_k": 2}, exact.timestep_draws),
        (exact.BLOCKS | {"low_discrepancy": False}, exact.timestep_draws),
        (exact.CONFIDENT | {"mc_samples": 1}, exact.timestep_draws),
    ],
)
def test_the_mean_from_scores_is_the_mean_of_accumulate_gradient(options, draws):
    x = exact.problem(0, **{k: v for k, v in options.items() if k in exact.POLICY})
    config, A = replace(x.config, **options), exact.leave_one_out(x)
    mean, _ = exact.moments(x.run, x.p, x.scores, A, config, draws)
    accumulated = exact.agrpo_estimator(x.model, x.run, x.p, A, config, draws=draws)
    assert (mean - accumulated).norm() < 1e-10 * x.gradient.norm()


def test_the_contrasts_draw_what_was_enumerated():
    """diffu_grpo and elbo as a training loop calls them. l and the order of three uniforms: 18 equally likely masks."""
    x = exact.problem(0, **exact.THREE)
    A = exact.leave_one_out(x)
    as_mean = A * x.p * len(x.p)  # accumulate's mean over rows becomes the expectation over trajectories
    u = torch.tensor(
        [[(size + 0.5) / 3, *order] for size in range(3) for order in itertools.permutations((0.1, 0.2, 0.3))]
    )
    with exact.replaced("uniforms", lambda shape, generator: u.repeat(len(A), 1)):
        for method, expected, k in ((contrasts.diffu_grpo, exact.diffu_grpo, 1), (contrasts.elbo, exact.elbo, 18)):
            stats = method(x.model, x.run, as_mean, replace(x.config, mc_samples=k), None, micro_batch=1000)
            ours = -3 * exact.flat_gradient(x.model)
            assert torch.allclose(ours, expected(x.model, x.run, x.p, A, x.config), rtol=1e-10, atol=1e-14)
            assert stats["evaluations"] == k * (A != 0).sum()


def test_masks_of_the_elbo_have_a_uniform_size_and_uniform_places():
    masked = contrasts.random_masks(torch.rand(60_000, 5, generator=torch.Generator().manual_seed(0)))
    sizes = torch.bincount(masked.sum(1), minlength=5).double() / len(masked)
    assert sizes.tolist() == pytest.approx([0, 0.25, 0.25, 0.25, 0.25], abs=0.01)
    assert masked.double().mean(0).tolist() == pytest.approx([0.625] * 4, abs=0.01)


def test_diffu_grpo_is_exact_where_there_is_one_step():
    assert exact.measure(0, {"sampling_steps": 1, "mc_samples": 1}, estimator=exact.diffu_grpo)["bias"] < 1e-10


def test_the_contrasts_refuse_what_they_do_not_have():
    x = exact.problem(0, **exact.THREE)
    for options in ({"temperature": 0.0}, {"beta": 0.1}, {"entropy_bonus": 0.1}):
        with pytest.raises(ValueError, match="temperature|contrasts"):
            contrasts.diffu_grpo(x.model, x.run, x.rewards, replace(x.config, **options), None, 8)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"low_discrepancy": False},
        {"importance_sampling": "entropy"},
        {"importance_sampling": "entropy", "low_discrepancy": False},
    ],
)
@pytest.mark.parametrize("k", [1, 2, 3, 4, 7])
def test_the_weights_undo_the_sampling(options, k):
    """E[sum_j w_j f(t_j)] = (1/m) sum_{t < T} f(t) for every f, every trajectory, also after an early stop."""
    config = exact.micro_config(block_length=2, mc_samples=k, **options)
    run, _, _ = exact.enumerate_rollouts(exact.micro_model(1, sharpness=4), config)
    expected = torch.zeros(len(run.steps_taken), 4, dtype=torch.float64)
    if k > 3 and not config.low_discrepancy:
        draws = [(torch.ones(len(expected)), *agrpo.sample_timesteps(run, config, torch.Generator()))]  # nothing random
    else:
        draws = exact.timestep_draws(run, config)
    for probability, steps, weights in draws:
        expected.scatter_add_(1, steps, probability[:, None] * weights)
    executed = torch.arange(4) < run.steps_taken[:, None]
    assert torch.allclose(expected, executed.double() / 4, atol=1e-12)


def test_the_chances_of_an_allocation_are_at_most_1_and_sum_to_the_budget():
    q = torch.tensor([[100.0, 3.0, 0.0], [1.0, 1e-9, 50.0]], dtype=torch.float64)
    for total in (0, 1, 3, 4, 5, 6):  # five steps are eligible
        p = agrpo.inclusion_probabilities(q, total)
        assert p.max() <= 1 and p.sum().item() == pytest.approx(min(total, 5))
        assert total == 0 or (p > 0).equal(q > 0)


def test_a_rare_step_can_be_drawn_and_the_largest_uniform_stays_inside():
    q = torch.tensor([[1.0, 1e-9, 1.0, 0.0]], dtype=torch.float64)
    u = torch.tensor([[0.5, 0.5 + 3e-10, 1.0]], dtype=torch.float64)
    assert agrpo.steps_from_uniforms(q, u).tolist() == [[1, 2, 2]]


def test_training_without_a_likelihood_is_refused():
    """Low confidence needs all that was drawn, and no truncation; temperature 0 has no gradient."""
    model, confident = exact.micro_model(0), {"unmasking": "low_confidence"}
    run, _, _ = exact.enumerate_rollouts(model, exact.micro_config())
    drawn, _, _ = exact.enumerate_rollouts(model, exact.micro_config(**exact.CONFIDENT))
    for rollout, options, word in (
        (run, confident, "drawn_ids"),
        (drawn, confident | {"top_k": 2}, "top_k"),
        (run, {"temperature": 0.0}, "gradient"),
        (drawn, confident | {"temperature": 0.0}, "gradient"),
    ):
        with pytest.raises(ValueError, match=word):
            advantages = torch.ones(len(rollout.steps_taken))
            agrpo.accumulate_gradient(model, rollout, advantages, exact.micro_config(**options), None, 8)


OTHERS = {
    "slot by slot": (exact.STEP, exact.returns, exact.slot_by_slot, exact.slot_moments),
    "kept tokens": (exact.CONFIDENT, exact.leave_one_out, exact.kept_tokens_alone, exact.kept_moments),
    "diffu-GRPO": ({}, exact.leave_one_out, exact.diffu_grpo, partial(exact.likelihood_moments, exact.one_mask)),
    "ELBO": ({}, exact.leave_one_out, exact.elbo, partial(exact.likelihood_moments, exact.random_masks)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_variance_of_other_estimators_is_around_their_expectation(name):
    """Scores of states and the estimator's own backward pass are two ways to one E[g]."""
    options, advantage, estimator, of = OTHERS[name]
    x = exact.problem(0, 1.0, 3, **{k: v for k, v in options.items() if k in exact.POLICY})
    config, A = replace(x.config, **options), advantage(x)
    mean, square = of(x, A, config)
    assert torch.allclose(mean, estimator(x.model, x.run, x.p, A, config), rtol=1e-9, atol=1e-12)
    assert square > mean @ mean


def test_a_completion_that_is_a_batch_of_its_own_gives_the_policy_gradient():
    x = exact.problem(0, 1.0, 3, completion_length=3, sampling_steps=3)
    config = replace(x.config, **exact.ENTROPY, allocation="batch", mc_samples=1)
    mean, _ = exact.allocated_moments(x, exact.leave_one_out(x), config)
    assert torch.allclose(mean, x.gradient, rtol=1e-9, atol=1e-12)


def test_the_elbos_variance_is_that_of_pairs_of_masks():
    """One completion, k = 2: every pair of masks is tried, each with a backward pass of its own."""
    x = exact.problem(0, 1.0, 3)
    row, A = 5, torch.ones_like(x.p)
    x = replace(x, p=torch.eye(len(x.p), dtype=x.p.dtype)[row])
    masks, chances, weights = exact.random_masks(4)
    each = torch.stack(
        [
            exact.likelihood_estimator(x.model, x.run, x.p, A, x.config, mask[None], weight[None])
            for mask, weight in zip(masks, weights)
        ]
    )
    pairs = ((each[:, None] + each) / 2).square().sum(2)  # (M, M)
    _, square = exact.likelihood_moments(exact.random_masks, x, A, replace(x.config, mc_samples=2))
    assert square.item() == pytest.approx((chances @ pairs @ chances).item(), rel=1e-9)
