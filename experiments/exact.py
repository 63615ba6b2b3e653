"""The exact table: bias and variance of every estimator, on micro models whose trajectories can all be listed.

    python experiments/exact.py          a minute

Claim: what is called exact is, to rounding, and what is not stands with its bias. Medians over five diffuse models and
five sharp ones, as trained models are. oracle.py enumerates; here is what it takes for four tokens and groups of three,
too many groups to be called one by one: an advantage sees a few facts of its fellows, a weight its own trajectory (and,
shared by the batch, finished advantages), so that E[A w] = E[A] E[w].
"""

import copy
import itertools
import math
import sys
from dataclasses import fields, replace
from functools import lru_cache, partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: the project's root
import agrpo
import variants
from experiments import contrasts, oracle, report, runner
from experiments.oracle import EOS, MASK, QUESTION, A, B, merged, outcomes, problem


# ---------------------------------------------------------------------- estimators that are in no other file
def stepwise(run, rewards, config, generator, step_rewards, c=0.5, gate=False):
    """c r_t subtracted; timesteps are drawn for each completion."""
    r = step_rewards(torch.ones(len(rewards), dtype=torch.bool))
    advantages = variants.stepwise_advantages(run, rewards, r, config, c, gate)
    return advantages, agrpo.sample_timesteps(run, config, generator)


def scaled_by_std(run, rewards, config, generator, step_rewards=None):
    """GRPO: the advantage over the standard deviation of the group's rewards."""
    advantages, weights = agrpo.estimate(run, rewards, config, generator)
    std = rewards.view(-1, config.num_generations).std(1).repeat_interleave(config.num_generations)
    return advantages / std.clamp(min=1e-9)[:, None], weights


def last_non_eos(run, rewards, config, generator, step_rewards=None):
    """The paper's horizon without its mean: steps after the last token that is not <eos> do not count."""
    horizon = run.unmask_step.where(run.ids != EOS, 0).amax(1) + 1
    return agrpo.estimate(replace(run, steps_taken=horizon), rewards, config, generator)


def trajectory_mean(run, rewards, config, generator, step_rewards=None):
    """The mean over the T steps that a completion took, not over m."""
    advantages, weights = agrpo.estimate(run, rewards, config, generator)
    return advantages, weights * run.sampling_steps / run.steps_taken[:, None]


def unweighted(run, rewards, config, generator, step_rewards=None):
    """Drawn by entropy, then weighted as if drawn evenly."""
    advantages, weights = agrpo.estimate(run, rewards, config, generator)
    return advantages, weights * agrpo.proposal(run, config) * run.steps_taken[:, None]


# ---------------------------------------------------------------- expectation and variance of an estimator
def expected_advantages(x, estimate, config):
    """E[A | own trajectory] (N, m): all that advantages look at are R, T and r_t; every group of these is tried."""
    facts = torch.cat([x.rewards[:, None], x.run.steps_taken[:, None], x.step_rewards], 1)
    one, index, chance = merged(facts, x.p)
    others = config.num_generations - 1
    fellows = torch.cartesian_prod(*[torch.arange(len(one))] * others).view(-1, others)
    fellows, ways = fellows.sort(1).values.unique(dim=0, return_counts=True)  # in whatever order
    total = torch.zeros(len(one), x.run.sampling_steps, dtype=x.p.dtype)
    for own in range(len(one)):
        group = F.pad(fellows, (1, 0), value=own)  # (groups, G)
        advantages, _ = x.estimate(estimate, one[group].flatten(), config)
        total[own] = (ways * chance[fellows].prod(1)) @ advantages.unflatten(0, group.shape)[:, 0]
    return total[index]


def own_draws(x, estimate, config, A):
    """Every outcome [(probability (N,), w (N, m))] of weights that see their own trajectory alone."""
    N = len(x.p)
    rows = torch.arange(N + -N % config.num_generations) % N  # whole groups
    return [(chance[:N], w[:N]) for chance, _, w in outcomes(partial(x.estimate, estimate, rows, config))]


