"""Is the gradient that training follows the policy gradient? Enumerate and see.

    python experiments/exact.py          prints the table of the README, half a minute

A micro model (three words and [MASK], four tokens) has so few trajectories that all of them can be listed, each
with its probability, in float64. Then J = sum_tau p(tau) R(tau) is a plain function that autograd differentiates,
and the expectation of any estimator is a finite sum: nothing is sampled, nothing is averaged, no tolerance hides
anything. To try an estimator of your own, pass a function like `agrpo_estimator` to `expectation`.
"""

import itertools
import math
import statistics
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: the project's root
import agrpo
from agrpo import AGRPOConfig, Rollout
from tiny_dllm import Config, MaskedDiffusionLM

EOS, A, B, MASK = range(4)  # the whole vocabulary
PROMPT = torch.tensor([[A, B, B]])


def micro_model(seed, sharpness=1.0):
    """A random float64 model with LLaDA's blocks; its logits are multiplied by `sharpness`."""
    model = MaskedDiffusionLM(Config(4, MASK, EOS, d_model=8, n_layers=1, n_heads=2, mlp_hidden_size=8))
    model = model.double().init_weights(torch.Generator().manual_seed(seed))
    model.model.transformer.ff_out.weight.data *= sharpness
    return model


def micro_reward(completion_ids, seed, levels=None):
    """R (B,) of completions (B, n): an arbitrary table, drawn once per seed; with `levels` distinct values if given."""
    table = torch.rand(3 ** completion_ids.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if levels:
        table = (table * levels).floor() / (levels - 1)
    return table[(completion_ids * 3 ** torch.arange(completion_ids.shape[1])).sum(1)]


# ------------------------------------------------------------------------------------------- enumeration


def trajectories(config):
    """Every (tokens, unmask_step, probability of the order, steps taken) that a rollout under `config` can produce."""
    block, steps = config.completion_length // config.blocks, config.sampling_steps // config.blocks
    found, running = [], [((), (), 1.0)]
    for start in range(0, config.sampling_steps, steps):
        slots = [t for t in range(start, start + steps) for _ in range(config.tokens_per_step[t])]
        orders = [tuple(slots)] if config.unmasking == "left_to_right" else sorted(set(itertools.permutations(slots)))
        grown = [
            (tokens + more, unmask + order, p / len(orders))
            for tokens, unmask, p in running
            for order in orders
            for more in itertools.product((EOS, A, B), repeat=block)
        ]
        last = start + steps == config.sampling_steps
        running = [x for x in grown if not last and x[0][-block:] != (EOS,) * block]
        stopped = grown if last else [x for x in grown if x[0][-block:] == (EOS,) * block]
        for tokens, unmask, p in stopped:
            rest = config.completion_length - len(tokens)
            found.append((tokens + (EOS,) * rest, unmask + (config.sampling_steps,) * rest, p, start + steps))
    return found


@torch.no_grad()
def enumerate_rollouts(model, config):
    """All trajectories as one Rollout of B rows, as if agrpo.rollout had sampled them; p(tau) (B,); p(order) (B,)."""
    tokens, unmask, order_p, taken = zip(*trajectories(config))
    rows = len(tokens)
    empty = torch.zeros(rows, config.completion_length, dtype=torch.float64)
    run = Rollout(
        PROMPT.repeat(rows, 1),
        torch.ones(rows, PROMPT.shape[1], dtype=torch.bool),
        torch.tensor(tokens),
        torch.tensor(unmask),
        empty.clone(),
        empty.clone(),
        torch.tensor(taken),
        torch.full((*empty.shape, config.top_k), -1) if config.top_k else None,
        MASK,
        EOS,
    )
    for t in range(config.sampling_steps):
        chosen = run.unmasked_at(torch.full((rows,), t))
        logits = agrpo.logits_at(model, run.state_at(torch.full((rows,), t)), run.prompt_mask, chosen)
        support = agrpo.kept_ids(logits, MASK, config)
        if support is not None:
            run.support_ids[chosen] = support
            outside = (support != run.completion_ids[chosen][:, None]).all(1)
        logp = agrpo.policy_logprob(logits, run, chosen, config)
        run.logprobs[chosen] = logp if support is None else logp.masked_fill(outside, -math.inf)
        run.entropies[chosen] = agrpo.entropy(agrpo.token_logprobs(logits, MASK, config.temperature, support))
    order_p = torch.tensor(order_p, dtype=torch.float64)
    p = order_p * run.logprobs.sum(1).exp()
    possible = p > 0  # top-k and top-p rule some out
    return run[possible], p[possible], order_p[possible]


def trajectory_logp(model, run, config):
    """log p(tokens | order) (B,), differentiable, with a softmax of its own: the oracle's half."""
    log_p = torch.zeros(len(run.unmask_step), dtype=torch.float64)
    for t in range(config.sampling_steps):
        ids = torch.cat([run.prompt_ids, run.completion_ids.where(run.unmask_step < t, MASK)], 1)
        logits = model(ids)[:, PROMPT.shape[1] :, :MASK] / config.temperature  # (B, n, 3): MASK is the last word
        if config.top_k:
            logits = logits.masked_fill(logits < logits.topk(config.top_k).values[..., -1:], -math.inf)
        if config.top_p < 1:  # drop a word if the words above it already reach p
            p = logits.softmax(-1)
            above = (p[..., None, :] * (p[..., None, :] > p[..., :, None])).sum(-1)
            logits = logits.masked_fill(above >= config.top_p, -math.inf)
        token_logp = logits.log_softmax(-1).gather(2, run.completion_ids[..., None]).squeeze(2)
        log_p = log_p + token_logp.where(run.unmask_step == t, 0).sum(1)
    return log_p


def exact_gradient(model, config, reward):
    """grad J by autograd through J = sum_tau p(tau) R(tau). (parameters,)"""
    run, _, order_p = enumerate_rollouts(model, config)
    p = order_p * trajectory_logp(model, run, config).exp()
    assert abs(p.sum().item() - 1) < 1e-12, "the trajectories do not exhaust the probability"
    return flat_gradient(model, (p * reward(run.completion_ids)).sum())


def flat_gradient(model, loss=None):
    """Gradient of `loss` (or what has been accumulated in .grad) as one vector; clears .grad."""
    if loss is not None:
        loss.backward()
    flat = torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in model.parameters()])
    model.zero_grad()
    return flat


