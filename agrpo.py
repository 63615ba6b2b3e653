"""AGRPO: policy gradients for masked diffusion language models, in one file that needs torch alone.

A masked diffusion language model answers a prompt by starting from n [MASK] tokens and filling them in over
m denoising steps. AGRPO (arXiv 2510.04019) reads this as a Markov decision process:

    state s_t     the prompt and the completion as the model sees it before step t: some tokens, some [MASK]
    action a_t    the tokens written at step t, each drawn from the model's distribution at its position
    reward R      one number for the finished completion
    gradient      grad J = E[ A sum_t grad log pi(a_t | s_t) ],    A = R - baseline: how much better than expected

Every log pi(a_t | s_t) is exact and costs one forward pass on s_t. No pass serves two steps, so the full sum
needs m of them; AGRPO draws k of the m steps and weights them so that the expectation stays what it was.

    symbol   meaning                                       name in code                   shape
    o        completion                                    completion_ids                 (B, n)
    n, m     completion length, denoising steps            completion_length, sampling_steps
    t        timestep, 0 .. m - 1                          t, steps                       (B,), (B, k)
    T        horizon: steps t < T enter the gradient       horizon_of                     (B,)
    G, A     completions per prompt, advantage             num_generations, advantages    (B,) or (B, m)
    k        timesteps drawn per completion                mc_samples
    q_t, w   probability of drawing step t, its weight     q, weights                     (B, m), (B, k)
    p_t      chance that the batch takes step t            inclusion_probabilities        (B, m)
    r_t, c   reward of the greedy completion of s_t,       step_rewards,                  (B, m), (m,)
             how much of it is subtracted from R           step_coefficients
    rho      probability ratio, new over old policy        ratio                          (N,)
    eps      its clip                                      epsilon_low, epsilon_high
    H        entropy of the distribution behind a token    entropies                      (B, n)

B completions (prompts x G), P prompt tokens, V words, N positions chosen somewhere in a batch. (The papers
also write q for the prompt; here q is the proposal alone.)

One trajectory: the prompt "3 4 = 7", n = 4 tokens, m = 2 steps of two tokens each, in random order:

    t = 0    state  [MASK] [MASK] [MASK] [MASK]     action: position 1 becomes "+", position 3 becomes <eos>
    t = 1    state  [MASK]   +    [MASK] <eos>      action: position 0 becomes "3", position 2 becomes "4"
    end               3      +      4    <eos>      reward 1; unmask_step = [1, 0, 1, 0]

The state at t masks every position with unmask_step >= t: one integer per token replays the trajectory.

The same lines are other algorithms under other settings: EGSPO takes the k steps of highest entropy (arXiv 2603.12554;
importance_sampling top_entropy), EGSPO-SA also a baseline that looks at the state (step_baseline constant), JustGRPO is
unmasking left_to_right with k = m = n. Ours, agrpo-sa, is unbiased: step_baseline ramp, allocation batch.

Reading order: AGRPOConfig, token_logprobs, Rollout, rollout, group_advantages, sample_timesteps, clipped_objective,
accumulate_gradient; then stepwise_advantages, batch_proposal. A model is any callable (ids, attention_mask=,
positions=) -> logits with the attributes mask_token_id and eos_token_id. Logits exist where a token may be written,
and for step baselines at every [MASK], and nowhere else.
"""

from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F

# ------------------------------------------------------------------------------------------------ settings