def shared_draws(x, estimate, config, A):
    """The same of the draws of agrpo-sa, each completion a batch of its own: its steps compete with each other."""
    batches = [(x.run[row], A[row]) for row in torch.arange(len(x.p)).split(1)]
    found = [outcomes(lambda b=b: (b[1], variants.shared_weights(*b, config, None))) for b in batches]
    return [(chance, w) for chance, _, w in (map(torch.cat, zip(*pieces)) for pieces in zip(*found))]


def scores(model, run, config):
    """grad log pi(a_t | s_t) of every distinct state and action (D, parameters), and which each step has (B, m).
    For rows of the same padding."""
    t = torch.arange(run.sampling_steps).repeat(len(run.ids))
    part = run[torch.arange(len(run.ids)).repeat_interleave(run.sampling_steps)]
    positions, tokens, _ = part.action_at(t)
    actions = torch.full_like(part.ids, -1).masked_scatter(positions, tokens)
    pairs, index = torch.stack([part.state_at(t), actions], 1).unique(dim=0, return_inverse=True)  # (D, 2, L)

    def logp(parameters, pair):  # `positions` would not vmap
        ids, action = pair
        logits = functional_call(model, parameters, (ids[None], run.attention_mask[:1]))[0]  # (L, V)
        log_pi = agrpo.token_logprobs(logits, run.mask_token_id, config).gather(1, action.clamp(min=0)[:, None])
        return log_pi.squeeze(1).where(action >= 0, 0).sum()

    with sdpa_kernel(SDPBackend.MATH):  # the one that vmaps
        gradients = vmap(grad(logp), (None, 0))(dict(model.named_parameters()), pairs)
    return torch.cat([g.detach().flatten(1) for g in gradients.values()], 1), index.view(len(run.ids), -1)


kept_scores = lru_cache(maxsize=20)(lambda x: scores(x.model, x.run, x.config))


def mean_square(x, A, draws):
    """E||g||^2 of one completion, g = m sum_t w_t A_t grad log pi(a_t | s_t)."""
    S, index = kept_scores(x)
    gram = (S @ S.T)[index[:, :, None], index[:, None, :]]  # (N, m, m)
    terms = [(x.p * chance, w * A * index.shape[1]) for chance, w in draws]
    return sum(chance @ torch.einsum("bs,bst,bt->b", c, gram, c) for chance, c in terms)


# ------------------------------------------------------------------------------------- the kinds of rows
def against(gradient, mean, square=None, largest=None):
    """oracle.compare() of E[g] and the gradient, and where `square` is E||g||^2 the variance of one completion's g with
    its baseline at its expectation: without what a baseline of few others adds."""
    variance = None if square is None else ((square - mean @ mean) / (gradient @ gradient)).item()
    return oracle.compare(mean, gradient) | {"variance": variance, "largest_weight": largest}


def measure(x, options, estimate=agrpo.estimate, advantages=expected_advantages, draws=own_draws, rescale=True):
    """{bias, beyond_scale, cosine, scale, variance, largest_weight} of an estimator on a Problem.

    options of AGRPOConfig; rescale: by G / (G - 1), which the own sample in the group's mean costs. The weight is the
    largest of a step drawn once."""
    config = replace(x.config, **options)
    G = config.num_generations
    A = advantages(x, estimate, config) * (G / (G - 1) if rescale else 1)  # (N, m)
    found = draws(x, estimate, config, A)
    mean = x.expected(x.p[:, None] * A * sum(chance[:, None] * w for chance, w in found))
    once = torch.stack([w.where((w > 0) & (chance > 1e-12)[:, None], math.inf) for chance, w in found]).amin(0)
    largest = A.shape[1] * once.where(once < math.inf, 0).max().item() if draws == own_draws else None
    return against(x.gradient, mean, mean_square(x, A, found), largest)


def kept_tokens(x, options):
    """Low confidence as EGSPO scores it: the action is what was kept, the rest of the draw is forgotten."""
    x = copy.copy(x)
    x.run = agrpo.Rollout(**{field.name: getattr(x.run, field.name) for field in fields(agrpo.Rollout)})
    return measure(x, options)


