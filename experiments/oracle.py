"""Is the gradient that training follows the policy gradient? Enumerate and see. Fifteen seconds:

    python experiments/oracle.py                                              AGRPO's own estimator
    python experiments/oracle.py agrpo-sa                                     another of variants.py
    python experiments/oracle.py experiments/my_estimate.py:lowest_entropy    yours, or any

A micro model (three words and [MASK], up to four tokens) has so few trajectories that all can be listed, each with its
probability, in float64. Then J = sum_tau p(tau) R(tau) is a plain function that autograd differentiates, and the
expectation of an estimator that draws by agrpo.uniforms is a finite sum: nothing is sampled, no tolerance hides
anything. agrpo.rollout writes the trajectories; a softmax of our own checks them, and is differentiated. Somebody's own
estimator may draw as it likes: it is called on sampled groups, and has an error. What it does between questions is not
seen: there is one.
"""

import argparse
import itertools
import math
import sys
from functools import lru_cache, partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: the project's root
import agrpo
import variants
from agrpo import AGRPOConfig
from experiments.report import print_table
from support.settings import find_algorithm
from tiny_dllm import Config, MaskedDiffusionLM

EOS, A, B, MASK = range(4)  # the whole vocabulary
QUESTION = (A, B, B, MASK, MASK, MASK, MASK)
COMPLETIONS = 64  # of a call on sampled groups


def micro_model(seed, sharpness=1.0):
    """A random float64 model with LLaDA's blocks; its logits are multiplied by `sharpness`."""
    model = MaskedDiffusionLM(Config(4, MASK, EOS, d_model=8, n_layers=1, n_heads=2, mlp_hidden_size=8))
    model = model.double().init_weights(torch.Generator().manual_seed(seed))
    model.model.transformer.ff_out.weight.data *= sharpness
    return model


def micro_judge(blank, seed, levels):
    """judge(questions, ids (B, L)) -> R (B,) of what is written where blank (L,): an arbitrary table of `levels`
    distinct values, drawn once per seed."""
    n, generator = int(blank.sum()), torch.Generator().manual_seed(seed)
    R = (torch.rand(3**n, generator=generator, dtype=torch.float64) * levels).floor() / (levels - 1)
    return lambda questions, ids: R[(ids[:, blank] * 3 ** torch.arange(n)).sum(1)]


# ---------------------------------------------------------------------------------------- every trajectory
def scripts(n, config, unmasking):
    """All that a rollout can be told to draw: ranks that make the order (S, n), words for every step (m, S, n).
    Under top-k words are places among the k likeliest.
    In random order a position is drawn once, at whichever step; under low confidence a step draws its whole block."""
    steps = [range(first, last) for first, last, _ in agrpo.schedule(n, config)]
    orders, draws = list(itertools.permutations(range(n))), [(slice(None), position) for position in range(n)]
    if unmasking != "random":
        orders, draws = [range(n)], [(t, position) for t, block in enumerate(steps) for position in block]
    words = torch.tensor(list(itertools.product(range(config.top_k or MASK), repeat=len(draws))))
    table = torch.zeros(len(steps), len(words), n, dtype=torch.long)
    for (t, position), column in zip(draws, words.T):
        table[t, :, position] = column
    return torch.tensor(orders).repeat_interleave(len(words), 0), table.repeat(1, len(orders), 1)


def merged(keys, p):
    """Rows of equal keys (N, F) as one: a row of each (D,), which of these every row is (N,), their sums of p (D,)."""
    distinct, index = keys.unique(dim=0, return_inverse=True)
    one = torch.zeros(len(distinct), dtype=torch.long).scatter(0, index, torch.arange(len(index)))
    return one, index, torch.zeros(len(distinct), dtype=p.dtype).index_add(0, index, p)


