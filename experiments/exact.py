"""Is the gradient that training follows the policy gradient? Enumerate and see.

    python experiments/exact.py          prints the table of the README, a minute

A micro model (three words and [MASK], four tokens) has so few trajectories that all of them can be listed, each
with its probability, in float64. Then J = sum_tau p(tau) R(tau) is a plain function that autograd differentiates,
and the expectation of any estimator is a finite sum: nothing is sampled, nothing is averaged, no tolerance hides
anything. So is its variance. To try an estimator of your own, pass a function like `agrpo_estimator` to `measure`.
"""

import itertools
import math
import statistics
import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: the project's root
import agrpo
from agrpo import AGRPOConfig, Rollout
from experiments import contrasts
from tiny_dllm import Config, MaskedDiffusionLM

EOS, A, B, MASK = range(4)  # the whole vocabulary
PROMPT = torch.tensor([[A, B, B]])


def micro_model(seed, sharpness=1.0):
    """A random float64 model with LLaDA's blocks; its logits are multiplied by `sharpness`."""
    model = MaskedDiffusionLM(Config(4, MASK, EOS, d_model=8, n_layers=1, n_heads=2, mlp_hidden_size=8))
    model = model.double().init_weights(torch.Generator().manual_seed(seed))
    model.model.transformer.ff_out.weight.data *= sharpness
    return model


def micro_config(**options):
    """Four tokens, four steps, k = 2, unless told otherwise."""
    return AGRPOConfig(**{"completion_length": 4, "sampling_steps": 4, "mc_samples": 2, "num_generations": 2} | options)