def returns(x):
    """R - c r_t (N, m), c = 1/2."""
    return x.rewards[:, None] - x.step_rewards / 2


def pooled(x, estimate, config):
    """E[A | own]: R - c r_t minus the mean over the group of three and all its steps, the own ones included."""
    own = (returns(x) * variants.executed_steps(x.run)).sum(1) / x.run.steps_taken
    return returns(x) - (own / 3 + x.p @ own * 2 / 3)[:, None]


def slots(q, u):
    """agrpo.timestep_weights slot by slot: steps and weights (N, k), before equal steps are merged."""
    k, T, slot = u.shape[1], (q > 0).sum(1, keepdim=True), torch.arange(u.shape[1])
    steps = torch.where(k >= T, slot.minimum(T - 1), agrpo.inverse_cdf(q, u))
    return steps, torch.where(k >= T, (slot < T).double(), 1 / (k * q.gather(1, steps))) / q.shape[1]


def slot_draws(x, estimate, config, A):
    """own_draws whose weights carry R - c r_t minus the mean of its slot, as EGSPO's code has it (there over the group,
    which costs scale besides). Which steps fall into a slot depends on the trajectory, so the means do not cancel."""
    with patch.object(agrpo, "timestep_weights", slots):
        found = outcomes(lambda: agrpo.sample_timesteps(x.run, config, None))
    means = sum((x.p * chance) @ returns(x).gather(1, steps) for chance, steps, _ in found)  # (k,)
    empty = torch.zeros_like(x.step_rewards)
    return [(c, empty.scatter_add(1, s, w * (returns(x).gather(1, s) - means))) for c, s, w in found]


def likelihood(x, accumulate, masks):
    """diffu-GRPO or the ELBO, whose masks (M, n) are equally likely. They know no more of a trajectory than its end."""
    one, _, p = merged(x.run.ids, x.p)  # D ends
    A, x = 2 * expected_advantages(x, agrpo.estimate, x.config)[one], copy.copy(x)
    x.run, M, config = x.run[one], len(masks), replace(x.config, mc_samples=len(masks))
    with patch.object(contrasts, "random_masks", lambda u: masks.repeat(len(p), 1)):
        mean = x.expected(p[:, None] * A / A.shape[1], accumulate=accumulate, config=config)
    run = x.run[torch.arange(len(p)).repeat_interleave(M)]  # every end, every mask: as if written in one step
    run.unmask_step.masked_scatter_(run.unmask_step >= 0, masks.repeat(len(p), 1).long() - 1)
    S, index = scores(x.model, replace(run, sampling_steps=1), x.config)
    S = A[:, :1, None] * masks.shape[1] / masks.sum(1)[:, None] * S[index].view(len(p), M, -1)
    k = min(M, x.config.mc_samples)  # independent masks
    square = S.square().sum(2).mean(1) / k + (1 - 1 / k) * S.mean(1).square().sum(1)
    return against(x.gradient, mean, p @ square)