@torch.no_grad()
def enumerate_trajectories(model, ids, attention_mask, config, unmasking):
    """All trajectories as one Rollout of N rows, p(tau) (N,), p(order) (N,); ids, attention_mask (1, L).
    agrpo.rollout runs every script: where it asks for uniforms it gets the ranks, then the words. Scripts of which an
    early stop left a part unused give equal rows. The share count / S of the scripts that give a row is p(order) times
    the chance of its words if they were drawn evenly, 1/3 (1/k under top-k) at every draw."""
    order, words = scripts(int((ids == MASK).sum()), config, unmasking)
    numbers, (ids, attention_mask) = iter([order, *words]), (x.expand(len(order), -1) for x in (ids, attention_mask))
    with patch.multiple(agrpo, uniforms=lambda *_: next(numbers).double(), inverse_cdf=lambda p, u: u.long()):
        run = variants.ROLLOUTS[unmasking](model, ids, attention_mask, config, None)
    draws, logp, drawn = 0, torch.zeros(len(order), dtype=torch.float64), [run.ids, run.unmask_step]
    for t in range(run.sampling_steps):
        positions, tokens, logprobs = run.action_at(torch.full_like(run.steps_taken, t))
        drawn.append(torch.full_like(run.ids, -1).masked_scatter(positions, tokens))
        draws = draws + positions.sum(1)
        logp = logp + torch.zeros_like(run.logprobs).masked_scatter(positions, logprobs).sum(1)
    one, _, count = merged(torch.cat(drawn, 1), torch.ones_like(logp))
    order_p = count / len(order) * (config.top_k or MASK) ** draws[one]
    p = order_p * logp[one].exp()
    return run[one[p > 0]], p[p > 0], order_p[p > 0]  # top-k and top-p make some impossible


def trajectory_logp(model, run, config):
    """log p(everything drawn | order) (N,), differentiable, with a softmax of its own.
    Under low confidence which tokens are kept is held fixed: where the ranking does not tie, it does not move."""
    log_p = torch.zeros(len(run.ids), dtype=torch.float64)
    for t in range(run.sampling_steps):
        logits = model(run.ids.where(run.unmask_step < t, MASK), run.attention_mask)  # (N, L, V)
        logits = logits[..., :MASK] / config.temperature  # MASK is the last word
        if config.top_k:
            logits = logits.masked_fill(logits < logits.topk(config.top_k).values[..., -1:], -math.inf)
        if config.top_p < 1:  # drop a word if the words above it already reach p
            p = logits.softmax(-1)
            above = (p[..., None, :] * (p[..., None, :] > p[..., :, None])).sum(-1)
            logits = logits.masked_fill(above >= config.top_p, -math.inf)
        drawn = run.drawn_ids[:, t] if hasattr(run, "drawn_ids") else run.ids.where(run.unmask_step == t, -1)
        token_logp = logits.log_softmax(-1).gather(2, drawn.clamp(min=0)[..., None]).squeeze(2)  # (N, L)
        log_p = log_p + token_logp.where(drawn >= 0, 0).sum(1)
    return log_p


def exact_gradient(model, run, order_p, config, rewards):
    """grad J by autograd through J = sum_tau p(tau) R(tau), rewards (N,). (parameters,)"""
    p = order_p * trajectory_logp(model, run, config).exp()
    assert abs(p.sum().item() - 1) < 1e-12, "the trajectories do not exhaust the probability"
    (p * rewards).sum().backward()
    return flat_gradient(model)


def flat_gradient(model):
    """What has been accumulated in .grad as one vector; clears it."""
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])
    model.zero_grad()
    return flat


class Problem:
    """One random model under one policy: all its trajectories, and the gradient to be estimated. world: another model
    and judge than those of the seed."""

    def __init__(
        self, seed, sharpness=1.0, levels=3, ids=QUESTION, attended=None, unmasking="random", world=None, **policy
    ):
        blank = torch.tensor(ids) == MASK
        self.model, judge = world or (micro_model(seed, sharpness), micro_judge(blank, seed, levels))
        self.config = AGRPOConfig(**{"sampling_steps": 4, "mc_samples": 2, "num_generations": 2} | policy)
        ids, mask = torch.tensor([ids]), torch.tensor([attended or [1] * len(ids)]).bool()  # (1, L)
        greedy = variants.GreedyCompletions(self.model)
        self.run, self.p, self.order_p = enumerate_trajectories(greedy, ids, mask, self.config, unmasking)  # N; (N,)
        self.rewards = judge(None, self.run.ids)  # R (N,)
        self.step_rewards = greedy.step_rewards(self.run, judge, G=1)(self.p > 0)  # r_t (N, m)
        self.gradient = exact_gradient(self.model, self.run, self.order_p, self.config, self.rewards)  # (parameters,)

    def estimate(self, estimate, rows, config, generator=None):
        """The two tables (B, m) of an estimator for a batch of trajectories: rows (B,), in groups of G."""
        R, r, generator = self.rewards[rows], self.step_rewards[rows], generator or torch.Generator()
        return estimate(self.run[rows], R, config, generator, lambda wanted: r * wanted[:, None])

    def follow(self, advantages, weights, rows=slice(None), accumulate=agrpo.accumulate_gradient, **more):
        """m times the ascent gradient (parameters,) that agrpo.accumulate_gradient adds for a batch of trajectories."""
        tables = {"advantages": advantages, "weights": weights, "config": self.config, "micro_batch": 4096}
        accumulate(self.model, self.run[rows], **tables | more)
        return -self.run.sampling_steps * flat_gradient(self.model)

    def expected(self, table, **more):
        """m E[g] (parameters,): table (N, m) is p E[A w] of every trajectory and step."""
        return self.follow(table, torch.full_like(table, len(table)), **more)  # undoes the mean over rows