def micro_reward(completion_ids, seed, levels=None):
    """R (B,) of completions (B, n): an arbitrary table, drawn once per seed; with `levels` distinct values if given."""
    table = torch.rand(3 ** completion_ids.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if levels:
        table = (table * levels).floor() / (levels - 1)
    return table[(completion_ids * 3 ** torch.arange(completion_ids.shape[1])).sum(1)]


@contextmanager
def replaced(name, value):
    """agrpo.<name> is `value` inside the block: this is how enumerated numbers take the place of random ones."""
    original = getattr(agrpo, name)
    setattr(agrpo, name, value)
    try:
        yield
    finally:
        setattr(agrpo, name, original)


# ------------------------------------------------------------------------------------------- enumeration


@torch.no_grad()
def enumerate_rollouts(model, config):
    """All trajectories as one Rollout of B rows; p(tau) (B,); p(order) (B,).

    Written by agrpo's own write_step and stop_early; where they would draw a token, the row branches into all."""
    run = agrpo.empty_rollout(model, PROMPT, torch.ones_like(PROMPT).bool(), config, torch.Generator())
    order_p, running = torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.bool)
    length, steps = config.completion_length // config.blocks, config.sampling_steps // config.blocks
    for t in range(config.sampling_steps):
        block = slice(t // steps * length, t // steps * length + length)
        if t % steps == 0:
            run, order_p, running = branch_orders(run, order_p, running, t, block, config)
        run, order_p, running = branch_draws(model, run, order_p, running, t, block, config)
    drawn = run.logprobs if run.drawn_ids is None else run.drawn_logprobs.flatten(1)
    return run, order_p * drawn.sum(1).exp(), order_p


def branch(run, order_p, running, choices):
    """Every running row `choices` times, neighbours of each other; the stopped ones once."""
    index = torch.arange(len(running)).repeat_interleave(torch.where(running, choices, 1))
    return run[index], order_p[index], running[index]


def branch_orders(run, order_p, running, t, block, config):
    """Before the block that begins with step t: some rows stop, each of the others branches into all orders."""
    if t > 0:
        going = running.nonzero()[:, 0]
        going = agrpo.stop_early(run, going, block.start, 2 * block.start - block.stop, config.sampling_steps)
        running = torch.zeros_like(running).index_fill(0, going, True)
    slots = [s for s in range(t, t + config.sampling_steps // config.blocks) for _ in range(config.tokens_per_step[s])]
    orders = {
        "random": lambda: sorted(set(itertools.permutations(slots))),
        "left_to_right": lambda: [slots],
        "low_confidence": lambda: [[config.sampling_steps] * len(slots)],  # decided step by step
    }[config.unmasking]()
    parents = int(running.sum())
    run, order_p, running = branch(run, order_p, running, len(orders))
    run.unmask_step[running, block] = torch.tensor(orders).repeat(parents, 1)
    return run, order_p.where(~running, order_p / len(orders)), running


def branch_draws(model, run, order_p, running, t, block, config):
    """One denoising step: every running row branches into all that it may draw."""
    row = run[running.nonzero()[:1, 0]]  # all rows draw as many tokens as this one
    drawn = row.completion_ids[:, block] == MASK if config.unmasking == "low_confidence" else row.unmask_step == t
    draws = torch.tensor(list(itertools.product(range(config.top_k or 3), repeat=int(drawn.sum()))))  # indices
    parents = int(running.sum())
    run, order_p, running = branch(run, order_p, running, len(draws))
    with replaced("inverse_cdf", lambda p, u: draws.repeat(parents, 1).view(-1, 1)):
        unused = torch.zeros(run.completion_ids.shape)
        agrpo.write_step(model, run, running.nonzero()[:, 0], t, block, config, unused)
    possible = (run.completion_ids >= 0).all(1)  # top-p leaves slots of its support unused
    return run[possible], order_p[possible], running[possible]


def trajectory_logp(model, run, config):
    """log p(everything drawn | order) (B,), differentiable, with a softmax of its own: the oracle's half.

    Under low confidence which tokens are kept is held fixed: where the ranking does not tie, it does not move."""
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
        written = run.completion_ids.where(run.unmask_step == t, -1)
        drawn = written if run.drawn_ids is None else run.drawn_ids[:, t]  # (B, n), -1: nothing
        token_logp = logits.log_softmax(-1).gather(2, drawn.clamp(min=0)[..., None]).squeeze(2)
        log_p = log_p + token_logp.where(drawn >= 0, 0).sum(1)
    return log_p


def exact_gradient(model, run, order_p, config, rewards):
    """grad J by autograd through J = sum_tau p(tau) R(tau), rewards (B,). (parameters,)"""
    p = order_p * trajectory_logp(model, run, config).exp()
    assert abs(p.sum().item() - 1) < 1e-12, "the trajectories do not exhaust the probability"
    return flat_gradient(model, (p * rewards).sum())


def flat_gradient(model, loss=None):
    """Gradient of `loss` (or what has been accumulated in .grad) as one vector; clears .grad."""
    if loss is not None:
        loss.backward()
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])
    model.zero_grad()
    return flat


POLICY = (  # the settings that a Problem depends on: the policy, and the reward r_t of greedy completions
    "completion_length",
    "sampling_steps",
    "block_length",
    "unmasking",
    "temperature",
    "top_k",
    "top_p",
    "step_baseline",
    "step_coefficient",
    "num_generations",
)


@dataclass
class Problem:
    """One random model under one policy: all its trajectories, their rewards, and the gradient to be estimated."""

    model: MaskedDiffusionLM
    config: AGRPOConfig  # the half that it depends on; the estimator's is at its defaults
    run: Rollout  # B trajectories
    p: torch.Tensor  # (B,)
    order_p: torch.Tensor  # (B,)
    rewards: torch.Tensor  # (B,) R
    step_rewards: torch.Tensor | None  # (B, m) r_t
    gradient: torch.Tensor  # (parameters,) grad J

    @cached_property
    def scores(self):
        return scores(self.model, self.run, self.config)


@lru_cache(maxsize=20)
def problem(seed, sharpness=1.0, levels=3, **policy):
    """The Problem of a seed; rewards with `levels` values. Many estimators look at the same one: kept."""
    model, config = micro_model(seed, sharpness), micro_config(**policy)
    run, p, order_p = enumerate_rollouts(model, config)
    rewards, r = micro_reward(run.completion_ids, seed, levels), None
    if run.greedy_ids is not None:
        r = micro_reward(run.greedy_ids.flatten(0, 1), seed, levels).view(len(p), -1)
    return Problem(model, config, run, p, order_p, rewards, r, exact_gradient(model, run, order_p, config, rewards))


# ------------------------------------------------------------------------------- expectation of an estimator


def timestep_draws(run, config):
    """Every outcome of agrpo.sample_timesteps: (probability (B,), steps (B, k), weights (B, k)).

    The steps are piecewise constant in the uniforms, with jumps where u meets the cumulative sum of q: one point in
    the middle of each piece stands for the whole piece, and its length is its probability.
    """
    jumps = agrpo.proposal(run, config).cumsum(1)  # (B, m) values of u
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


def unweighted_draws(run, config):
    """The same without importance weights: every drawn step counts as in a uniform draw."""
    T = agrpo.horizon_of(run, config)[:, None].double()  # (B, 1)
    for probability, steps, weights in timestep_draws(run, config):
        yield probability, steps, (T / (config.sampling_steps * config.mc_samples)).expand_as(weights)


def expected_draw(chances, draw):
    """E[draw(chances, U)] over its one uniform U, piece by piece like timestep_draws; draw is agrpo.systematic_draw."""
    jumps = (-chances.flatten().cumsum(0) % 1).sort().values  # where an end meets an integer - U
    pieces = zip(F.pad(jumps, (1, 0)), F.pad(jumps, (0, 1), value=1.0))
    return sum((high - low) * draw(chances, (low + high) / 2) for low, high in pieces)


def agrpo_estimator(model, run, p, advantages, config, reference=None, draws=timestep_draws):
    """E[g]: m times the ascent gradient that accumulate_gradient adds, averaged over trajectories (p) and draws."""
    # The gradient is a weighted sum over slots, so all outcomes can stand side by side in one draw of many slots. The
    # mean over the B rows becomes the expectation over trajectories when row tau is weighed by B p(tau).
    probability, steps, weights = zip(*draws(run, config))
    weights = [w * (len(p) * p * outcome)[:, None] for w, outcome in zip(weights, probability)]
    with replaced("sample_timesteps", lambda *_: (torch.cat(steps, 1), torch.cat(weights, 1))):
        agrpo.accumulate_gradient(model, run, advantages, config, None, micro_batch=4096, reference=reference)
    return -config.sampling_steps * flat_gradient(model)


def slot_by_slot(model, run, p, returns, config):
    """The returns (B, m) minus one mean per slot j of the draw, as EGSPO's code has it (there over the group, which
    costs scale besides). Which steps fall into a slot depends on the trajectory, so the means do not cancel."""
    return agrpo_estimator(model, run, p, torch.ones_like(returns), config, draws=partial(slot_draws, p, returns))


def slot_draws(p, returns, run, config):
    """timestep_draws whose weights carry the return minus the mean of its slot."""
    outcomes = list(timestep_draws(run, config))
    means = sum((p * outcome) @ returns.gather(1, steps) for outcome, steps, _ in outcomes)  # (k,)
    return [(outcome, steps, weights * (returns.gather(1, steps) - means)) for outcome, steps, weights in outcomes]


def allocated(model, run, p, advantages, config):
    """All trajectories side by side as one batch, among which the timesteps are allocated; each then weighs B p."""
    draw = agrpo.systematic_draw
    with replaced("systematic_draw", lambda chances, U: expected_draw(chances, draw) * (len(p) * p)[:, None]):
        agrpo.accumulate_gradient(model, run, advantages, config, torch.Generator(), micro_batch=4096)
    return -config.sampling_steps * flat_gradient(model)


def kept_tokens_alone(model, run, p, advantages, config):
    """Low confidence as the official code scores it: the action is what was kept, the rest of the draw is forgotten."""
    return agrpo_estimator(model, forget_the_rest(run), p, advantages, replace(config, unmasking="random"))


def forget_the_rest(run):
    return replace(run, drawn_ids=None, drawn_logprobs=None, drawn_entropy=None)


def likelihood_estimator(model, run, p, advantages, config, masks, weights):
    """E[g] of contrasts.likelihood_gradient: masks (M, n) bool, weights (M,) times the probability of each mask."""
    row = torch.arange(len(p)).repeat_interleave(len(masks))
    weights = (p[:, None] * weights).flatten() * len(row) / config.sampling_steps  # the mean over rows undone
    masked = masks.repeat(len(p), 1)
    contrasts.likelihood_gradient(model, run[row], advantages[row], masked, weights, config, micro_batch=4096)
    return -config.sampling_steps * flat_gradient(model)


def diffu_grpo(model, run, p, advantages, config):
    """E[g] of contrasts.diffu_grpo."""
    masks, chances, weights = one_mask(config.completion_length)
    return likelihood_estimator(model, run, p, advantages, config, masks, chances * weights)


def one_mask(n):
    """diffu-GRPO's masks (1, n), their probabilities and weights (1,)."""
    return torch.ones(1, n, dtype=torch.bool), torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)


