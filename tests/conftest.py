"""Shared by the tests: small models, questions and rollouts. One thread: the tensors are tiny, others run beside."""

import json

import pytest
import torch

import agrpo
import train
from tiny_dllm import Config, MaskedDiffusionLM

torch.set_num_threads(1)
EOS, MASK, VOCAB = 0, 1, 12
ADVANTAGES = torch.tensor([1.0, -0.5, 0.0, 2.0, -1.0, 0.25])


@pytest.fixture
def model():
    config = Config(VOCAB, MASK, EOS, d_model=16, n_layers=2, n_heads=2, mlp_hidden_size=32)
    return MaskedDiffusionLM(config).init_weights(torch.Generator().manual_seed(0))


def make_config(**options):
    return agrpo.AGRPOConfig(**{"sampling_steps": 4, "mc_samples": 2} | options)


def make_questions(batch=6, length=5, n=8):
    """Given tokens after 0 to 2 of padding, then n [MASK]: ids, attention_mask (B, length + n)."""
    ids = torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(length + n) >= (torch.arange(batch) % 3)[:, None]
    return torch.cat([ids, torch.full((batch, n), MASK)], 1).where(mask, EOS), mask


def make_infillings(batch=6):
    """Eight [MASK] anywhere among the eleven tokens before one that is given or, in every second row, padding."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCAB, (batch, 12), generator=generator)
    ids[:, :11].scatter_(1, torch.rand(batch, 11, generator=generator).argsort(1)[:, :8], MASK)
    mask = torch.ones_like(ids).bool()
    mask[::2, 11] = False
    return ids, mask


class Recorder:
    """A model that remembers its inputs."""

    def __init__(self, model):
        self.model, self.calls = model, []
        self.mask_token_id, self.eos_token_id = model.mask_token_id, model.eos_token_id

    def __call__(self, ids, attention_mask, positions):
        self.calls.append((ids.clone(), attention_mask, positions))
        return self.model(ids, attention_mask, positions)


def distinct(ids, attention_mask):
    """The distinct states (S, L) of rows (B, L), padding -1, and which of them every row is in (B,)."""
    return ids.masked_fill(~attention_mask, -1).unique(dim=0, return_inverse=True)


def make_rollout(model, config, seed=2, questions=make_questions, **options):
    return agrpo.rollout(model, *questions(), config, torch.Generator().manual_seed(seed), **options)


def accumulate(model, run, advantages, config, weights=None, micro_batch=8, penalty=None):
    """accumulate_gradient, with weights drawn from one seed unless they are given; and its statistics."""
    if weights is None:
        weights = agrpo.sample_timesteps(run, config, torch.Generator().manual_seed(0))
    tables = {"advantages": advantages, "weights": weights}
    return agrpo.accumulate_gradient(model, run, **tables, config=config, micro_batch=micro_batch, penalty=penalty)


def gradient(model):
    """What has been accumulated in .grad, as one vector; clears it."""
    flat = torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in model.parameters()])
    model.zero_grad()
    return flat


def run(*arguments):
    """The program's exit code, in this process."""
    return train.main([*map(str, arguments)])


def last_line(capsys):
    """Of what was said on stderr, which holds no traceback."""
    stderr = capsys.readouterr().err
    assert "Traceback" not in stderr
    return stderr.splitlines()[-1]


def json_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