problem = lru_cache(maxsize=20)(Problem)  # many rows of a table look at the same one


# ------------------------------------------------------------------------------- expectation of an estimator
def spread(rows, k, generator):
    """In place of variants.stratified_over_batch, whose draws know each other: one uniform per completion."""
    return (torch.arange(k) + agrpo.uniforms((rows, 1), generator)) / k


@patch.object(variants, "stratified_over_batch", spread)
def outcomes(call):
    """Every outcome of what `call`, which returns two tables, draws: [(probability (B,), A, w (B, m))].
    Weights are piecewise constant in the uniforms U, with jumps where a draw u meets the cumulative q of its row, or
    where an end of the p meets the comb that a batch shares. One U in the middle of each piece stands for it, and its
    length is its probability. Rows that draw for themselves go through their pieces side by side."""
    with (
        patch.object(agrpo, "uniforms", side_effect=lambda shape, _: torch.zeros(shape, dtype=torch.float64)) as asked,
        patch.object(agrpo, "inverse_cdf", wraps=agrpo.inverse_cdf) as search,
        patch.object(variants, "systematic_draw", wraps=variants.systematic_draw) as comb,
    ):
        tables = call()
    if not asked.called:  # nothing is drawn
        return [(torch.ones(len(tables[0]), dtype=torch.float64), *tables)]
    free = math.prod(asked.call_args.args[0][1:])  # uniforms of each row, or the one of a batch
    if search.called:
        q, u = search.call_args.args
        jumps = q.cumsum(1) * u.shape[1] / free % 1  # low discrepancy: u_j = (j + U) / k
    else:
        jumps = -comb.call_args.args[0].flatten().cumsum(0)[None] % 1
    edges = F.pad(F.pad(jumps.sort(1).values, (1, 0)), (0, 1), value=1.0)  # (B or 1, pieces + 1)
    middle, length, found = (edges[:, 1:] + edges[:, :-1]) / 2, edges.diff(dim=1), []
    for piece in itertools.product(range(middle.shape[1]), repeat=free):
        with patch.object(agrpo, "uniforms", lambda shape, generator, piece=piece: middle[:, piece].reshape(shape)):
            found.append((length[:, piece].prod(1).expand(len(tables[0])), *call()))
    return found


def expected_table(x, estimate, config):
    """p E[A w] (N, m) of every trajectory and step: every group of G trajectories is called by itself, and every
    outcome of its draws is taken. All that is assumed: a weight knows no uniforms of other rows but the shared one."""
    table = torch.zeros_like(x.step_rewards)
    for group in itertools.product(range(len(x.p)), repeat=config.num_generations):
        rows = torch.tensor(group)
        for probability, advantages, weights in outcomes(partial(x.estimate, estimate, rows, config)):
            share = x.p[rows].prod() * probability / len(rows)  # (G,)
            table.index_add_(0, rows, share[:, None] * advantages * weights)
    return table


def compare(estimate, exact):
    """bias ||E[g] - grad J|| / ||grad J||; what is left of it after the best rescaling of E[g]; cosine; scale."""
    scale = ((exact @ estimate) / (estimate @ estimate)).clamp(min=0)  # downhill is not uphill rescaled
    return {
        "bias": ((estimate - exact).norm() / exact.norm()).item(),
        "beyond_scale": ((exact - scale * estimate).norm() / exact.norm()).item(),
        "cosine": F.cosine_similarity(estimate, exact, dim=0).item(),
        "scale": (estimate.norm() / exact.norm()).item(),
    }