def elbo(model, run, p, advantages, config):
    """E[g] of contrasts.elbo."""
    masks, chances, weights = random_masks(config.completion_length)
    return likelihood_estimator(model, run, p, advantages, config, masks, chances * weights)


def random_masks(n):
    """ELBO's masks (M, n), their probabilities 1 / (n C(n, l)) and weights n / l (M,), l the number of positions."""
    masks = torch.tensor(list(itertools.product((False, True), repeat=n))[1:])
    size = masks.sum(1)
    ways = torch.tensor([math.comb(n, hidden) for hidden in size.tolist()], dtype=torch.float64)
    return masks, 1 / (n * ways), n / size.double()


def compare(estimate, exact):
    """bias ||E[g] - grad J|| / ||grad J||; what is left of it after the best rescaling of E[g]; cosine; scale."""
    return {
        "bias": ((estimate - exact).norm() / exact.norm()).item(),
        "beyond_scale": ((exact - (exact @ estimate) / (estimate @ estimate) * estimate).norm() / exact.norm()).item(),
        "cosine": F.cosine_similarity(estimate, exact, dim=0).item(),
        "scale": (estimate.norm() / exact.norm()).item(),
    }


# ------------------------------------------------------------------- expected advantages: E[A | own trajectory]


def over_groups(advantages_of, facts, p, G):
    """E[A | own] (B, m): advantages_of maps the facts (groups x G, F) of whole groups to (groups x G, m).

    facts (B, F): all that the advantages look at. Every group is tried, the own facts first, equal ones taken together.
    """
    distinct, index = facts.unique(dim=0, return_inverse=True)
    p_distinct = torch.zeros(len(distinct), dtype=p.dtype).index_add(0, index, p)
    total = 0
    for group in torch.cartesian_prod(*[torch.arange(len(distinct))] * G).split(2**15):  # (groups, G) indices
        own = advantages_of(distinct[group].flatten(0, 1)).unflatten(0, (-1, G))[:, 0]  # (groups, m)
        share = own * p_distinct[group[:, 1:]].prod(1)[:, None]
        total = total + torch.zeros(len(distinct), own.shape[1], dtype=p.dtype).index_add(0, group[:, 0], share)
    return total[index]