# ------------------------------------------------------------------------------- expectation of an estimator


@contextmanager
def replaced(name, value):
    """agrpo.<name> is `value` inside the block: this is how enumerated numbers take the place of random ones."""
    original = getattr(agrpo, name)
    setattr(agrpo, name, value)
    try:
        yield
    finally:
        setattr(agrpo, name, original)


def timestep_draws(run, config):
    """Every outcome of agrpo.sample_timesteps: (probability (B,), steps (B, k), weights (B, k)).

    The steps are piecewise constant in the uniforms, with jumps where u meets the cumulative sum of q: one point in
    the middle of each piece stands for the whole piece, and its length is its probability.
    """
    executed = torch.arange(config.sampling_steps) < agrpo.horizon_of(run, config)[:, None]
    q = agrpo.proposal(run, config).where(executed, 0.0)
    jumps = (q / q.sum(1, keepdim=True)).cumsum(1)  # (B, m) values of u
    if config.low_discrepancy:
        jumps = config.mc_samples * jumps % 1  # u_j = (j + U) / k: values of U
    edges = F.pad(jumps.sort(1).values, (1, 0)), F.pad(jumps.sort(1).values, (0, 1), value=1.0)
    middle, length = (edges[0] + edges[1]) / 2, edges[1] - edges[0]  # (B, m + 1)
    free = 1 if config.low_discrepancy else config.mc_samples  # independent uniforms per completion
    for piece in itertools.product(range(middle.shape[1]), repeat=free):
        probability = length[:, piece].prod(1)
        if (probability > 0).any():
            with replaced("uniforms", lambda shape, generator, piece=piece: middle[:, piece]):
                yield probability, *agrpo.sample_timesteps(run, config, None)


def agrpo_estimator(model, run, p, advantages, config, reference=None):
    """E[g]: m times the ascent gradient that accumulate_gradient adds, averaged over trajectories (p) and draws."""
    # The gradient is a weighted sum over slots, so all outcomes can stand side by side in one draw of many slots. The
    # mean over the B rows becomes the expectation over trajectories when row tau is weighed by B p(tau).
    probability, steps, weights = zip(*timestep_draws(run, config))
    weights = [w * (len(p) * p * outcome)[:, None] for w, outcome in zip(weights, probability)]
    with replaced("sample_timesteps", lambda *_: (torch.cat(steps, 1), torch.cat(weights, 1))):
        agrpo.accumulate_gradient(model, run, advantages, config, None, micro_batch=4096, reference=reference)
    return -config.sampling_steps * flat_gradient(model)


def expectation(model, config, reward, estimator=agrpo_estimator, advantage=lambda R, p: R, **options):
    """E[g] over everything random. advantage(R (B,), p (B,)) -> E[A | trajectory] (B,)."""
    run, p, _ = enumerate_rollouts(model, config)
    return estimator(model, run, p, advantage(reward(run.completion_ids), p), config, **options)


def group_advantage(G, scale_by_std=False):
    """E[A | own trajectory] under agrpo.group_advantages with G - 1 other completions: a sum over all reward groups."""

    def advantage(rewards, p):
        values, index = rewards.unique(return_inverse=True)
        p_value = torch.zeros_like(values).index_add(0, index, p)
        groups = torch.tensor(list(itertools.product(range(len(values)), repeat=G)))  # (groups, G) indices
        A_own = agrpo.group_advantages(values[groups].flatten(), G, scale_by_std).view(-1, G)[:, 0]
        p_others = p_value[groups[:, 1:]].prod(1)
        return torch.zeros_like(values).index_add(0, groups[:, 0], A_own * p_others)[index]

    return advantage


