"""Right after a rollout the ratio is exactly 1 and the KL to oneself exactly 0: one softmax serves both."""

import pytest
import torch
from conftest import gradient, make_config, make_rollout

from agrpo import accumulate_gradient, clipped_objective, group_advantages

POLICIES = [{}, {"temperature": 0.6}, {"top_k": 5}, {"temperature": 0.8, "top_k": 6, "top_p": 0.9}, {"block_length": 4}]


@pytest.mark.parametrize("options", POLICIES)
def test_the_ratio_is_exactly_1_and_the_kl_to_oneself_exactly_0(model, options):
    config = make_config(beta=0.1, mc_samples=4, **options)
    run = make_rollout(model, config)
    stats = accumulate_gradient(model, run, torch.randn(6), config, torch.Generator(), 6, reference=model)
    assert stats["ratio_error"] == 0.0
    assert stats["kl"] == 0.0
    assert stats["clip_fraction"] == 0.0


def test_the_ratio_is_not_1_after_the_model_changed(model):
    config = make_config(mc_samples=4)
    run = make_rollout(model, config)
    with torch.no_grad():
        model.model.transformer.ff_out.weight.mul_(1.5)
    stats = accumulate_gradient(model, run, torch.ones(6), config, torch.Generator(), 6)
    assert stats["ratio_error"] > 0.05
    assert stats["clip_fraction"] > 0


def test_the_clip_takes_the_gradient_where_the_ratio_has_moved_far_enough_and_nowhere_else():
    ratio = torch.tensor([0.5, 0.75, 1.0, 1.25, 1.5, 0.5, 0.75, 1.0, 1.25, 1.5], dtype=torch.float64)
    advantage = torch.tensor([1.0] * 5 + [-1.0] * 5, dtype=torch.float64)
    logp = ratio.log().requires_grad_()
    objective = clipped_objective(logp, torch.zeros(10, dtype=torch.float64), advantage, 0.2, 0.4)
    expected = [0.5, 0.75, 1.0, 1.25, 1.4, -0.8, -0.8, -1.0, -1.25, -1.5]
    assert objective.tolist() == pytest.approx(expected)
    objective.sum().backward()
    moves = [0.5, 0.75, 1.0, 1.25, 0, 0, 0, -1.0, -1.25, -1.5]  # d objective / d logp = ratio x advantage, or 0
    assert logp.grad.tolist() == pytest.approx(moves)


def test_advantages_are_centred_and_exactly_0_where_a_group_agrees():
    rewards = torch.tensor([0.1] * 3 + [1.0, 0.0, 0.5] + [1 / 3] * 3)
    advantages = group_advantages(rewards, 3)
    assert advantages.tolist() == pytest.approx([0, 0, 0, 0.5, -0.5, 0, 0, 0, 0])
    assert (advantages[[0, 1, 2, 6, 7, 8]] == 0).all()  # not 3e-8
    assert group_advantages(rewards, 3, scale_by_std=True)[3:6].tolist() == pytest.approx([1, -1, 0])
    with pytest.raises(ValueError, match="not finite"):
        group_advantages(torch.tensor([0.0, float("nan")]), 2)


def test_the_update_raises_what_was_rewarded_and_lowers_what_was_not(model):
    """A step along the gradient: the sign of the advantage, the direction of the loss, in one."""
    config = make_config(mc_samples=4)
    run = make_rollout(model, config)
    advantages = torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0, 0.0])
    accumulate_gradient(model, run, advantages, config, torch.Generator(), 6)
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.05 * p.grad
    model.zero_grad()
    for row, direction in ((0, 1), (1, -1)):
        alone = torch.zeros(6).index_fill(0, torch.tensor(row), 1.0)
        loss = accumulate_gradient(
            model, run, alone, make_config(mc_samples=4, epsilon_high=9.0), torch.Generator(), 6
        )["loss"]
        assert direction * (-loss * 6 * 4 / 8 - 1) > 0  # the mean ratio of the row's 8 tokens, over or under 1
    gradient(model)


def test_the_kl_gradient_pulls_back_to_the_reference(model):
    """Against autograd through the KL of plain softmaxes at the visited states."""
    from tiny_dllm import MaskedDiffusionLM

    reference = MaskedDiffusionLM(model.config).init_weights(torch.Generator().manual_seed(9))
    config = make_config(mc_samples=4, beta=0.3, temperature=0.8)
    run = make_rollout(model, config)
    accumulate_gradient(model, run, torch.zeros(6), config, torch.Generator(), 6, reference=reference)
    actual, expected = gradient(model), torch.zeros(())
    for t in range(4):
        at = torch.full((6,), t)
        mask = torch.cat([run.prompt_mask, torch.ones(6, 8, dtype=torch.bool)], 1)
        p, r = (m(run.state_at(at), mask)[:, -8:][run.unmasked_at(at)] / 0.8 for m in (model, reference))
        p, r = (torch.cat([x[:, :1], x[:, 2:]], 1).log_softmax(1) for x in (p, r))  # without [MASK], id 1
        expected = expected + 0.3 * (p.exp() * (p - r.detach())).sum() / 6 / 4
    expected.backward()
    assert torch.allclose(actual, gradient(model), atol=1e-6)


def test_a_diverged_model_is_named_before_it_writes_nonsense(model):
    model.model.transformer.ff_out.weight.data[3] = float("nan")
    with pytest.raises(ValueError, match="diverged"):
        make_rollout(model, make_config())