def group_mean(x, G, scale_by_std=False):
    """agrpo.group_advantages: (B,)."""

    def of_groups(facts):
        return agrpo.group_advantages(facts[:, 0], G, scale_by_std)[:, None]

    return over_groups(of_groups, x.rewards[:, None], x.p, G)[:, 0]


def leave_one_out(x):
    """The group mean of G = 2, rescaled by G / (G - 1): the advantage of most rows."""
    return 2 * group_mean(x, 2)


def stepwise(x, gate=False, G=3):
    """agrpo.stepwise_advantages, rescaled by G / (G - 1)."""

    def of_groups(facts):
        c = agrpo.step_coefficients(x.config)
        return agrpo.stepwise_advantages(facts[:, 0], facts[:, 2:], facts[:, 1], G, c, gate)

    facts = torch.cat([x.rewards[:, None], x.run.steps_taken[:, None], x.step_rewards], 1)
    return over_groups(of_groups, facts, x.p, G) * G / (G - 1)


gated = partial(stepwise, gate=True)


def returns(x):
    """R - c r_t (B, m), nothing subtracted."""
    return x.rewards[:, None] - agrpo.step_coefficients(x.config) * x.step_rewards


def pooled(x, G=3):
    """R - c r_t minus the mean over the group and all its steps, the completion's own steps included."""
    executed = torch.arange(x.config.sampling_steps) < x.run.steps_taken[:, None]
    own = (returns(x) * executed).sum(1) / x.run.steps_taken
    return returns(x) - ((own + (G - 1) * (x.p @ own)) / G)[:, None]


