"""Padding, the order of the batch and the size of the micro-batch change nothing beyond rounding."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import ADVANTAGES, EOS, accumulate, gradient, make_config, make_infillings, make_questions, make_rollout

import agrpo
import variants


@pytest.fixture(params=[{}, {"top_k": 5, "temperature": 0.7}, {"sampling_steps": 3, "importance_sampling": "entropy"}])
def config(request):
    return make_config(**request.param)


@pytest.fixture(params=[make_questions, make_infillings])
def setting(request, config, model):
    """A model, a rollout, its weights and its gradient."""
    run = make_rollout(model, config, questions=request.param)
    weights = agrpo.sample_timesteps(run, config, torch.Generator().manual_seed(0))
    accumulate(model, run, ADVANTAGES, config, weights, micro_batch=100)
    return model, run, weights, gradient(model), request.param


@pytest.mark.parametrize("micro_batch", [1, 2, 5])
def test_micro_batch(setting, config, micro_batch):
    model, run, weights, expected, questions = setting
    again = make_rollout(model, config, questions=questions, micro_batch=micro_batch)
    assert torch.equal(again.ids, run.ids) and torch.equal(again.unmask_step, run.unmask_step)
    assert torch.allclose(again.logprobs, run.logprobs, atol=1e-6)
    assert torch.allclose(again.entropies, run.entropies, atol=1e-6)
    accumulate(model, run, ADVANTAGES, config, weights, micro_batch)
    assert torch.allclose(gradient(model), expected, atol=1e-6)


@pytest.mark.parametrize("unmasking", variants.ROLLOUTS)
def test_micro_batch_of_every_unmasking(model, unmasking):
    config, runs = make_config(block_length=4), []
    for micro_batch in (None, 1):
        questions = make_infillings()
        rollout = variants.ROLLOUTS[unmasking]
        runs.append(vars(rollout(model, *questions, config, torch.Generator().manual_seed(0), micro_batch)))
    for name, value in runs[0].items():
        assert torch.allclose(value.double(), runs[1][name].double(), atol=1e-6) if torch.is_tensor(value) else True


@pytest.mark.parametrize("sides", [(3, 0), (0, 3), (2, 1)])
def test_more_padding(setting, config, sides):
    """On the left or the right of everything: the positions are relative."""
    model, run, weights, expected, _ = setting
    fill = {"ids": EOS, "attention_mask": False, "unmask_step": -1, "logprobs": 0, "entropies": 0}
    padded = replace(run, **{name: F.pad(getattr(run, name), sides, value=value) for name, value in fill.items()})
    accumulate(model, padded, ADVANTAGES, config, weights, 100)
    assert torch.allclose(gradient(model), expected, atol=1e-6)


def test_a_rollout_of_padded_questions_is_the_same(setting, config):
    model, run, _, _, questions = setting
    ids, mask = questions()
    more = agrpo.rollout(
        model, F.pad(ids, (1, 2), value=EOS), F.pad(mask, (1, 2)), config, torch.Generator().manual_seed(2)
    )
    assert torch.equal(more.ids[:, 1:-2], run.ids) and torch.equal(more.unmask_step[:, 1:-2], run.unmask_step)
    assert torch.allclose(more.logprobs[:, 1:-2], run.logprobs, atol=1e-6)


def test_batch_order(setting, config):
    model, run, weights, expected, _ = setting
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    accumulate(model, run[order], ADVANTAGES[order], config, weights[order], 100)
    assert torch.allclose(gradient(model), expected, atol=1e-6)