@dataclass
class AGRPOConfig:
    """What defines the policy, the estimator and the objective. Raises ValueError on values that cannot work."""

    completion_length: int = 256  # n: tokens of a completion
    sampling_steps: int = 128  # m: denoising steps; each writes n / m tokens in parallel
    block_length: int | None = None  # blocks are finished left to right; None: one block of n
    unmasking: str = "random"  # random | left_to_right | low_confidence: which positions next
    temperature: float = 1.0  # 0 decodes greedily (evaluation only)
    top_k: int | None = None  # choose among this many likeliest tokens; 0: all
    top_p: float = 1.0  # then the fewest whose probability reaches p (needs top_k)
    num_generations: int = 8  # G: completions per prompt
    mc_samples: int = 8  # k: timesteps per completion in an update; k >= T for all takes each step once, exactly
    importance_sampling: str = "uniform"  # uniform | entropy | top_entropy (EGSPO's, biased): how timesteps are drawn
    uniform_share: float = 0.0  # of the entropy proposal, or the batch's, that is uniform: no weight above 1 / share
    low_discrepancy: bool = True  # stratify the k draws within each completion
    horizon: str = "executed"  # executed | last_non_eos (the paper's, biased)
    normalization: str = "constant"  # constant (1/m) | trajectory (1/T, the paper's, biased if T varies)
    epsilon_low: float = 0.2  # the ratio is clipped from below at 1 - epsilon_low
    epsilon_high: float = 0.2  # and from above at 1 + epsilon_high
    beta: float = 0.0  # weight of the KL divergence to a reference model
    entropy_bonus: float = 0.0  # weight of the entropy of the policy at the drawn steps
    allocation: str = "completion"  # completion: k timesteps each | batch: k on average, more where |A_t| is large
    step_baseline: str = "none"  # none | constant (EGSPO-SA's) | ramp (c = t / m): subtract c r_t from the reward
    step_coefficient: float = 1 / 3  # c of the constant step baseline: lambda / (1 + lambda) in the paper

    def __post_init__(self):
        n, m = self.completion_length, self.sampling_steps
        choices = {
            "unmasking": ("random", "left_to_right", "low_confidence"),
            "importance_sampling": ("uniform", "entropy", "top_entropy"),
            "allocation": ("completion", "batch"),
            "step_baseline": ("none", "constant", "ramp"),
            "horizon": ("executed", "last_non_eos"),
            "normalization": ("constant", "trajectory"),
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            require(value in allowed, f"{name} is {value!r}: choose from {', '.join(allowed)}")
        require(n >= 1, f"completion_length is {n}: at least 1")
        block = n if self.block_length is None else self.block_length
        require(block >= 1 and n % block == 0, f"completion_length {n} is not a multiple of block_length {block}")
        require(
            m >= 1 and m % (n // block) == 0,
            f"sampling_steps {m} is not a positive multiple of the {n // block} blocks",
        )
        require(m <= n, f"sampling_steps {m} exceeds completion_length {n}: a step writes at least one token")
        require(self.num_generations >= 2, f"num_generations is {self.num_generations}: a group needs at least 2")
        require(self.mc_samples >= 1, f"mc_samples is {self.mc_samples}: at least 1")
        require(self.temperature >= 0, f"temperature is {self.temperature}: not negative")
        require(self.top_k is None or self.top_k >= 0, f"top_k is {self.top_k}: not negative")
        require(0 < self.top_p <= 1, f"top_p is {self.top_p}: in (0, 1]")
        require(self.top_p == 1 or self.top_k, "top_p needs top_k, which bounds the number of kept ids")
        require(0 <= self.epsilon_low <= 1, f"epsilon_low is {self.epsilon_low}: in [0, 1]")
        require(self.epsilon_high >= 0, f"epsilon_high is {self.epsilon_high}: not negative")
        require(self.beta >= 0, f"beta is {self.beta}: not negative")
        require(self.entropy_bonus >= 0, f"entropy_bonus is {self.entropy_bonus}: not negative")
        require(0 <= self.uniform_share <= 1, f"uniform_share is {self.uniform_share}: in [0, 1]")
        require(0 <= self.step_coefficient <= 1, f"step_coefficient is {self.step_coefficient}: in [0, 1]")
        bounded = self.importance_sampling == "entropy" or self.allocation == "batch"
        require(self.uniform_share == 0 or bounded, "uniform_share needs entropy sampling or allocation batch")
        alone = self.step_baseline == "ramp" and self.num_generations < 3
        require(not alone, "step_baseline ramp needs num_generations 3: with one fellow its gate is always shut")
        if self.allocation == "batch":
            require(self.importance_sampling != "top_entropy", "allocation batch draws: top_entropy does not")
            require(self.low_discrepancy, "allocation batch is always stratified: low_discrepancy")
            covered = self.uniform_share > 0 or (self.beta == 0 and self.entropy_bonus == 0)
            require(covered, "beta and entropy_bonus need uniform_share > 0 under allocation batch: A_t may be 0")

    @property
    def blocks(self):
        """Number of blocks of the completion."""
        return self.completion_length // (self.block_length or self.completion_length)

    @property
    def tokens_per_step(self):
        """How many tokens each of the m steps writes: in a block of b positions and s steps, the first (b mod s)
        steps write one more than the others."""
        length, steps = self.completion_length // self.blocks, self.sampling_steps // self.blocks
        return [length // steps + (t < length % steps) for t in range(steps)] * self.blocks


def require(condition, message):
    if not condition:
        raise ValueError(message)


# ---------------------------------------------------------------------------------------------- the policy


def token_logprobs(logits, mask_token_id, temperature=1.0, support=None):
    """log pi(. | s) at N positions: the only softmax here. Rollout, ratio, entropy and KL all go through it.

    logits (N, V); support (N, S) ids the policy is restricted to (-1: unused slot) or None.
    Returns (N, S), or (N, V) without a support, in float32 or better. [MASK] has probability 0: an answer that
    contains it would not be finished.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    never = torch.finfo(logits.dtype).min  # finite, so that p log p = 0 * never = 0 where -inf would give nan
    if support is None:
        logits = logits.index_fill(-1, torch.tensor(mask_token_id, device=logits.device), never).clamp(min=never)
    else:
        logits = logits.gather(-1, support.clamp(min=0)).masked_fill(support < 0, never)
    return logits.log_softmax(-1)


def kept_ids(logits, mask_token_id, config):
    """Support (N, top_k) of the policy under top-k, then top-p: ids in the order of their logits, then -1.

    top-p keeps the token that crosses p. None without truncation. The set is a constant of the gradient, which is
    exact almost everywhere: the set jumps only where two logits tie at its edge or the mass before a token is p.
    """
    if not config.top_k:
        return None
    logits = logits.index_fill(-1, torch.tensor(mask_token_id, device=logits.device), float("-inf"))
    top, ids = logits.topk(min(config.top_k, logits.shape[-1]))
    ids = ids.masked_fill(top == float("-inf"), -1)
    if config.top_p < 1:
        p = token_logprobs(logits, mask_token_id, config.temperature or 1.0, ids).exp()
        mass_before = F.pad(p.cumsum(-1)[:, :-1], (1, 0))
        ids = ids.masked_fill(mass_before >= config.top_p, -1)
    return F.pad(ids, (0, config.top_k - ids.shape[-1]), value=-1)


def likeliest(logits, mask_token_id):
    """The likeliest token (N,) other than [MASK] at each of N positions."""
    return logits.index_fill(-1, torch.tensor(mask_token_id, device=logits.device), -torch.inf).argmax(-1)


def entropy(logp):
    """H = - sum_v p_v log p_v in nats, over the last dimension."""
    return -(logp.exp() * logp).sum(-1)


def kl_divergence(logp, logp_reference):
    """KL(pi || pi_ref) in nats, summed exactly over the vocabulary (the last dimension) instead of estimated."""
    return (logp.exp() * (logp - logp_reference)).sum(-1)


def uniforms(shape, generator):
    """Float64, for inverse_cdf; on the generator's device, so that a CPU generator gives a GPU the same draws."""
    return torch.rand(shape, dtype=torch.float64, generator=generator, device=generator.device)


def inverse_cdf(p, u):
    """Index i with p_0 + .. + p_(i-1) <= u sum(p) < p_0 + .. + p_i: p (N, S), u (N, k) in [0, 1) -> (N, k).

    In float64: in float32 an entry of about 1e-9 could never be drawn, and u could round up to 1, past the end.
    An entry of probability 0 is never drawn. Raises ValueError if an entry is not finite.
    """
    cumulative = p.double().cumsum(-1)
    require(bool(cumulative[:, -1].isfinite().all()), "probabilities are not finite: the model has diverged")
    u = u.double().clamp(max=1 - 2**-53)  # the largest double below 1: then u * total < total, also after rounding
    return torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)


def logits_at(model, ids, prompt_mask, chosen):
    """Logits (N, V) at the chosen (B, n) completion positions, row by row; no other row of the head is computed."""
    attention_mask = F.pad(prompt_mask, (0, chosen.shape[1]), value=True)  # (B, P + n)
    return model(ids, attention_mask=attention_mask, positions=F.pad(chosen, (prompt_mask.shape[1], 0)))


# --------------------------------------------------------------------------------------------- the rollout


@dataclass
class Rollout:
    """B finished trajectories, stored so that every state and action of them can be read back."""

    prompt_ids: torch.Tensor  # (B, P) long, padded on the left
    prompt_mask: torch.Tensor  # (B, P) bool, False = padding
    completion_ids: torch.Tensor  # (B, n) long
    unmask_step: torch.Tensor  # (B, n) long: the step that wrote the position; m = filled in by the early stop
    logprobs: torch.Tensor  # (B, n): log-probability of each token when it was written, 0 where none was
    entropies: torch.Tensor  # (B, n): entropy of the distribution it was drawn from, 0 where none was
    steps_taken: torch.Tensor  # (B,) long: executed steps; fewer than m after an early stop
    support_ids: torch.Tensor | None = None  # (B, n, top_k) long: kept ids, -1 = unused; None without top_k
    drawn_ids: torch.Tensor | None = None  # (B, m, n) long, low confidence alone: every token drawn, -1 = none
    drawn_logprobs: torch.Tensor | None = None  # (B, m, n): their log-probabilities
    drawn_entropy: torch.Tensor | None = None  # (B, m): the summed entropy of their distributions
    greedy_ids: torch.Tensor | None = None  # (B, m, n) long: each state with its [MASK]s filled by the likeliest tokens
    mask_token_id: int | None = None
    eos_token_id: int | None = None

    def unmasked_at(self, t):
        """(B, n) bool: the positions that step t (B,) writes."""
        return self.unmask_step == t[:, None]

    def action_at(self, t):
        """The action at step t (B,): the positions it draws (B, n) bool, the tokens (B, n), their log-probabilities.

        What is drawn is written, but under low confidence: there the action is all that was drawn, and keeping the
        most confident of it is the environment's answer. The gradient of the kept tokens alone is biased."""
        if self.drawn_ids is None:
            return self.unmasked_at(t), self.completion_ids, self.logprobs
        rows = torch.arange(len(t), device=t.device)
        return self.drawn_ids[rows, t] >= 0, self.drawn_ids[rows, t], self.drawn_logprobs[rows, t]

    def state_at(self, t):
        """(B, P + n) ids that the model saw before step t (B,): what was written at t or later is [MASK]."""
        seen = self.completion_ids.where(self.unmask_step < t[:, None], self.mask_token_id)
        return torch.cat([self.prompt_ids, seen], 1)

    def __getitem__(self, rows):
        """The same, for some of the rows."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Rollout(**{name: v[rows] if torch.is_tensor(v) else v for name, v in values.items()})


def draw_unmask_steps(batch, config, generator):
    """unmask_step (B, n): which step writes which position; under low confidence m, for not yet decided.

    Random and left-to-right order do not depend on the policy, so they are known before the first forward pass
    and no gradient flows through them."""
    n, m = config.completion_length, config.sampling_steps
    if config.unmasking == "low_confidence":
        return torch.full((batch, n), m)
    step_of_slot = torch.arange(m).repeat_interleave(torch.tensor(config.tokens_per_step))  # (n,)
    slots = step_of_slot.view(1, config.blocks, -1).repeat(batch, 1, 1)  # (B, blocks, n / blocks)
    if config.unmasking == "random":
        slots = slots.gather(2, uniforms(slots.shape, generator).argsort(2).cpu())
    return slots.view(batch, n)


def empty_rollout(model, prompt_ids, prompt_mask, config, generator):
    """The Rollout before step 0: everything is [MASK]. Its optional parts exist where the config needs them."""
    device, batch, n, m = prompt_ids.device, len(prompt_ids), config.completion_length, config.sampling_steps
    keep_draws = config.unmasking == "low_confidence" and config.temperature > 0

    def numbers(*shape):
        return torch.zeros(shape, dtype=torch.float64, device=device)  # holds float32 and float64 unrounded

    def ids(*shape, value=-1):
        return torch.full(shape, value, device=device)

    return Rollout(
        prompt_ids,
        prompt_mask,
        completion_ids=ids(batch, n, value=model.mask_token_id),
        unmask_step=draw_unmask_steps(batch, config, generator).to(device),
        logprobs=numbers(batch, n),
        entropies=numbers(batch, n),
        steps_taken=ids(batch, value=0),
        support_ids=ids(batch, n, config.top_k) if config.top_k else None,
        drawn_ids=ids(batch, m, n) if keep_draws else None,
        drawn_logprobs=numbers(batch, m, n) if keep_draws else None,
        drawn_entropy=numbers(batch, m) if keep_draws else None,
        greedy_ids=ids(batch, m, n, value=model.eos_token_id) if config.step_baseline != "none" else None,
        mask_token_id=model.mask_token_id,
        eos_token_id=model.eos_token_id,
    )


@torch.no_grad()
def rollout(model, prompt_ids, prompt_mask, config, generator, micro_batch=None):
    """Sample one completion per row of prompt_ids (B, P) under the policy: m forward passes, fewer if all rows stop.

    micro_batch sequences per forward pass, None for all at once: it bounds memory and changes no draw.

    A completion whose block came out all <eos> stops: the rest is filled with <eos> without an action.
    Low-confidence unmasking draws every masked token of the block and keeps those of highest recorded
    log-probability; temperature 0, for evaluation, takes the likeliest token and records it at temperature 1.
    """
    device, batch, n, m = prompt_ids.device, len(prompt_ids), config.completion_length, config.sampling_steps
    run = empty_rollout(model, prompt_ids, prompt_mask, config, generator)
    steps_per_block, block_length = m // config.blocks, n // config.blocks
    rows = torch.arange(batch, device=device)  # those still running
    for t in range(m):
        start = t // steps_per_block * block_length  # of the current block
        if t % steps_per_block == 0 and t > 0:
            rows = stop_early(run, rows, start, start - block_length, m)
        if len(rows) == 0:
            break
        # A uniform for every position, used or not: a row's draws must not depend on which others are running.
        u = uniforms((batch, n), generator).to(device) if config.temperature > 0 else None
        for part in rows.split(micro_batch or batch):
            write_step(model, run, part, t, slice(start, start + block_length), config, u)
    return run


def stop_early(run, rows, start, previous, m):
    """Finish the rows whose previous block is all <eos>; returns the rows that go on."""
    stopped = (run.completion_ids[rows, previous:start] == run.eos_token_id).all(1)
    run.completion_ids[rows[stopped], start:] = run.eos_token_id
    run.unmask_step[rows[stopped], start:] = m
    return rows[~stopped]


def write_step(model, run, rows, t, block, config, u):
    """One denoising step of some rows (b,), in place: draw the action at t with the uniforms u (B, n), write it."""
    ids = run.completion_ids[rows]  # (b, n)
    low_confidence = config.unmasking == "low_confidence"
    candidates = run.unmask_step[rows] == t  # (b, n) bool, N positions in all
    if low_confidence:
        candidates[:, block] = ids[:, block] == run.mask_token_id
    asked = candidates if run.greedy_ids is None else ids == run.mask_token_id  # rows of the head to compute
    logits = logits_at(model, torch.cat([run.prompt_ids[rows], ids], 1), run.prompt_mask[rows], asked)
    if run.greedy_ids is not None:
        run.greedy_ids[rows, t] = ids.masked_scatter(asked, likeliest(logits, run.mask_token_id))
        logits = logits[candidates[asked]]
    support = kept_ids(logits, run.mask_token_id, config)  # (N, top_k) or None
    logp = token_logprobs(logits, run.mask_token_id, config.temperature or 1.0, support)  # (N, V or top_k)
    if config.temperature == 0:
        index = logp.argmax(1, keepdim=True)
    else:
        index = inverse_cdf(logp.exp(), u[rows][candidates][:, None])
    tokens = (index if support is None else support.gather(1, index)).squeeze(1)  # (N,)
    token_logp = logp.gather(1, index).squeeze(1)
    written = candidates
    if low_confidence:  # of all the tokens drawn, keep the likeliest
        confidence = torch.full(ids.shape, -torch.inf, dtype=logp.dtype, device=logp.device)
        confidence[candidates] = token_logp
        best = confidence.topk(config.tokens_per_step[t]).indices  # (b, tokens per step)
        written = torch.zeros_like(candidates).scatter(1, best, True)
    if run.drawn_ids is not None:
        run.drawn_ids[rows, t] = run.drawn_ids[rows, t].masked_scatter(candidates, tokens)
        run.drawn_logprobs[rows, t] = run.drawn_logprobs[rows, t].masked_scatter(candidates, token_logp.double())
        row_of_token = rows[candidates.nonzero()[:, 0]]  # (N,)
        run.drawn_entropy[:, t].index_add_(0, row_of_token, entropy(logp).double())
    row, column = written.nonzero(as_tuple=True)
    at, keep = (rows[row], column), written[candidates]
    run.completion_ids[at] = tokens[keep]
    run.unmask_step[at] = t
    run.logprobs[at] = token_logp[keep].double()
    run.entropies[at] = entropy(logp[keep]).double()
    if support is not None:
        run.support_ids[at] = support[keep]
    run.steps_taken[rows] += 1


# ------------------------------------------------------------------------------- advantages and timesteps


def group_advantages(rewards, G, scale_by_std=False):
    """A = R - mean of the group, float rewards (B,) in groups of G neighbours -> (B,). Exactly 0 where a group agrees.

    The mean includes the completion itself: exact direction, scale (G - 1) / G of the leave-one-out baseline.
    scale_by_std divides by the group's standard deviation (GRPO): that reweights prompts, a bias.
    """
    require(bool(torch.isfinite(rewards).all()), "a reward is not finite")
    groups = rewards.view(-1, G)
    centred = groups - groups.mean(1, keepdim=True)
    if scale_by_std:
        centred = centred / groups.std(1, keepdim=True)  # 0 / 0 in a group that agrees: overwritten below
    return centred.masked_fill((groups == groups[:, :1]).all(1, keepdim=True), 0).flatten()  # rounding leaves 3e-8


def stepwise_advantages(rewards, step_rewards, taken, G, c, gate):
    """A_t = R - c r_t - mean over the other completions j of the group of (R_j - c r_jt), times (G - 1) / G -> (B, m).

    rewards R (B,); step_rewards (B, m): r_t, the reward of the greedy completion of the state before step t; taken (B,)
    executed steps, after which r_t is R; c a number or (m,), one per step; all on one device. c = 0 gives
    group_advantages. EGSPO-SA's return (R + lambda (R - r_t)) / (1 + lambda) is R - c r_t, c = lambda / (1 + lambda).

    r_t is a function of the state, which comes before the action, and the mean looks at other completions alone:
    subtracting them leaves the expected gradient as it is, however timesteps are drawn. The mean is taken at the same
    step t; EGSPO's, slot by slot over the steps that happened to be selected, is biased, as later states decide which.
    gate: c is 0 for a completion whose fellows all agree in reward. The gate does not look at the completion itself,
    so it changes no expectation, and a group that agrees costs no update.
    """
    m, plain = step_rewards.shape[1], group_advantages(rewards, G)  # (B,)
    require(bool(torch.isfinite(step_rewards).all()), "a reward is not finite")
    executed = steps_before(taken, m)  # (B, m)
    r = step_rewards.where(executed, rewards[:, None]).view(-1, G, m)
    centred = r - (r.sum(1, keepdim=True) - r) / (G - 1)  # r_t less the mean of the others
    centred = centred.masked_fill((r == r[:, :1]).all(1, keepdim=True), 0).view(-1, m)  # not 3e-8 where all agree
    if gate:
        others = ~torch.eye(G, dtype=torch.bool, device=rewards.device)
        fellows = rewards.view(-1, 1, G).expand(-1, G, G)[:, others].view(-1, G - 1)  # (B, G - 1)
        centred = centred * (fellows != fellows[:, :1]).any(1, keepdim=True)
    return plain[:, None] - c * centred * (G - 1) / G


def step_coefficients(config):
    """c of every step (m,). ramp: t / m, the share of the steps that r_t already knows; the best c, regressed on
    earlier batches, is close to it, or larger on trained Sudoku at hardly less variance (experiments/variance.py)."""
    m = config.sampling_steps
    return torch.arange(m) / m if config.step_baseline == "ramp" else torch.full((m,), config.step_coefficient)


def steps_before(T, m):
    """(B, m) bool: the steps t < T (B,)."""
    return torch.arange(m, device=T.device) < T[:, None]


def horizon_of(rollout, config):
    """T (B,): the steps t < T enter the gradient.

    executed: all steps that were taken. last_non_eos (the paper's and the official code's): up to the step that
    wrote the last token other than <eos>, at least 1. That T depends on the tokens drawn, and the decision to
    write <eos> gets no gradient: relative bias 0.16 to 0.19, and 0.20 to 0.23 with normalization
    trajectory (medians of experiments/estimators.py exact).
    """
    if config.horizon == "executed":
        return rollout.steps_taken
    require(rollout.eos_token_id is not None, "horizon last_non_eos needs the rollout's eos_token_id")
    return rollout.unmask_step.where(rollout.completion_ids != rollout.eos_token_id, 0).amax(1) + 1


def step_entropies(rollout, m):
    """H (B, m) float64: the summed entropy (plus 1e-8) of the tokens drawn at each step, 0 nats where none was."""
    if rollout.drawn_entropy is not None:
        return rollout.drawn_entropy + 1e-8
    floor = torch.full((len(rollout.unmask_step), m + 1), 1e-8, dtype=torch.float64, device=rollout.unmask_step.device)
    # Column m collects what the early stop filled in.
    return floor.scatter_add(1, rollout.unmask_step, rollout.entropies.double())[:, :m]


def proposal(rollout, config):
    """q (B, m) float64, rows sum to 1: how likely each step t < T is to be drawn.

    entropy: in proportion to the entropy of the step, large where the model had a choice and the gradient tends to be
    large. A step of entropy near 0 can then weigh 1e7; uniform_share a mixes in the uniform distribution:
    q = (1 - a) H_t / sum H + a / T, so that no step weighs more than 1 / a times what it does in a uniform draw.
    """
    m, T = config.sampling_steps, horizon_of(rollout, config)  # (B,)
    executed = steps_before(T, m)  # (B, m)
    uniform = executed.double() / T[:, None]
    if config.importance_sampling == "uniform":
        return uniform
    if config.importance_sampling == "top_entropy":  # EGSPO ranks steps by the tokens that were kept
        rollout = replace(rollout, drawn_entropy=None)
    H = step_entropies(rollout, m).where(executed, 0.0)
    return (1 - config.uniform_share) * (H / H.sum(1, keepdim=True)) + config.uniform_share * uniform


def steps_from_uniforms(q, u):
    """Timesteps (B, k) from the proposal q (B, m) and given uniforms u (B, k): the part of the draw to test."""
    return inverse_cdf(q, u)


def sample_timesteps(rollout, config, generator):
    """Draw k timesteps per completion: steps (B, k) long, weights (B, k) float64.

    Importance weights w_j = 1 / (k q_t) / m make E[sum_j w_j f(t_j)] = (1/m) sum_{t < T} f(t) for every f.
    normalization "trajectory" has 1/T in place of 1/m: the paper's per-trajectory mean, biased where T varies.
    low_discrepancy: one uniform U per completion, u_j = (j + U) / k. u_j is uniform on its stratum, and together the
    k strata cover [0, 1) once: the expectation of the sum is the same, its variance usually smaller (larger
    where f about repeats itself after 1 / k of the cumulative q). A single slot is not distributed as q: nothing may
    be averaged or subtracted by slot.
    top_entropy takes the k steps of highest entropy, with the weights of a uniform draw (EGSPO): biased, as the
    other steps are never seen (relative bias 0.25 to 0.8 on enumerable models, scale included).
    """
    m, k = config.sampling_steps, config.mc_samples
    T = horizon_of(rollout, config)[:, None]  # (B, 1)
    device = T.device
    q = proposal(rollout, config)
    slot = torch.arange(k, device=device)
    if config.importance_sampling == "top_entropy":
        steps = q.argsort(dim=1, descending=True, stable=True)[:, slot.clamp(max=m - 1)]
        weights = (T / k).expand(-1, k).double()
    else:
        if config.low_discrepancy:
            u = (slot + uniforms((len(T), 1), generator).to(device)) / k
        else:
            u = uniforms((len(T), k), generator).to(device)
        steps = steps_from_uniforms(q, u)
        weights = 1 / (k * q.gather(1, steps))
    # With k >= T there is nothing to estimate: every step once, with weight 1; spare slots weigh 0.
    exhaustive = k >= T
    steps = torch.where(exhaustive, slot.minimum(T - 1), steps)
    weights = torch.where(exhaustive, (slot < T).double(), weights)
    return steps, weights / (T if config.normalization == "trajectory" else m)


def batch_proposal(rollout, advantages, config):
    """q (B, m) float64, sum 1 (less if all advantages are 0): the share of the batch's draws that each step should get.

    The variance is least where a step is taken with a probability in proportion to the norm of its term,
    |A_t| ||grad log pi(a_t | s_t)||, and the squared norm of that gradient is about as large as the entropy H_t: q is
    proportional to |A_t| sqrt(H_t), or to |A_t| with uniform importance sampling. A uniform_share of it is spread
    evenly over the steps that can contribute, and bounds the weights.
    """
    needed = steps_before(horizon_of(rollout, config), config.sampling_steps)  # (B, m)
    if config.beta == 0 and config.entropy_bonus == 0:
        needed = needed & (advantages != 0)
    q = advantages.double().abs() * needed
    if config.importance_sampling == "entropy":
        q = q * step_entropies(rollout, config.sampling_steps).sqrt()
    q = q / q.sum().clamp(min=1e-300)
    return (1 - config.uniform_share) * q + config.uniform_share * needed / needed.sum().clamp(min=1)


def inclusion_probabilities(q, total):
    """p = min(1, kappa q), of any shape, with sum p = total, or 1 for every positive q if they are fewer.

    With total = k x completions that have an advantage, the batch shares the draws that k for each would be."""
    certain = torch.zeros_like(q, dtype=torch.bool)
    while True:  # each round makes at least one more step certain
        rest = q.where(~certain, 0.0)
        p = (rest * ((total - certain.sum()) / rest.sum().clamp(min=1e-300))).where(~certain, 1.0)
        if not (p > 1).any():
            return p
        certain |= p >= 1


def systematic_draw(p, U):
    """Which steps are taken, 0 or 1 of the shape of p, each with probability p, all by one uniform U (): with the p
    laid end to end, those that contain an integer - U. No step is taken twice, and neighbours share luck evenly."""
    passed = (p.flatten().cumsum(0) + U).floor()  # integers in front of each end
    return passed.diff(prepend=passed.new_zeros(1)).view_as(p)


def draw_step_weights(rollout, advantages, config, generator):
    """(B, m) float64: what each step weighs in the loss, 0 where it was not drawn. advantages (B, m)."""
    m = config.sampling_steps
    if config.allocation == "completion":
        steps, weights = sample_timesteps(rollout, config, generator)  # (B, k)
        # A step drawn twice weighs twice, and is computed once.
        return torch.zeros(len(steps), m, dtype=weights.dtype, device=weights.device).scatter_add(1, steps, weights)
    q = batch_proposal(rollout, advantages, config)  # (B, m)
    p = inclusion_probabilities(q, total=config.mc_samples * int((q > 0).any(1).sum()))
    taken = systematic_draw(p, uniforms((), generator).to(p.device))
    length = horizon_of(rollout, config)[:, None] if config.normalization == "trajectory" else m
    return taken / p.where(taken > 0, 1.0) / length


# ----------------------------------------------------------------------------- the objective and its gradient


def clipped_objective(logp, old_logp, advantage, epsilon_low, epsilon_high):
    """min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A), rho = pi / pi_old, per token (PPO); to be maximised.

    Right after a rollout rho = 1 and the gradient is A grad log pi: the policy gradient, nothing is clipped.
    """
    ratio = (logp - old_logp).exp()
    return torch.minimum(ratio * advantage, ratio.clamp(1 - epsilon_low, 1 + epsilon_high) * advantage)


def accumulate_gradient(model, rollout, advantages, config, generator, micro_batch, reference=None):
    """Add the gradient of the loss to .grad, `micro_batch` sequences per forward and backward pass; returns statistics.

    loss = - 1/B sum_i sum_j w_ij sum_(tokens drawn at t_ij) [ clipped_objective - beta KL(pi || pi_ref) + bonus H ]

    advantages: (B,), or (B, m) for one per step. Unbiased up to the constants 1/m and (G - 1)/G for the first update
    after a rollout, with the default horizon and normalization, no KL, entropy bonus or top_entropy; later updates on
    the same rollout are biased by per-token ratios and the clip, as in PPO. KL and entropy H are per state: exact at
    each visited state (the KL for the policy before top-k and top-p), they omit how theta changes which states are
    visited. Steps no optimizer. Raises ValueError for policies whose likelihood it does not have.
    """
    require_trainable(rollout, config, reference)
    # A rollout built by hand need not carry the model's ids.
    rollout = replace(rollout, mask_token_id=model.mask_token_id, eos_token_id=model.eos_token_id, greedy_ids=None)
    batch, m = len(rollout.completion_ids), config.sampling_steps
    advantages = advantages.to(rollout.unmask_step.device).reshape(batch, -1).expand(batch, m)
    step_weights = draw_step_weights(rollout, advantages, config, generator)  # (B, m)
    needed = step_weights != 0
    if config.beta == 0 and config.entropy_bonus == 0:
        needed &= advantages != 0  # a step without advantage has gradient exactly 0
    rows, times = needed.nonzero(as_tuple=True)  # each pair is one sequence to run forward and backward
    sums = torch.zeros(4, dtype=torch.float64, device=rows.device)  # loss, tokens, clipped tokens, KL
    ratio_error = sums.new_zeros(())
    for start in range(0, len(rows), micro_batch):
        row, t = rows[start : start + micro_batch], times[start : start + micro_batch]
        w, A = step_weights[row, t] / batch, advantages[row, t]
        loss, ratio, *rest = state_loss(model, rollout[row], t, w, A, config, reference)
        loss.backward()
        sums += torch.stack([loss.detach(), *rest])
        ratio_error = torch.maximum(ratio_error, (ratio - 1).abs().max())  # unlike max(), it keeps a nan
    total_loss, tokens, clipped, kl = sums.tolist()
    return {
        "loss": total_loss,
        "clip_fraction": clipped / max(tokens, 1),  # share of the tokens whose gradient the clip removed
        "kl": kl / max(tokens, 1),  # nats per token at the drawn steps
        "ratio_error": ratio_error.item(),  # largest |rho - 1|: rounding alone, right after a rollout
        "evaluations": len(rows),  # sequences run forward and backward
    }


def require_trainable(rollout, config, reference):
    """Raise ValueError, in one line, where there is no gradient to compute."""
    if config.unmasking == "low_confidence":
        require(not config.top_k, "training with low_confidence unmasking needs top_k 0: kept sets are not stored")
        require(rollout.drawn_ids is not None or config.temperature == 0, "the rollout lacks its drawn_ids")
    require(config.temperature > 0, "temperature 0 has no gradient: train with a positive temperature")
    require(config.beta == 0 or reference is not None, "beta > 0 needs a reference model")
    n, taken = rollout.completion_ids.shape[1], int(rollout.steps_taken.max())
    require(n == config.completion_length and taken <= config.sampling_steps, "the rollout is of another config")


def state_loss(model, part, t, weight, advantage, config, reference):
    """Loss of b states s_t and their actions: part a Rollout of b rows; t, weight, advantage (b,).

    Returns the loss, the ratios (N,), and the numbers of tokens, of clipped tokens and the sum of the KL."""
    chosen, tokens, old_logprobs = part.action_at(t)  # (b, n), N positions in all
    of_token = chosen.nonzero()[:, 0]  # (N,): the row that a position belongs to
    ids, advantage = part.state_at(t), advantage[of_token]
    logits = logits_at(model, ids, part.prompt_mask, chosen)  # (N, V)
    support = None if part.support_ids is None else part.support_ids[chosen]  # (N, top_k)
    distribution = token_logprobs(logits, part.mask_token_id, config.temperature, support)  # (N, V or top_k)
    logp, old_logp = logprob_of(tokens[chosen], distribution, support), old_logprobs[chosen]  # (N,)
    objective = clipped_objective(logp, old_logp, advantage, config.epsilon_low, config.epsilon_high)
    kl = torch.zeros_like(objective)
    if config.beta > 0:
        with torch.no_grad():
            reference_logits = logits_at(reference, ids, part.prompt_mask, chosen)
        # Before truncation: the reference's own top-k may lack a token kept here, and the KL would be infinite.
        whole = distribution if support is None else token_logprobs(logits, part.mask_token_id, config.temperature)
        kl = kl_divergence(whole, token_logprobs(reference_logits, part.mask_token_id, config.temperature))
    bonus = config.entropy_bonus * entropy(distribution) if config.entropy_bonus > 0 else 0.0
    loss = -(weight[of_token] * (objective - config.beta * kl + bonus)).sum()
    ratio = (logp.detach() - old_logp).exp()
    clipped = (advantage > 0) & (ratio > 1 + config.epsilon_high) | (advantage < 0) & (ratio < 1 - config.epsilon_low)
    return loss, ratio, torch.ones_like(ratio).sum(), clipped.sum(), kl.detach().sum()


def logprob_of(tokens, distribution, support=None):
    """log pi (N,) of tokens (N,) under the distributions they came from: (N, V), or (N, S) over a support's ids."""
    index = tokens[:, None] if support is None else (support == tokens[:, None]).int().argmax(1, keepdim=True)
    return distribution.gather(1, index).squeeze(1)