# ---------------------------------------------------------------------------------------------- variance


def scores(model, run, config):
    """S (B, m, parameters): grad log pi(a_t | s_t), one backward pass per distinct state and action."""
    batch, n, m = len(run.steps_taken), config.completion_length, config.sampling_steps
    t, part = torch.arange(m).repeat(batch), run[torch.arange(batch).repeat_interleave(m)]
    chosen, tokens, _ = part.action_at(t)
    keys = [part.state_at(t), tokens.where(chosen, -1)]
    if config.top_k:
        keys.append(part.support_ids.where(chosen[..., None], 0).flatten(1))
    keys, index = torch.cat(keys, 1).unique(dim=0, return_inverse=True)

    def logp(parameters, key):  # of one state and action; `positions` would not vmap
        ids, tokens, support = key[:-n], key[-n:], None
        if config.top_k:
            ids, tokens, support = key.split([PROMPT.shape[1] + n, n, n * config.top_k])
            support = support.view(n, -1)
        logits = torch.func.functional_call(model, parameters, (ids[None],))[0, PROMPT.shape[1] :]  # (n, V)
        distribution = agrpo.token_logprobs(logits, MASK, config.temperature, support)
        return agrpo.logprob_of(tokens.clamp(min=0), distribution, support).where(tokens >= 0, 0).sum()

    with sdpa_kernel(SDPBackend.MATH):  # the one that vmaps
        gradients = torch.func.vmap(torch.func.grad(logp), (None, 0))(dict(model.named_parameters()), keys)
    return torch.cat([g.detach().flatten(1) for g in gradients.values()], 1)[index].view(batch, m, -1)


def moments(run, p, S, advantages, config, draws=timestep_draws):
    """E[g] (parameters,) and E||g||^2 of one completion: g = m sum_j w_j A_(t_j) S_(t_j). advantages (B,) or (B, m)."""
    gram, first, second = S @ S.transpose(1, 2), 0, 0  # (B, m, m)
    for outcome, steps, weights in draws(run, config):
        w = torch.zeros(S.shape[:2], dtype=S.dtype).scatter_add(1, steps, config.sampling_steps * weights)
        w = w * advantages.reshape(len(p), -1)  # (B, m): g = sum_t w_t S_t
        first = first + w * (p * outcome)[:, None]
        second = second + p * outcome @ torch.einsum("bs,bst,bt->b", w, gram, w)
    return torch.einsum("bt,btd->d", first, S), second


def variance(mean, square, gradient):
    """(E||g||^2 - ||E g||^2) / ||grad J||^2 of one completion, its advantage with the baseline at its expectation.

    The variance that a baseline estimated from few others adds is not in it."""
    return ((square - mean @ mean) / (gradient @ gradient)).item()


def slot_moments(x, returns, config):
    return moments(x.run, x.p, x.scores, torch.ones_like(returns), config, partial(slot_draws, x.p, returns))


def kept_moments(x, A, config):
    run, config = forget_the_rest(x.run), replace(config, unmasking="random")
    return moments(run, x.p, scores(x.model, run, config), A, config)


