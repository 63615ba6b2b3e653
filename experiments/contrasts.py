"""Two likelihoods of a whole completion that cost a pass or a few, not one per step, and are not the policy's.

The policy's log pi is a sum over denoising steps, each with its own partly masked state. Both methods here replace it
by something that knows no trajectory, so their gradient is biased: experiments/exact.py says by how much. They take the
place of agrpo.accumulate_gradient: the same arguments, the same statistics. Both assume the first update after a
rollout, where the ratio is 1 (their papers' later updates take the ratio of these same likelihoods).
"""

import torch

import agrpo


def diffu_grpo(model, rollout, advantages, config, generator, micro_batch, reference=None):
    """Gradient of -(1/B) sum_i A_i (1/m) sum_u log p(o_u | prompt, all [MASK]): one pass per completion.

    diffu-GRPO of d1 (arXiv 2504.12216), without the masks that it puts on the prompt. Every token is scored as if it
    had been drawn in the first step, blind to the others: the mean field of the policy. Exact for m = 1 alone.
    """
    masked = torch.ones_like(rollout.completion_ids, dtype=torch.bool)
    weights = torch.full((len(masked),), 1 / config.sampling_steps, dtype=torch.float64, device=masked.device)
    return likelihood_gradient(model, rollout, advantages, masked, weights, config, micro_batch)


def elbo(model, rollout, advantages, config, generator, micro_batch, reference=None):
    """Gradient of -(1/B) sum_i A_i (1/m) (1/k) sum_s (n/l_s) sum_(u masked) log p(o_u | state s): k passes each.

    ESPO and BGPO: the evidence lower bound, estimated with k random masks of l ~ U{1..n} positions. It bounds the
    likelihood of a completion written one token at a time in random order, with all orders averaged inside the
    logarithm's bound: not the order that was drawn, not the blocks, not the tokens that were drawn in parallel.
    """
    n, k = config.completion_length, config.mc_samples
    row = torch.arange(len(rollout.completion_ids), device=rollout.completion_ids.device).repeat_interleave(k)
    masked = random_masks(agrpo.uniforms((len(row), n + 1), generator)).to(row.device)
    weights = n / masked.sum(1).double() / config.sampling_steps
    return likelihood_gradient(
        model, rollout[row], advantages.to(row.device)[row], masked, weights, config, micro_batch
    )


def random_masks(u):
    """u (N, n + 1) in [0, 1) -> masked (N, n) bool: l ~ U{1..n} True per row, every set of l equally likely."""
    n = u.shape[1] - 1
    size = (u[:, :1] * n).floor() + 1  # l, (N, 1)
    return u[:, 1:].argsort(1).argsort(1) < size  # the ranks below l


def likelihood_gradient(model, rollout, advantages, masked, weights, config, micro_batch):
    """Add the gradient of -(1/B) sum_i w_i A_i sum_(u masked) log p(o_u | prompt, what is not masked) to .grad.

    advantages A (B,), masked (B, n) bool, weights w (B,); `micro_batch` sequences per pass. Returns the statistics of
    agrpo.accumulate_gradient; the loss is this surrogate's. Raises ValueError where there is nothing to follow.
    """
    agrpo.require(config.temperature > 0, "temperature 0 has no gradient: train with a positive temperature")
    agrpo.require(rollout.support_ids is None, "the contrasts know no kept sets: no top_k")
    agrpo.require(config.beta == 0 and config.entropy_bonus == 0, "the contrasts have no KL and no entropy bonus")
    factor = weights * advantages.to(weights.device)  # (B,)
    rows, total = factor.nonzero()[:, 0], 0.0  # a completion without advantage has gradient exactly 0
    for start in range(0, len(rows), micro_batch):
        row = rows[start : start + micro_batch]
        run, chosen = rollout[row], masked[row]  # b rows, N masked positions
        seen = run.completion_ids.masked_fill(chosen, model.mask_token_id)
        logits = agrpo.logits_at(model, torch.cat([run.prompt_ids, seen], 1), run.prompt_mask, chosen)  # (N, V)
        distribution = agrpo.token_logprobs(logits, model.mask_token_id, config.temperature)
        logp = agrpo.logprob_of(run.completion_ids[chosen], distribution)  # (N,)
        loss = -(factor[row][chosen.nonzero()[:, 0]] * logp).sum() / len(masked)
        loss.backward()
        total += loss.item()
    return {"loss": total, "clip_fraction": 0.0, "kl": 0.0, "ratio_error": 0.0, "evaluations": len(rows)}
