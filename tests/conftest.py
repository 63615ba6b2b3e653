"""Shared by the tests: small models and rollouts. One thread: the tensors are tiny, and other tests run beside."""

import pytest
import torch

from agrpo import AGRPOConfig, rollout
from tiny_dllm import Config, MaskedDiffusionLM

torch.set_num_threads(1)
EOS, MASK, VOCAB = 0, 1, 12


@pytest.fixture
def model():
    config = Config(VOCAB, MASK, EOS, d_model=16, n_layers=2, n_heads=2, mlp_hidden_size=32)
    return MaskedDiffusionLM(config).init_weights(torch.Generator().manual_seed(0))


def make_config(**options):
    return AGRPOConfig(**{"completion_length": 8, "sampling_steps": 4, "mc_samples": 2} | options)


def make_prompts(batch=6, length=5):
    """Prompts of different lengths, padded on the left: ids (B, P), mask (B, P)."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCAB, (batch, length), generator=generator)
    mask = torch.arange(length) >= (torch.arange(batch) % 3)[:, None]
    return ids.where(mask, EOS), mask


def make_rollout(model, config, batch=6, seed=2, micro_batch=None):
    return rollout(model, *make_prompts(batch), config, torch.Generator().manual_seed(seed), micro_batch)


def gradient(model):
    """What has been accumulated in .grad, as one vector; clears it."""
    flat = torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in model.parameters()])
    model.zero_grad()
    return flat
