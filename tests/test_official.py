"""The gradient is that of the official AGRPO code's formula, written out here token by token over the whole vocabulary:
no shared function, no merged draws. `paper` has its horizon and its mean; agrpo counts every step and has 1 / m."""

import copy

import pytest
import torch
from conftest import ADVANTAGES, EOS, MASK, accumulate, gradient, make_config, make_rollout

import agrpo
import variants
from support.weights import add_lora


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


def official_loss(model, sampler, run, advantages, u, config, paper):
    """- sum over rows, draws, tokens of w min(rho A, clip(rho) A) / (k B); u (B, k) draw the steps.

    The words to choose from are those that the policy keeps now, and the one that was drawn."""
    total = 0.0
    for i in range(len(u)):
        written = run.unmask_step[i] >= 0
        real = written & (run.ids[i] != EOS)
        horizon = int(run.unmask_step[i][real].max()) + 1 if real.any() else 1
        horizon = horizon if paper else int(run.steps_taken[i])
        per_step = [float(run.entropies[i][run.unmask_step[i] == t].sum()) for t in range(horizon)]
        q = torch.tensor(per_step).clamp(min=1e-8).double()
        q = q / q.sum() if config.importance_sampling == "entropy" else torch.full((horizon,), 1 / horizon)
        for t in (int((q.cumsum(0) <= x).sum()) for x in u[i].tolist()):
            weight = 1 / (horizon if paper else run.sampling_steps) / q[t].item()
            seen = torch.where(run.unmask_step[i] >= t, MASK, run.ids[i])
            real = run.attention_mask[i]  # without its padding
            logits, sampled_from = model(seen[real][None])[0], sampler(seen[real][None])[0].detach()
            for place in (run.unmask_step[i][real] == t).nonzero().flatten():
                token = run.ids[i][real][place]
                keep = kept(logits[place].detach(), config.temperature, config.top_k, config.top_p)
                assert kept(sampled_from[place], config.temperature, config.top_k, config.top_p)[token]
                keep[token] = True
                logp = (logits[place] / config.temperature).masked_fill(~keep, -torch.inf).log_softmax(0)
                rho = (logp[token] - run.logprobs[i][real][place].float()).exp()
                clipped = rho.clamp(1 - config.epsilon_low, 1 + config.epsilon_high)
                total = total - weight * torch.minimum(rho * advantages[i], clipped * advantages[i])
    return total / (config.mc_samples * len(u))


def adapted(model):
    pytest.importorskip("peft")
    model = add_lora(model, 4, 8, torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += 0.1 * ("lora_B" in name)
    return model


TRUNCATED = {"importance_sampling": "entropy", "temperature": 0.6, "top_k": 6, "top_p": 0.9, "block_length": 4}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("options", [{}, {"importance_sampling": "entropy"}, TRUNCATED])
@pytest.mark.parametrize("paper", [True, False])
def test_the_gradient_is_that_of_the_official_formula(model, options, moved, lora, paper, monkeypatch):
    config = make_config(sampling_steps=8, low_discrepancy=False, num_generations=3, **options)
    model = adapted(model) if lora else model
    run, sampler = make_rollout(model, config, seed=3), copy.deepcopy(model)
    last = run.unmask_step.where(run.ids != EOS, -1).amax(1)
    assert (last + 1 < run.steps_taken)[ADVANTAGES != 0].any()  # a last step that wrote <eos>: the horizons differ
    if moved:  # a later update on the same rollout: ratios differ from 1, and the clip acts
        with torch.no_grad():
            for i, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
                parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    u = torch.rand(6, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    monkeypatch.setattr(agrpo, "uniforms", lambda *_: u)
    monkeypatch.setattr(variants, "stratified_over_batch", lambda *_: u)
    _, weights = (variants.paper if paper else agrpo.estimate)(run, torch.arange(6.0), config, None)
    stats = accumulate(model, run, ADVANTAGES, config, weights, micro_batch=4)
    ours = gradient(model)
    official_loss(model, sampler, run, ADVANTAGES, u, config, paper).backward()
    expected = gradient(model)
    assert (ours - expected).norm() <= 1e-4 * expected.norm() and expected.norm() > 0
    assert (stats["clip_fraction"] > 0) == moved


def test_the_papers_draws_are_stratified_over_the_batch():
    """One uniform in each of B k equal parts, whichever completion gets it: one may draw a step twice."""
    u = variants.stratified_over_batch(50, 2, torch.Generator().manual_seed(0))
    assert torch.equal((u.flatten() * 100).floor().long().sort().values, torch.arange(100))
    twice = ((u * 4).floor()[:, 0] == (u * 4).floor()[:, 1]).sum()
    assert 0 < twice < 30


def test_a_drawn_token_stays_in_the_kept_set(model):
    """In a later update the model may not keep it any more: its ratio is then finite, and no other word is added."""
    config = make_config(top_k=2)
    logits = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    last = logits.index_fill(1, torch.tensor(MASK), torch.inf).argmin(1)
    p = agrpo.token_logprobs(logits, MASK, config, (torch.arange(5), last)).exp()
    assert ((p > 0).sum(1) == 3).all() and (p.gather(1, last[:, None]) > 0).all() and (p[:, MASK] == 0).all()
    assert torch.equal(p > 0, (agrpo.token_logprobs(logits, MASK, config).exp() > 0).scatter(1, last[:, None], True))