# ------------------------------------------------------------------------------------ anybody's, by sampling
def sample(x, estimate, calls=500):
    """Gradients (calls, parameters) of batches of sampled groups, as training accumulates them, (G - 1) / G undone."""
    G, generator, found = x.config.num_generations, torch.Generator().manual_seed(0), []
    for _ in range(calls):
        rows = x.p.multinomial(COMPLETIONS, replacement=True, generator=generator)
        advantages, weights = x.estimate(estimate, rows, x.config, generator)
        fits = advantages.shape == weights.shape == (COMPLETIONS, x.run.sampling_steps)
        agrpo.require(fits and (advantages * weights).isfinite().all(), "an estimator returns two finite tables (B, m)")
        found.append(x.follow(advantages, weights, rows) * G / (G - 1))
    return torch.stack(found)


def statistics(g, gradient):
    """Squared bias, squared bias beyond scale, cosine, variance of a completion of g (calls, parameters), relative to
    the gradient. What noise adds to a squared mean on average is taken off: without bias it is 0 on average."""
    g, e = g / gradient.norm(), gradient / gradient.norm()
    mean, along, noise = g.mean(0), g @ e, g.var(0).sum() / len(g)
    across = (mean - along.mean() * e).square().sum() - noise + along.var() / len(g)
    cosine = along.mean() / (along.mean() ** 2 + across).clamp(min=1e-30).sqrt()
    squares = (mean - e).square().sum() - noise, 1 - cosine * cosine.abs()
    return torch.stack([*squares, cosine.clamp(max=1), noise * len(g) * COMPLETIONS])


def with_errors(g, gradient, blocks=20):
    """statistics() with roots of its squares, standard errors (4,), by leaving out each block of calls in turn, and
    whether the two squares are more than 4 errors above 0. An error beside 0 is the least bias that can be seen."""
    value, block = statistics(g, gradient), torch.arange(len(g)) % blocks
    left_out = torch.stack([statistics(g[block != i], gradient) for i in range(blocks)])
    error = ((left_out - left_out.mean(0)).square().sum(0) * (blocks - 1) / blocks).sqrt()  # jackknife
    root, seen = value[:2].clamp(min=0).sqrt(), value[:2] > 4 * error[:2]
    return torch.cat([root, value[2:]]), torch.cat([(root**2 + error[:2]).sqrt() - root, error[2:]]), seen


def measure(name):
    """Print bias, cosine and variance of an estimator on two diffuse and two sharp models, and the verdict."""
    estimate, rows, seen = find_algorithm(name), {}, []
    for seed, sharpness in ((0, 1.0), (1, 1.0), (0, 4.0), (1, 4.0)):
        x = problem(seed, sharpness, block_length=2, num_generations=4)
        *numbers, beyond_noise = with_errors(sample(x, estimate), x.gradient)
        rows[f"model {seed}, logits x {sharpness:g}"] = [f"{v:.3f} +- {e:.3f}" for v, e in zip(*numbers)]
        seen.append(beyond_noise)
    print(f"{name}: n = m = 4 in blocks of two, k = 2, G = 4; 500 calls of {COMPLETIONS} completions for each model")
    print_table(["bias", "beyond scale", "cosine", "variance"], rows)
    length, direction = torch.stack(seen).any(0)
    if direction:
        print("\nbiased: it points elsewhere than the policy gradient, and no learning rate makes up for that")
    else:
        print("\nno bias beyond what these samples can see" + ", up to a factor: learning rate" * bool(length))
    if name in variants.ALGORITHMS:
        x = problem(0, ids=QUESTION[:-2], block_length=1, sampling_steps=2, num_generations=3, mc_samples=1)
        exactly = compare(1.5 * x.expected(expected_table(x, estimate, x.config)), x.gradient)["beyond_scale"]
        print(f"exactly, for two tokens, with every group of three and every draw: {exactly:.1e} beyond scale")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("algorithm", nargs="?", default="agrpo", help="a name of variants.py, or FILE.py:FUNCTION")
    try:
        measure(parser.parse_args(argv).algorithm)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    torch.set_num_threads(1)  # the tensors are tiny
    sys.exit(main())