def all_masks(n):
    """The ELBO's masks (M, n): as many of each size, and as many of each set of that size."""
    often = math.lcm(*(math.comb(n, size) for size in range(1, n + 1)))
    masks = list(itertools.product((False, True), repeat=n))[1:]
    return torch.tensor([mask for mask in masks for _ in range(often // math.comb(n, sum(mask)))])


def per_state(seed, sharpness=1.0, entropy=False):
    """The KL (or the entropy), a penalty exact at every visited state, against the gradient of the trajectories' own.
    Of E[f(tau)], f = log p / p_ref or - log p, that is sum_tau grad p(tau) f(tau): sum_tau p grad log p is 0."""
    x, reference = problem(seed, sharpness), oracle.micro_model(seed + 100, sharpness)
    logp, theirs = (oracle.trajectory_logp(model, x.run, x.config).detach() for model in (x.model, reference))
    values, penalty = logp - theirs, variants.kl_penalty(reference, 1.0, x.config, MASK)
    if entropy:
        values, penalty = -logp, variants.entropy_penalty(-1.0, x.config, MASK)
    exact = oracle.exact_gradient(x.model, x.run, x.order_p, x.config, values)
    zero, p = torch.zeros_like(x.step_rewards), x.p[:, None] * variants.executed_steps(x.run)
    return against(exact, -x.follow(zero, len(p) * p / p.shape[1], penalty=penalty))


# -------------------------------------------------------------------------------------------- the table
def row(policy, *args, how=measure, levels=3, **more):
    """A line of the table: (seed, sharpness) -> how(Problem of that policy, *args)."""
    return lambda seed, sharpness=1.0: how(problem(seed, sharpness, levels, **policy), *args, **more)


by_slot = partial(measure, advantages=lambda x, *_: torch.ones_like(x.step_rewards), draws=slot_draws, rescale=False)
ELBO = partial(contrasts.elbo, generator=torch.Generator())
RAMP = partial(stepwise, c=torch.arange(4, dtype=torch.float64) / 4, gate=True)
ENTROPY, ONE = {"importance_sampling": "entropy"}, {"mc_samples": 1}
THREES = ENTROPY | {"num_generations": 3}
TWO_STEPS, BLOCKS, LEFT_TO_RIGHT = {"sampling_steps": 2}, {"block_length": 2}, {"block_length": 1}
SHORT = {"ids": QUESTION[:-1], "sampling_steps": 3}
CONFIDENT = {"unmasking": "low_confidence", "sampling_steps": 2}
INFILLING = {"ids": (B, MASK, A, MASK, MASK, B, MASK, A)}
PADDED = {"ids": (B, MASK, A, MASK, MASK, MASK, A), "attended": (1, 1, 1, 1, 1, 1, 0)}
EXACT = {  # what claims to be unbiased, and is
    "every step (k = m)": row({}, {"mc_samples": 4}),
    "uniform": row({}, {"low_discrepancy": False}),
    "uniform, low discrepancy (default)": row({}, {}),
    "entropy": row({}, ENTROPY | {"low_discrepancy": False}),
    "entropy, low discrepancy": row({}, ENTROPY),
    "m = 2 steps of two tokens": row(TWO_STEPS, ENTROPY | ONE),
    "m = 3 steps for four tokens": row({"sampling_steps": 3}, ENTROPY),
    "blocks of two, early stop": row(BLOCKS, ENTROPY),
    "temperature 0.7, top-k 2": row({"temperature": 0.7, "top_k": 2}, ENTROPY),
    "top-k 3, top-p 0.7": row({"top_k": 3, "top_p": 0.7}, ENTROPY),
    "left to right": row(LEFT_TO_RIGHT, ENTROPY),
    "left to right, k = m = n (JustGRPO)": row(LEFT_TO_RIGHT, {"mc_samples": 4}),
    "shared by the batch": row(SHORT, ONE, draws=shared_draws),
    "shared by the batch, r_t ramp gated (agrpo-sa)": row(SHORT, THREES | ONE, variants.agrpo_sa, draws=shared_draws),
    "r_t, G = 3": row({}, THREES, stepwise),
    "r_t gated, G = 3": row({}, THREES, partial(stepwise, gate=True)),
    "r_t ramp gated, G = 3": row({}, THREES, RAMP),
    "r_t, G = 3, blocks of two, early stop": row(BLOCKS, THREES, stepwise),
    "r_t ramp gated, G = 3, blocks of two, early stop": row(BLOCKS, THREES, RAMP),
    "infilling: given before, between and after": row(INFILLING, ENTROPY),
    "infilling, padding after, early stop": row(PADDED | BLOCKS, ENTROPY),
    "low confidence, every step": row(CONFIDENT, {}),
    "low confidence, uniform": row(CONFIDENT, ONE),
    "low confidence, entropy": row(CONFIDENT, ENTROPY | ONE),
    "low confidence, three tokens one by one, entropy": row(CONFIDENT | SHORT, ENTROPY),
    "low confidence, temperature 0.7, entropy": row(CONFIDENT | {"temperature": 0.7}, ENTROPY | ONE),
    "low confidence, blocks of two, early stop, entropy": row(CONFIDENT | BLOCKS | {"sampling_steps": 4}, ENTROPY),
}
GROUP = {"num_generations": 4}
BIASED = {  # what the papers and their code have, under its name, and what one might try
    "horizon: last token that is not end-of-text": row({}, {}, last_non_eos),
    "the same, per-trajectory mean (the paper's)": row({}, {}, variants.paper),
    "per-trajectory mean, blocks with early stop": row(BLOCKS, {}, trajectory_mean),
    "group mean, own sample included, G = 4": row(TWO_STEPS, GROUP, levels=4, rescale=False),
    "group mean / standard deviation, G = 4": row(TWO_STEPS, GROUP, scaled_by_std, levels=4, rescale=False),
    "KL per state, against the trajectory's KL": per_state,
    "entropy per state, against the trajectory's entropy": partial(per_state, entropy=True),
    "entropy without importance weights": row({}, ENTROPY, unweighted),
    "k steps of highest entropy (EGSPO)": row({}, {}, variants.egspo),
    "k steps of highest entropy, r_t (EGSPO-SA)": row({}, {"num_generations": 3}, variants.egspo_sa),
    "r_t, a mean per slot of the draw": row({}, ENTROPY, how=by_slot),
    "r_t, a mean per slot, blocks with early stop": row(BLOCKS, ENTROPY, how=by_slot),
    "r_t, own steps in the mean": row({}, ENTROPY, advantages=pooled, rescale=False),
    "low confidence, kept tokens alone": row(CONFIDENT, {}, how=kept_tokens),
    "one pass, all masked (diffu-GRPO)": row({}, contrasts.diffu_grpo, torch.ones(1, 4) > 0, how=likelihood),
    "ELBO of random masks (ESPO, BGPO)": row({}, ELBO, all_masks(4), how=likelihood),
}


def measure_model(seed, sharpness):
    """{"rows": {name: numbers}} of one random model."""
    return {"rows": {name: r(seed, sharpness) | {"exact": name in EXACT} for name, r in (EXACT | BIASED).items()}}


def medians(models):
    """{name: {key: median over the models}}, None where there is None. Without nan: a sharp model under top-p may have
    a single completion, and no gradient."""

    def median(values):
        return None if None in values else torch.tensor(values, dtype=torch.float64).nanquantile(0.5).item()

    return {name: {key: median([rows[name][key] for rows in models]) for key in r} for name, r in models[0].items()}


def print_rows(rows):
    formats = dict(zip(next(iter(rows.values())), (".1e", ".1e", ".4f", ".3f", ".3g", ".3g")))
    cells = {n: ["" if r[key] is None else format(r[key], f) for key, f in formats.items()] for n, r in rows.items()}
    report.print_table([key.replace("_", " ") for key in formats], cells)


def table(scale):
    sharpness, seeds = {"diffuse": 1.0, "sharp": 4.0}, 1 if scale == runner.QUICK else scale.seeds
    jobs = [{"seed": seed, "sharpness": s} for s in sharpness.values() for seed in range(seeds)]
    results = [result["rows"] for result in runner.do_all(measure_model, jobs, "enumeration")]
    tables = {kind: medians(results[i * seeds :][:seeds]) for i, kind in enumerate(sharpness)}
    for kind, rows in tables.items():
        print(f"\n{kind} models (logits x {sharpness[kind]:g}), medians over {seeds}")
        print_rows(rows)

    def draw(axes):
        for axis, (kind, rows) in zip(axes, tables.items()):
            bias = [max(r["beyond_scale"], 1e-16) for r in rows.values()]
            axis.scatter(bias, range(len(rows)), c=["C0" if r["exact"] else "C3" for r in rows.values()])
            axis.set(xscale="log", title=f"{kind} models", xlabel="relative bias beyond scale")
            axis.set_yticks(range(len(rows)), rows if kind == "diffuse" else [""] * len(rows), fontsize=7)
            axis.invert_yaxis()
            axis.grid(alpha=0.3)

    report.finish("exact", {"seeds": seeds, "tables": tables}, draw, (11, 8), (1, 2))


if __name__ == "__main__":
    runner.main(table, __doc__)