def allocated_moments(x, A, config):
    """k = 1, of a completion that is a batch of its own: its steps compete with each other alone."""
    m = config.sampling_steps
    A = A.reshape(len(x.p), -1).expand(-1, m)
    alone = [agrpo.batch_proposal(x.run[i : i + 1], A[i : i + 1], config) for i in range(len(x.p))]
    chance = torch.cat([agrpo.inclusion_probabilities(q, total=1) for q in alone])  # (B, m), sum 1, or 0 without A

    def draws(run, config):
        for t in range(m):
            weight = 1 / (m * chance[:, t].where(chance[:, t] > 0, torch.inf))
            yield chance[:, t], torch.full((len(chance), 1), t), weight[:, None]

    return moments(x.run, x.p, x.scores, A, config, draws)


def likelihood_moments(masks_of, x, A, config):
    """Of A times the mean of w grad log p(masked tokens | the others) over k masks, drawn independently."""
    masks, chances, weights = masks_of(config.completion_length)
    k = 1 if len(masks) == 1 else config.mc_samples
    at_once = replace(config, sampling_steps=1)  # a mask is a state: what it hides is written at 0, the rest before
    S = []
    for mask, weight in zip(masks, weights):
        run = replace(x.run, unmask_step=torch.where(mask, 0, -1).expand_as(x.run.unmask_step))
        S.append(weight * A[:, None] * scores(x.model, run, at_once)[:, 0])  # (B, parameters)
    S = torch.stack(S)  # (M, B, parameters)
    mean, square = torch.einsum("a,abd->bd", chances, S), chances @ S.square().sum(2)
    return x.p @ mean, x.p @ (square / k + (1 - 1 / k) * mean.square().sum(1))


def largest_weight(run, config, draws=timestep_draws):
    """Of one drawn step, in units of the full sum's: 1 / (k q_t)."""
    largest = (w[outcome > 0].max().item() for outcome, _, w in draws(run, config))
    return config.sampling_steps * max(largest)


# ---------------------------------------------------------------------------------------------- the table


def measure(
    seed, options, advantage=leave_one_out, estimator=None, of=None, draws=timestep_draws, levels=3, sharpness=1.0
):
    """compare() of one estimator on one random model, its variance, and of agrpo's own the largest weight.

    options of AGRPOConfig; advantage(Problem) -> E[A | own trajectory] (B,) or (B, m). An estimator that is not agrpo's
    own has its variance by of(Problem, A, config) -> (E[g], E||g||^2)."""
    x = problem(seed, sharpness, levels, **{k: v for k, v in options.items() if k in POLICY})
    config, A = replace(x.config, **options), advantage(x)
    if estimator:
        known = {"variance": variance(*of(x, A, config), x.gradient)} if of else {}
        return compare(estimator(x.model, x.run, x.p, A, config), x.gradient) | UNKNOWN | known
    return compare(agrpo_estimator(x.model, x.run, x.p, A, config, draws=draws), x.gradient) | {
        "variance": variance(*moments(x.run, x.p, x.scores, A, config, draws), x.gradient),
        "largest_weight": largest_weight(x.run, config, draws),
    }


UNKNOWN = {"variance": None, "largest_weight": None}


def measure_kl(seed, sharpness=1.0):
    """The KL term: exact at every visited state, compared with the gradient of KL(p || p_ref) over trajectories."""
    x, reference = problem(seed, sharpness), micro_model(seed + 100, sharpness)
    with torch.no_grad():
        log_ratio = trajectory_logp(x.model, x.run, x.config) - trajectory_logp(reference, x.run, x.config)
    # grad KL = sum_tau grad p(tau) log(p / p_ref), as sum_tau p grad log p = 0: a policy gradient of the log ratio.
    exact = exact_gradient(x.model, x.run, x.order_p, x.config, log_ratio)
    config = replace(x.config, beta=1.0, mc_samples=4)
    estimate = agrpo_estimator(x.model, x.run, x.p, torch.zeros_like(x.p), config, reference=reference)
    return compare(-estimate, exact) | UNKNOWN


