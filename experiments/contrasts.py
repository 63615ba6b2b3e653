"""Two likelihoods of a whole completion that cost a pass or a few, not one per step, and are not the policy's.

The policy's log pi is a sum over denoising steps, each with its own partly masked state. Both methods replace it by
something that knows no trajectory: biased, experiments/exact.py says by how much. They take the place of
agrpo.accumulate_gradient, with its arguments and statistics, in the first update after a rollout (ratio 1).
"""

import torch

import agrpo


def diffu_grpo(model, run, *, advantages, weights, config, micro_batch, penalty=None):
    """Gradient of -(1/B) sum_i A_i w_i sum_u log p(o_u | given, all [MASK]): one pass per question, w = 1/m.

    diffu-GRPO of d1 (arXiv 2504.12216), without the masks that it puts on the prompt. Every token is scored as if it
    had been drawn in the first step, blind to the others: the mean field of the policy. Exact for m = 1 alone."""
    written = run.unmask_step >= 0  # (B, L)
    return likelihood_gradient(model, run, written, factors(run, advantages, weights), config, micro_batch, penalty)


def elbo(model, run, *, advantages, weights, config, micro_batch, penalty=None, generator):
    """Gradient of -(1/B) sum_i A_i w_i (1/k) sum_s (n/l_s) sum_(u masked) log p(o_u | state s): k passes each, w = 1/m.

    ESPO and BGPO: the evidence lower bound, estimated with k random masks of l ~ U{1..n} positions. It bounds the
    likelihood of a completion written one token at a time in random order, with all orders averaged inside the
    logarithm's bound: not the order that was drawn, not the blocks, not the tokens that were drawn in parallel."""
    row = torch.arange(len(run.ids), device=run.ids.device).repeat_interleave(config.mc_samples)
    written = run.unmask_step[row] >= 0  # (B k, L)
    n = int(written[0].sum())
    masked = random_masks(agrpo.uniforms((len(row), n + 1), generator)).to(row.device)  # (B k, n)
    factor = factors(run, advantages, weights)[row] * n / masked.sum(1)
    masked = torch.zeros_like(written).masked_scatter(written, masked)
    return likelihood_gradient(model, run[row], masked, factor, config, micro_batch, penalty)


def factors(run, advantages, weights):
    """A w (B,) of each completion. There are no steps here: tables (B, m) count by their mean."""
    return (advantages.reshape(len(run.ids), -1) * weights).mean(1).to(run.ids.device)


def random_masks(u):
    """u (N, n + 1) in [0, 1) -> masked (N, n) bool: l ~ U{1..n} True per row, every set of l equally likely."""
    n = u.shape[1] - 1
    size = (u[:, :1] * n).floor() + 1  # l, (N, 1)
    return u[:, 1:].argsort(1).argsort(1) < size  # the ranks below l


def likelihood_gradient(model, run, masked, factor, config, micro_batch, penalty):
    """Add the gradient of -(1/B) sum_i factor_i sum_(u masked) log p(o_u | what is not masked) to .grad.

    masked (B, L) bool, factor (B,). Returns the statistics of agrpo.accumulate_gradient; the loss is this surrogate's.
    Raises ValueError where there is nothing to follow."""
    agrpo.require(config.temperature > 0, "temperature 0 has no gradient: train with a positive temperature")
    agrpo.require(not config.top_k and config.top_p == 1, "the contrasts know no kept sets: no top_k, no top_p")
    agrpo.require(penalty is None, "the contrasts have no KL and no entropy bonus")
    chosen = masked & (factor != 0)[:, None]  # a completion without advantage has gradient exactly 0
    seen, total, sequences = run.ids.masked_fill(masked, model.mask_token_id), 0.0, 0
    for rows, (ids, mask, wanted), place in agrpo.distinct_passes(seen, run.attention_mask, chosen, micro_batch):
        logits = model(ids, attention_mask=mask, positions=wanted)  # (N', V)
        tokens = run.ids[rows][chosen[rows]]  # (N,)
        logp = agrpo.token_logprobs(logits, model.mask_token_id, config)[place, tokens]
        loss = -(factor[rows][chosen[rows].nonzero()[:, 0]] * logp).sum() / len(masked)
        loss.backward()
        total, sequences = total + loss.item(), sequences + len(ids)
    return {"loss": total, "clip_fraction": 0.0, "penalty": 0.0, "ratio_error": 0.0, "evaluations": sequences}
