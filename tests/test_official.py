"""With the paper's horizon and per-trajectory mean, the gradient is that of the official AGRPO code's formula, written
out here token by token over the whole vocabulary: no shared function, no support ids, no merged draws."""

import copy

import pytest
import torch
from conftest import EOS, MASK, gradient, make_config, make_prompts

import agrpo
from tiny_dllm import add_lora

ADVANTAGES = torch.tensor([1.0, -0.5, 0.0, 2.0, -1.0, 0.25])


def kept(logits, temperature, top_k, top_p):
    """Which words (V,) bool are left by temperature, then top-k, then top-p, the one that crosses p included."""
    logits = (logits / temperature).masked_fill(torch.arange(len(logits)) == MASK, -torch.inf)
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    keep = logits > -torch.inf
    if top_p < 1:
        order = logits.argsort(descending=True)
        before = logits.softmax(0)[order].cumsum(0) - logits.softmax(0)[order]
        keep &= ~torch.zeros_like(keep).scatter(0, order, before >= top_p)
    return keep


def official_loss(model, sampler, run, advantages, steps, config):
    """- sum over rows, draws, tokens of w min(rho A, clip(rho) A) / (k B); the kept words are the sampler's."""
    total = 0.0
    for i in range(len(steps)):
        real = run.completion_ids[i] != EOS
        horizon = int(run.unmask_step[i][real].max()) + 1 if real.any() else 1
        per_step = [float(run.entropies[i][run.unmask_step[i] == t].sum()) for t in range(horizon)]
        q = torch.tensor(per_step).clamp(min=1e-8).double()
        q = q / q.sum() if config.importance_sampling == "entropy" else torch.full((horizon,), 1 / horizon)
        for t in steps[i].tolist():
            weight = (1 / horizon) / q[t].item()
            seen = torch.where(run.unmask_step[i] >= t, MASK, run.completion_ids[i])
            prompt = run.prompt_ids[i][run.prompt_mask[i]]  # without its padding
            ids = torch.cat([prompt, seen])[None]
            logits, sampled_from = model(ids)[0, len(prompt) :], sampler(ids)[0, len(prompt) :].detach()
            for u in (run.unmask_step[i] == t).nonzero().flatten():
                keep = kept(sampled_from[u], config.temperature, config.top_k, config.top_p)
                logp = (logits[u] / config.temperature).masked_fill(~keep, -torch.inf).log_softmax(0)
                rho = (logp[run.completion_ids[i, u]] - run.logprobs[i, u].float()).exp()
                clipped = rho.clamp(1 - config.epsilon_low, 1 + config.epsilon_high)
                total = total - weight * torch.minimum(rho * advantages[i], clipped * advantages[i])
    return total / (config.mc_samples * len(steps))


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"importance_sampling": "entropy"},
        {"importance_sampling": "entropy", "temperature": 0.6, "top_k": 6, "top_p": 0.9, "block_length": 4},
    ],
)
def test_the_gradient_is_that_of_the_official_formula(model, options, moved, lora, monkeypatch):
    paper = {"horizon": "last_non_eos", "normalization": "trajectory", "sampling_steps": 8}
    config = make_config(**paper | options)
    if lora:
        pytest.importorskip("peft")
        model = add_lora(model, 4, 8, torch.Generator().manual_seed(1))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter += 0.1 * ("lora_B" in name)
    run = agrpo.rollout(model, *make_prompts(), config, torch.Generator().manual_seed(2))
    sampler = copy.deepcopy(model)
    if moved:  # a later update on the same rollout: ratios differ from 1, and the clip acts
        with torch.no_grad():
            for i, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
                parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    drawn = agrpo.sample_timesteps(run, config, torch.Generator().manual_seed(3))
    monkeypatch.setattr(agrpo, "sample_timesteps", lambda *_: drawn)
    assert (agrpo.horizon_of(run, config) > config.mc_samples).all()  # where k >= T ours draws nothing
    stats = agrpo.accumulate_gradient(model, run, ADVANTAGES, config, None, micro_batch=4)
    ours = gradient(model)
    official_loss(model, sampler, run, ADVANTAGES, drawn[0], config).backward()
    expected = gradient(model)
    assert (ours - expected).norm() <= 1e-4 * expected.norm() and expected.norm() > 0
    assert (stats["clip_fraction"] > 0) == moved
