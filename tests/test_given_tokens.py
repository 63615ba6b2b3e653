"""Infilling: given tokens may stand before, between and after what is written. By enumeration, to 1e-10, a rollout
among them is the policy, and the update its gradient."""

from functools import partial

import pytest
import torch
from conftest import ADVANTAGES, EOS, MASK, gradient, make_config, make_infillings
from test_replay import Recorder, Scripted

import agrpo
import variants
from experiments import contrasts, exact, oracle
from experiments.oracle import MASK as M
from experiments.oracle import A, B

BLOCKS = {"block_length": 2, "sampling_steps": 4}
CONFIDENT = {"unmasking": "low_confidence", "sampling_steps": 3}
QUESTIONS = {  # (ids, attention mask)
    "on both sides and between": ((B, M, M, A, M, A), None),
    "between": ((M, A, M, B, M), None),
    "after": ((M, M, M, A, B), None),
    "padding after": ((M, A, M, M, B, A), (1, 1, 1, 1, 0, 0)),
}


@pytest.mark.parametrize("policy", [{"sampling_steps": 3}, {"sampling_steps": 2}, BLOCKS, CONFIDENT])
@pytest.mark.parametrize("name", QUESTIONS)
def test_the_expected_gradient_is_the_policy_gradient(name, policy):
    """agrpo.rollout writes what is enumerated, and its probabilities sum to 1 under a softmax of the oracle's own."""
    ids, attended = QUESTIONS[name]
    x = oracle.problem(0, 2.0, ids=ids, attended=attended, **policy)
    given = torch.tensor(ids) != M
    assert (x.run.ids[:, given] == torch.tensor(ids)[given]).all() and (x.run.unmask_step[:, given] == -1).all()
    assert (x.run.steps_taken.min() < x.run.sampling_steps) == (policy == BLOCKS and name == "padding after")
    assert exact.measure(x, exact.ENTROPY)["bias"] < 1e-10
    assert exact.measure(x, exact.THREES, exact.stepwise)["bias"] < 1e-10


def test_right_padding_changes_neither_probabilities_nor_gradient():
    ids, attended = QUESTIONS["padding after"]
    padded = oracle.problem(0, 2.0, ids=ids, attended=attended, **BLOCKS)
    bare = oracle.problem(0, 2.0, ids=ids[:4], **BLOCKS)
    assert torch.equal(padded.run.ids[:, :4], bare.run.ids) and torch.equal(
        padded.run.steps_taken, bare.run.steps_taken
    )
    assert torch.allclose(padded.p, bare.p, atol=1e-14)
    assert torch.allclose(padded.gradient, bare.gradient, atol=1e-12)


STOPS = {  # 2 makes the model write <eos>; blocks of two [MASK]
    "nothing after": ([2, MASK, MASK, MASK, MASK], True),
    "within the block": ([2, MASK, 5, MASK, MASK, MASK], True),
    "between the blocks": ([2, MASK, MASK, 5, MASK, MASK], False),
    "after the last block": ([2, MASK, MASK, MASK, MASK, 5], False),
    "padding after": ([2, MASK, MASK, MASK, MASK, -1], True),
    "padding between the blocks": ([2, MASK, MASK, -1, MASK, MASK], True),
}


@pytest.mark.parametrize("name", STOPS)
@pytest.mark.parametrize("unmasking", variants.ROLLOUTS)
def test_no_early_stop_where_attended_given_tokens_follow(name, unmasking):
    """They belong to the text, which does not end there."""
    ids, stops = torch.tensor([STOPS[name][0]]), STOPS[name][1]
    recorder = Recorder(Scripted())
    config = make_config(block_length=2)
    run = variants.ROLLOUTS[unmasking](recorder, ids.clamp(min=0), ids >= 0, config, torch.Generator().manual_seed(0))
    assert run.steps_taken.tolist() == [2 if stops else 4] and len(recorder.calls) == run.steps_taken
    assert (run.ids[ids == MASK] == EOS).all() and torch.equal(run.ids[ids != MASK], ids.clamp(min=0)[ids != MASK])
    assert (run.unmask_step == 4).sum() == 2 * stops and torch.equal(run.unmask_step < 0, ids != MASK)


def test_each_row_decides_for_itself():
    ids = torch.tensor([[2, 4, MASK, MASK, MASK, MASK], [2, MASK, MASK, MASK, MASK, 5], [3, MASK, MASK, MASK, MASK, 5]])
    run = agrpo.rollout(Scripted(), ids, ids > 0, make_config(block_length=2), torch.Generator().manual_seed(0))
    assert run.steps_taken.tolist() == [2, 4, 4]


def test_greedy_completions_keep_what_is_given(model):
    greedy, config, (ids, mask) = variants.GreedyCompletions(model), make_config(), make_infillings()
    agrpo.rollout(greedy, ids, mask, config, torch.Generator().manual_seed(0))
    filled = torch.stack([greedy.completions[key] for key in greedy.keys(ids, mask)])
    given = (ids != MASK) & mask
    assert torch.equal(filled[given], ids[given]) and (filled != MASK).all()


@pytest.mark.parametrize("contrast", [contrasts.diffu_grpo, partial(contrasts.elbo, generator=torch.Generator())])
def test_the_contrasts_mask_what_was_written_and_nothing_else(model, contrast):
    config, recorder, (ids, mask) = make_config(), Recorder(model), make_infillings()
    run = agrpo.rollout(model, ids, mask, config, torch.Generator().manual_seed(0))
    weights = torch.full((6, 4), 1 / 4)
    stats = contrast(recorder, run, advantages=ADVANTAGES, weights=weights, config=config, micro_batch=50)
    (seen, attended, positions), rows = recorder.calls[0], ADVANTAGES != 0
    assert stats["evaluations"] == len(seen) <= 2 * rows.sum() and gradient(model).norm() > 0
    assert torch.equal(seen == MASK, positions)
    for state, attention, hidden in zip(seen, attended, positions):  # each is some completion with a part hidden
        fits = (
            ((run.ids == state) | hidden | ~mask).all(1) & (mask == attention).all(1) & (hidden <= (ids == MASK)).all(1)
        )
        assert (fits & rows).any()