def measure_entropy(seed, sharpness=1.0):
    """The entropy bonus: exact at every visited state, compared with the gradient of the trajectories' entropy."""
    x = problem(seed, sharpness)
    with torch.no_grad():
        surprise = -trajectory_logp(x.model, x.run, x.config)  # its expectation is the entropy
    exact = exact_gradient(x.model, x.run, x.order_p, x.config, surprise)
    config = replace(x.config, entropy_bonus=1.0, mc_samples=4)
    return compare(agrpo_estimator(x.model, x.run, x.p, torch.zeros_like(x.p), config), exact) | UNKNOWN


def row(options, **how):
    """A line of the table: (seed, sharpness) -> what measure() says."""
    return lambda seed, sharpness=1.0: measure(seed, options, sharpness=sharpness, **how)


ENTROPY = {"importance_sampling": "entropy"}
TOP = {"importance_sampling": "top_entropy"}
STEP = ENTROPY | {"step_baseline": "constant", "step_coefficient": 0.5}
RAMP = ENTROPY | {"step_baseline": "ramp", "num_generations": 3}
BLOCKS = {"block_length": 2}
CONFIDENT = {"unmasking": "low_confidence", "sampling_steps": 2}
BATCH = {"allocation": "batch", "mc_samples": 1}
THREE = {"completion_length": 3, "sampling_steps": 3}
EXACT = {  # what claims to be unbiased, and is
    "every step (k = m)": row({"mc_samples": 4}),
    "uniform": row({"low_discrepancy": False}),
    "uniform, low discrepancy (default)": row({}),
    "entropy": row(ENTROPY | {"low_discrepancy": False}),
    "entropy, low discrepancy": row(ENTROPY),
    "entropy, a third uniform": row(ENTROPY | {"uniform_share": 1 / 3, "low_discrepancy": False}),
    "entropy, a third uniform, low discrepancy": row(ENTROPY | {"uniform_share": 1 / 3}),
    "m = 2 steps of two tokens": row(ENTROPY | {"sampling_steps": 2, "mc_samples": 1}),
    "m = 3 steps for four tokens": row(ENTROPY | {"sampling_steps": 3}),
    "blocks of two, early stop": row(ENTROPY | BLOCKS),
    "temperature 0.7, top-k 2": row(ENTROPY | {"temperature": 0.7, "top_k": 2}),
    "top-k 3, top-p 0.7": row(ENTROPY | {"top_k": 3, "top_p": 0.7}),
    "left to right": row(ENTROPY | {"unmasking": "left_to_right"}),
    "left to right, k = m = n (JustGRPO)": row({"unmasking": "left_to_right", "mc_samples": 4}),
    "allocated over the batch": row(ENTROPY | THREE | BATCH, estimator=allocated, of=allocated_moments),
    "allocated over the batch, r_t ramp gated (agrpo-sa)": row(
        RAMP | THREE | BATCH, advantage=gated, estimator=allocated, of=allocated_moments
    ),
    "allocated over the batch, a third uniform, r_t": row(
        RAMP | THREE | BATCH | {"uniform_share": 1 / 3}, advantage=gated, estimator=allocated, of=allocated_moments
    ),
    "r_t, G = 3": row(STEP, advantage=stepwise),
    "r_t gated, G = 3": row(STEP, advantage=gated),
    "r_t ramp gated, G = 3": row(RAMP, advantage=gated),
    "r_t, G = 3, blocks of two, early stop": row(STEP | BLOCKS, advantage=stepwise),
    "r_t ramp gated, G = 3, blocks of two, early stop": row(RAMP | BLOCKS, advantage=gated),
    "low confidence, every step": row(CONFIDENT),
    "low confidence, uniform": row(CONFIDENT | {"mc_samples": 1}),
    "low confidence, entropy": row(CONFIDENT | ENTROPY | {"mc_samples": 1}),
    "low confidence, three tokens one by one, entropy": row(CONFIDENT | ENTROPY | THREE),
    "low confidence, temperature 0.7, entropy": row(CONFIDENT | ENTROPY | {"mc_samples": 1, "temperature": 0.7}),
    "low confidence, blocks of two, early stop, entropy": row(CONFIDENT | ENTROPY | BLOCKS | {"sampling_steps": 4}),
    "low confidence, entropy, a third uniform, r_t ramp gated": row(
        CONFIDENT | RAMP | {"mc_samples": 1, "uniform_share": 1 / 3}, advantage=gated
    ),
}
BIASED = {  # what the papers and their code have, under its name, and what one might try
    "horizon last_non_eos": row({"horizon": "last_non_eos"}),
    "horizon last_non_eos, per-trajectory mean (the paper's)": row(
        {"horizon": "last_non_eos", "normalization": "trajectory"}
    ),
    "per-trajectory mean, blocks with early stop": row(BLOCKS | {"normalization": "trajectory"}),
    "group mean, own sample included, G = 4": row({"sampling_steps": 2}, advantage=partial(group_mean, G=4), levels=4),
    "group mean / standard deviation, G = 4": row(
        {"sampling_steps": 2}, advantage=partial(group_mean, G=4, scale_by_std=True), levels=4
    ),
    "KL per state (beta), against the trajectory's KL": measure_kl,
    "entropy per state, against the trajectory's entropy": measure_entropy,
    "entropy without importance weights": row(ENTROPY, draws=unweighted_draws),
    "k steps of highest entropy (EGSPO)": row(TOP),
    "k steps of highest entropy, r_t (EGSPO-SA)": row(TOP | {"step_baseline": "constant"}, advantage=stepwise),
    "r_t, a mean per slot of the draw": row(STEP, advantage=returns, estimator=slot_by_slot, of=slot_moments),
    "r_t, a mean per slot, blocks with early stop": row(
        STEP | BLOCKS, advantage=returns, estimator=slot_by_slot, of=slot_moments
    ),
    "r_t, own steps in the mean": row(STEP, advantage=pooled),
    "low confidence, kept tokens alone": row(CONFIDENT, estimator=kept_tokens_alone, of=kept_moments),
    "one pass, all masked (diffu-GRPO)": row({}, estimator=diffu_grpo, of=partial(likelihood_moments, one_mask)),
    "ELBO of random masks (ESPO, BGPO)": row({}, estimator=elbo, of=partial(likelihood_moments, random_masks)),
}


