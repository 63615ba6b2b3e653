"""Left padding, the order of the batch and the size of the micro-batch change nothing beyond rounding."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import EOS, gradient, make_config, make_rollout

import agrpo
from agrpo import accumulate_gradient

ADVANTAGES = torch.tensor([1.0, -0.5, 0.0, 2.0, -1.0, 0.25])


@pytest.fixture(params=[{}, {"top_k": 5, "temperature": 0.7}, {"sampling_steps": 3, "importance_sampling": "entropy"}])
def setting(request, model, monkeypatch):
    """A rollout, its gradient, and the draws, which stay the same from then on."""
    config = make_config(**request.param)
    run = make_rollout(model, config)
    draw = agrpo.sample_timesteps(run, config, torch.Generator().manual_seed(0))
    monkeypatch.setattr(agrpo, "sample_timesteps", lambda *_: draw)
    accumulate_gradient(model, run, ADVANTAGES, config, None, micro_batch=100)
    return model, config, run, draw, gradient(model)


@pytest.mark.parametrize("micro_batch", [1, 2, 5])
def test_micro_batch(setting, micro_batch):
    model, config, run, _, expected = setting
    again = make_rollout(model, config, micro_batch=micro_batch)
    assert torch.equal(again.completion_ids, run.completion_ids) and torch.equal(again.unmask_step, run.unmask_step)
    assert torch.allclose(again.logprobs, run.logprobs, atol=1e-6)
    accumulate_gradient(model, run, ADVANTAGES, config, None, micro_batch)
    assert torch.allclose(gradient(model), expected, atol=1e-6)


def test_more_left_padding(setting):
    model, config, run, _, expected = setting
    padded = dataclasses.replace(
        run, prompt_ids=F.pad(run.prompt_ids, (3, 0), value=EOS), prompt_mask=F.pad(run.prompt_mask, (3, 0))
    )
    accumulate_gradient(model, padded, ADVANTAGES, config, None, 100)
    assert torch.allclose(gradient(model), expected, atol=1e-6)


def test_batch_order(setting, monkeypatch):
    model, config, run, (steps, weights), expected = setting
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    monkeypatch.setattr(agrpo, "sample_timesteps", lambda *_: (steps[order], weights[order]))
    accumulate_gradient(model, run[order], ADVANTAGES[order], config, None, 100)
    assert torch.allclose(gradient(model), expected, atol=1e-6)


def test_a_rollout_built_by_hand_needs_no_token_ids(setting):
    model, config, run, _, expected = setting
    bare = dataclasses.replace(run, mask_token_id=None, eos_token_id=None)
    accumulate_gradient(model, bare, ADVANTAGES, config, None, 100)
    assert torch.equal(gradient(model), expected)
