"""Right after a rollout the ratio is 1 and the KL to oneself 0, up to rounding: one softmax serves both. Later the
ratio moves, and the clip acts."""

import pytest
import torch
from conftest import EOS, MASK, accumulate, gradient, make_config, make_infillings, make_questions, make_rollout

import agrpo
import variants
from tiny_dllm import MaskedDiffusionLM

FULL = torch.full((6, 4), 1 / 4, dtype=torch.float64)  # every step, weight 1/m
POLICIES = [{}, {"temperature": 0.6}, {"top_k": 5}, {"temperature": 0.8, "top_k": 6, "top_p": 0.9}, {"block_length": 4}]
KINDS = ["random", "low_confidence", "low_confidence_kept"]


@pytest.mark.parametrize("unmasking", KINDS)
@pytest.mark.parametrize("questions", [make_questions, make_infillings])
@pytest.mark.parametrize("options", POLICIES)
def test_the_ratio_is_1_and_the_kl_to_oneself_0(model, options, questions, unmasking):
    config = make_config(mc_samples=4, **options)
    run = variants.ROLLOUTS[unmasking](model, *questions(), config, torch.Generator().manual_seed(2))
    penalty = variants.kl_penalty(model, 0.1, config, MASK)
    stats = accumulate(model, run, torch.randn(6), config, FULL, micro_batch=5, penalty=penalty)
    assert stats["ratio_error"] < 1e-5
    assert abs(stats["penalty"]) < 1e-7
    assert stats["clip_fraction"] == 0.0 and stats["evaluations"] == 24


def move(model):
    with torch.no_grad():
        model.model.transformer.ff_out.weight.mul_(1.5)


def test_the_ratio_is_not_1_after_the_model_changed(model):
    config = make_config()
    run = make_rollout(model, config)
    move(model)
    stats = accumulate(model, run, torch.ones(6), config, FULL)
    assert stats["ratio_error"] > 0.05
    assert stats["clip_fraction"] > 0


def test_in_a_second_update_the_clip_takes_away_the_gradient_of_what_has_moved_far_enough(model):
    """Against rho A grad log pi, summed over the tokens that the clip leaves, with a softmax of its own."""
    config = make_config(epsilon_low=0.1, epsilon_high=0.3)
    run, A = make_rollout(model, config), torch.tensor([1.0, -1.0, 2.0, -0.5, 1.0, -1.0])
    move(model)
    stats = accumulate(model, run, A, config, FULL)
    actual, objective, clipped = gradient(model), 0.0, 0
    for t in range(4):
        written = run.unmask_step == t
        logits = model(run.ids.masked_fill(run.unmask_step >= t, MASK), run.attention_mask)
        logp = logits.index_fill(2, torch.tensor(MASK), -torch.inf).log_softmax(2)
        rho = (logp.gather(2, run.ids[..., None]).squeeze(2) - run.logprobs).exp()
        gone = torch.where(A[:, None] > 0, rho > 1.3, rho < 0.9) & written
        clipped += gone.sum().item()
        objective = objective + (rho * A[:, None])[written & ~gone].sum() / 6 / 4
    (-objective).backward()
    assert torch.allclose(actual, gradient(model), atol=1e-6)
    assert stats["clip_fraction"] == pytest.approx(clipped / 48) and 0 < clipped < 48


def test_the_clip_takes_the_gradient_where_the_ratio_has_moved_far_enough_and_nowhere_else():
    ratio = torch.tensor([0.5, 0.75, 1.0, 1.25, 1.5, 0.5, 0.75, 1.0, 1.25, 1.5], dtype=torch.float64)
    advantage = torch.tensor([1.0] * 5 + [-1.0] * 5, dtype=torch.float64)
    logp = ratio.log().requires_grad_()
    objective = agrpo.clipped_objective(logp, torch.zeros(10, dtype=torch.float64), advantage, 0.2, 0.4)
    expected = [0.5, 0.75, 1.0, 1.25, 1.4, -0.8, -0.8, -1.0, -1.25, -1.5]
    assert objective.tolist() == pytest.approx(expected)
    objective.sum().backward()
    moves = [0.5, 0.75, 1.0, 1.25, 0, 0, 0, -1.0, -1.25, -1.5]  # d objective / d logp = ratio x advantage, or 0
    assert logp.grad.tolist() == pytest.approx(moves)


def test_advantages_are_centred_and_exactly_0_where_a_group_agrees():
    advantages = agrpo.group_advantages(torch.tensor([0.1] * 3 + [1.0, 0.0, 0.5]), 3)
    assert advantages.tolist() == pytest.approx([0, 0, 0, 0.5, -0.5, 0])
    for G in range(2, 12):
        for reward in (0.1, 1 / 3, 0.7, 1.1):
            assert (agrpo.group_advantages(torch.full((2 * G,), reward), G) == 0).all()  # not 3e-8
    with pytest.raises(ValueError, match="not finite"):
        agrpo.group_advantages(torch.tensor([0.0, float("nan")]), 2)


def test_the_update_raises_what_was_rewarded_and_lowers_what_was_not(model):
    """A step along the gradient: the sign of the advantage, the direction of the loss, in one."""
    config = make_config(epsilon_high=9.0)
    run = make_rollout(model, config)
    accumulate(model, run, torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0, 0.0]), config, FULL)
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.05 * p.grad
    model.zero_grad()
    for row, direction in ((0, 1), (1, -1)):
        alone = torch.zeros(6).index_fill(0, torch.tensor(row), 1.0)
        loss = accumulate(model, run, alone, config, FULL)["loss"]
        assert direction * (-loss * 6 * 4 / 8 - 1) > 0  # the mean ratio of the row's 8 tokens, over or under 1
    gradient(model)


@pytest.mark.parametrize("bonus", [False, True])
def test_the_kl_gradient_pulls_back_to_the_reference_and_the_bonus_to_entropy(model, bonus):
    """Against autograd through the KL, or the entropy, of plain softmaxes at the visited states."""
    reference = MaskedDiffusionLM(model.config).init_weights(torch.Generator().manual_seed(9))
    config = make_config(temperature=0.8)
    penalty = (
        variants.entropy_penalty(0.3, config, MASK) if bonus else variants.kl_penalty(reference, 0.3, config, MASK)
    )
    run = make_rollout(model, config)
    accumulate(model, run, torch.zeros(6), config, FULL, penalty=penalty)
    actual, expected = gradient(model), torch.zeros(())
    for t in range(4):
        states = run.ids.masked_fill(run.unmask_step >= t, MASK)
        p, r = (m(states, run.attention_mask)[run.unmask_step == t] / 0.8 for m in (model, reference))
        p, r = (torch.cat([x[:, :1], x[:, 2:]], 1).log_softmax(1) for x in (p, r))  # without [MASK], id 1
        expected = expected + 0.3 * (p.exp() * (p if bonus else p - r.detach())).sum() / 6 / 4
    expected.backward()
    assert torch.allclose(actual, gradient(model), atol=1e-6)


def test_a_diverged_model_is_named_before_it_writes_nonsense(model):
    model.model.transformer.ff_out.weight.data[3] = float("nan")
    with pytest.raises(ValueError, match="diverged"):
        make_rollout(model, make_config())


def test_temperature_0_has_no_gradient(model):
    config = make_config(temperature=0.0)
    run = make_rollout(model, config)
    assert (run.ids[:, 5:] != EOS).any()
    with pytest.raises(ValueError, match="gradient"):
        accumulate(model, run, torch.ones(6), config, FULL)