def laboratory_rows(seed, sharpness=1.0):
    """{name: {bias, beyond_scale, cosine, scale, variance, largest_weight, exact}} of every estimator on one model.

    exact is the claim, bias the finding; largest_weight is None where the estimator draws no timesteps or all of a
    batch's, variance where it is of another gradient."""
    return {name: r(seed, sharpness) | {"exact": name in EXACT} for name, r in (EXACT | BIASED).items()}


def median(values):
    """Without nan (a sharp model under top-p may have a single completion and no gradient); None if there are None."""
    return None if None in values else statistics.median([v for v in values if v == v] or [math.nan])


def table(seeds, rows):
    """{name: {bias, beyond_scale, ...}}: medians over random models."""
    measured = [{name: r(seed) for name, r in rows.items()} for seed in seeds]  # model by model: problem() keeps few
    return {name: {k: median([m[name][k] for m in measured]) for k in measured[0][name]} for name in rows}


FORMATS = {"variance": ".2f", "largest_weight": ".3g"}


def print_table(rows):
    print(f"{'estimator':<58}{'bias':>9}{'beyond scale':>14}{'cosine':>9}{'scale':>8}{'variance':>10}{'weight':>9}")
    for name, r in rows.items():
        print(f"{name:<58}{r['bias']:>9.1e}{r['beyond_scale']:>14.1e}{r['cosine']:>9.4f}{r['scale']:>8.3f}", end="")
        print(*(f"{'' if r[key] is None else format(r[key], f):>9}" for key, f in FORMATS.items()))


if __name__ == "__main__":
    print("m E[g] against grad J, medians over 5 random models; the variance of one completion's g over ||grad J||^2\n")
    torch.set_num_threads(1)  # tiny tensors
    print_table(table(range(5), EXACT | BIASED))
