"""The expectation of the gradient that training follows is the policy gradient, to 1e-10: by enumeration, in float64.

What is biased is offered under its name, and its bias is measured here. `pytest -s tests/test_unbiased.py` prints
the table.
"""

import pytest
import torch

import agrpo
from experiments import exact


@pytest.mark.parametrize("name", exact.EXACT)
def test_the_expected_gradient_is_the_policy_gradient(name):
    for seed in range(2):
        assert exact.measure(seed, exact.EXACT[name])["bias"] < 1e-10


@pytest.fixture(scope="module")
def biases():
    rows = exact.table(range(3), exact.biased_rows())
    exact.print_table(rows)
    return rows


def test_the_papers_horizon_and_mean_are_biased_by_more_than_5_percent_beyond_scale(biases):
    for name in exact.BIASED:
        assert biases[name]["beyond_scale"] > 0.05, name


def test_the_group_mean_costs_scale_only(biases):
    row = biases["group mean, own sample included, G = 4"]
    assert row["beyond_scale"] < 1e-10
    assert row["scale"] == pytest.approx(3 / 4, abs=1e-10)


def test_division_by_the_standard_deviation_and_the_per_state_kl_are_biased(biases):
    assert biases["group mean / standard deviation, G = 4"]["beyond_scale"] > 0.01
    assert biases["KL per state (beta), against the trajectory's KL"]["beyond_scale"] > 0.01


def test_the_oracle_is_the_slope_of_the_expected_reward():
    """The exact gradient, by autograd, against central differences of sum_tau p(tau) R(tau) with agrpo's p(tau)."""
    model, config = exact.micro_model(0), exact.micro_config(block_length=2, temperature=0.7)

    def expected_reward():
        run, p, _ = exact.enumerate_rollouts(model, config)
        return (p * exact.micro_reward(run.completion_ids, seed=0)).sum().item()

    slope = exact.exact_gradient(model, config, lambda ids: exact.micro_reward(ids, seed=0))
    parameters = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    direction = torch.randn(len(parameters), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = []
    for sign in (1, -1):
        torch.nn.utils.vector_to_parameters(parameters + sign * 1e-5 * direction, model.parameters())
        values.append(expected_reward())
    assert (values[0] - values[1]) / 2e-5 == pytest.approx((slope @ direction).item(), rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [{}, {"block_length": 2}, {"top_k": 2, "temperature": 0.7}, {"top_k": 3, "top_p": 0.8}, {"sampling_steps": 3}],
)
def test_rollouts_have_the_enumerated_probabilities(options):
    """The enumeration is about the very distribution that rollout() samples from: a chi-square test."""
    model, config = exact.micro_model(3), exact.micro_config(**{"sampling_steps": 2} | options)
    everything, p, _ = exact.enumerate_rollouts(model, config)
    samples = 20_000
    prompts = exact.PROMPT.repeat(samples, 1)
    run = agrpo.rollout(model, prompts, torch.ones_like(prompts).bool(), config, torch.Generator().manual_seed(0))
    index = {
        key: i
        for i, key in enumerate(map(str, torch.cat([everything.completion_ids, everything.unmask_step], 1).tolist()))
    }
    seen = [index[str(key)] for key in torch.cat([run.completion_ids, run.unmask_step], 1).tolist()]
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


def test_a_rare_step_can_be_drawn_and_the_largest_uniform_stays_inside():
    q = torch.tensor([[1.0, 1e-9, 1.0, 0.0]], dtype=torch.float64)
    u = torch.tensor([[0.5, 0.5 + 3e-10, 1.0]], dtype=torch.float64)
    assert agrpo.steps_from_uniforms(q, u).tolist() == [[1, 2, 2]]


def test_training_on_low_confidence_unmasking_or_temperature_0_is_refused():
    model = exact.micro_model(0)
    run, _, _ = exact.enumerate_rollouts(model, exact.micro_config())
    for options, word in (({"unmasking": "low_confidence"}, "evaluation"), ({"temperature": 0.0}, "gradient")):
        with pytest.raises(ValueError, match=word):
            agrpo.accumulate_gradient(
                model, run, torch.ones(len(run.steps_taken)), exact.micro_config(**options), None, 8
            )