def compare(estimate, exact):
    """bias ||E[g] - grad J|| / ||grad J||; what is left of it after the best rescaling of E[g]; cosine; scale."""
    return {
        "bias": ((estimate - exact).norm() / exact.norm()).item(),
        "beyond_scale": ((exact - (exact @ estimate) / (estimate @ estimate) * estimate).norm() / exact.norm()).item(),
        "cosine": F.cosine_similarity(estimate, exact, dim=0).item(),
        "scale": (estimate.norm() / exact.norm()).item(),
    }


# ---------------------------------------------------------------------------------------------- the table


def micro_config(**options):
    """Four tokens, four steps, k = 2, unless told otherwise."""
    return AGRPOConfig(**{"completion_length": 4, "sampling_steps": 4, "mc_samples": 2, "num_generations": 2} | options)


EXACT = {  # what claims to be unbiased, and is
    "every step (k = m)": {"mc_samples": 4},
    "uniform": {"low_discrepancy": False},
    "uniform, low discrepancy (default)": {},
    "entropy": {"importance_sampling": "entropy", "low_discrepancy": False},
    "entropy, low discrepancy": {"importance_sampling": "entropy"},
    "m = 2 steps of two tokens": {"sampling_steps": 2, "mc_samples": 1, "importance_sampling": "entropy"},
    "m = 3 steps for four tokens": {"sampling_steps": 3, "importance_sampling": "entropy"},
    "blocks of two, early stop": {"block_length": 2, "importance_sampling": "entropy"},
    "temperature 0.7, top-k 2": {"temperature": 0.7, "top_k": 2, "importance_sampling": "entropy"},
    "top-k 3, top-p 0.9": {"top_k": 3, "top_p": 0.9, "importance_sampling": "entropy"},
    "left to right": {"unmasking": "left_to_right", "importance_sampling": "entropy"},
}
BIASED = {  # what is offered because the papers have it, under its name
    "horizon last_non_eos": {"horizon": "last_non_eos"},
    "horizon last_non_eos, per-trajectory mean (the paper's)": {
        "horizon": "last_non_eos",
        "normalization": "trajectory",
    },
    "per-trajectory mean, blocks with early stop": {"block_length": 2, "normalization": "trajectory"},
}


def measure(seed, options, advantage=None, levels=None):
    """compare() of one estimator on one random model. Advantage: by default the group mean of G = 2, rescaled by
    G / (G - 1) = 2, which is the leave-one-out baseline."""
    model, config = micro_model(seed), micro_config(**options)

    def reward(ids):
        return micro_reward(ids, seed, levels)

    baseline = advantage or (lambda R, p: 2 * group_advantage(2)(R, p))
    return compare(expectation(model, config, reward, advantage=baseline), exact_gradient(model, config, reward))


def measure_std(seed):
    """Division by the group's standard deviation, G = 4, four-valued rewards."""
    return measure(seed, {"sampling_steps": 2}, group_advantage(4, scale_by_std=True), levels=4)


def measure_kl(seed):
    """The KL term: exact at every visited state, compared with the gradient of KL(p || p_ref) over trajectories."""
    model, reference, config = micro_model(seed), micro_model(seed + 100), micro_config(beta=1.0, mc_samples=4)
    run, _, _ = enumerate_rollouts(model, config)
    with torch.no_grad():
        log_ratio = trajectory_logp(model, run, config) - trajectory_logp(reference, run, config)
    # grad KL = sum_tau grad p(tau) log(p / p_ref), as sum_tau p grad log p = 0: a policy gradient of the log ratio.
    exact = exact_gradient(model, config, lambda ids: log_ratio)
    return compare(-expectation(model, config, torch.zeros_like, reference=reference, advantage=no_advantage), exact)


def no_advantage(rewards, p):
    return torch.zeros_like(p)


def exact_rows():
    return {name: lambda seed, o=options: measure(seed, o) for name, options in EXACT.items()}


def biased_rows():
    rows = {name: lambda seed, o=options: measure(seed, o) for name, options in BIASED.items()}
    rows["group mean, own sample included, G = 4"] = lambda seed: measure(
        seed, {"sampling_steps": 2}, group_advantage(4), levels=4
    )
    rows["group mean / standard deviation, G = 4"] = measure_std
    rows["KL per state (beta), against the trajectory's KL"] = measure_kl
    return rows


def table(seeds, rows):
    """{name: {bias, beyond_scale, cosine, scale}}: medians over random models."""
    measured = {name: [row(seed) for seed in seeds] for name, row in rows.items()}
    return {name: {k: statistics.median(r[k] for r in runs) for k in runs[0]} for name, runs in measured.items()}


def print_table(rows):
    print(f"{'estimator':<58}{'bias':>9}{'beyond scale':>14}{'cosine':>9}{'scale':>8}")
    for name, row in rows.items():
        print(f"{name:<58}{row['bias']:>9.1e}{row['beyond_scale']:>14.1e}{row['cosine']:>9.4f}{row['scale']:>8.3f}")


if __name__ == "__main__":
    print("m E[g] against grad J, medians over 5 random models\n")
    torch.set_num_threads(1)  # tiny tensors
    print_table(table(range(5), exact_rows() | biased_rows()))
