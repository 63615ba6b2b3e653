"""AGRPO: policy gradients for masked diffusion language models (arXiv 2510.04019), in one file that needs torch alone.

A masked diffusion language model answers a question by starting from n [MASK] tokens and filling them in over m
denoising steps. AGRPO reads this as a Markov decision process:

    state s_t     the sequence as the model sees it before step t: some tokens, some [MASK]
    action a_t    the tokens written at step t, each drawn from the model's distribution at its position
    reward R      one number for the finished completion
    gradient      grad J = E[ A sum_t grad log pi(a_t | s_t) ],    A = R - baseline: how much better than expected

Which positions come next is drawn at random, whatever the model says, so log pi(a_t | s_t) is a sum of token
log-probabilities from one forward pass on s_t: exact. No pass serves two steps, so the full sum needs m of them;
AGRPO draws k of the m steps and weighs them so that the expectation stays what it was.

    symbol   meaning                                         name in code                  shape
    m, t     denoising steps; timestep 0 .. m - 1            sampling_steps; t             -; (B,)
    s_t      state before step t                             Rollout.state_at              (B, L)
    a_t      action: the N tokens that step t wrote          Rollout.action_at             (B, L), (N,)
    T        steps taken: m unless a row stops early         steps_taken                   (B,)
    R, A     reward; advantage of a step                     rewards; advantages           (B,); (B, m)
    G        completions per question: a group               num_generations
    k        timesteps drawn per completion                  mc_samples
    q_t      probability that one draw takes step t          proposal                      (B, m)
    w_t      weight of step t in the loss, 0: not drawn      weights                       (B, m)
    rho      probability ratio, new policy over sampler      ratio                         (N,)
    eps      how far rho may move before it is clipped       epsilon_low, epsilon_high
    H_t      entropy behind the tokens of step t             step_entropies                (B, m)

B sequences (questions x G) of L tokens, n of them written; a vocabulary of V; N positions somewhere in a batch.
One trajectory: the question "3 4 = 7", n = 4 tokens, m = 2 steps of two tokens each, in random order:

    t = 0    state  3 4 = 7 [MASK] [MASK] [MASK] [MASK]    action: + and <eos> at the second and the fourth [MASK]
    t = 1    state  3 4 = 7 [MASK]   +    [MASK] <eos>     action: 3 and 4 at the first and the third
    end             3 4 = 7   3      +      4    <eos>     unmask_step = -1 -1 -1 -1 1 0 1 0,   reward 1

One integer per position replays it: -1 was given, t was written at step t, and s_t has [MASK] where it is t or more;
what is given may stand anywhere. The algorithm is four lines, and another function can replace each (variants.py); the
loop around them is at the end of this file (`python agrpo.py`):

    run = rollout(model, ids, attention_mask, config, generator)
    rewards = ...                                                    # R (B,), judged on the finished run.ids
    advantages, weights = estimate(run, rewards, config, generator)  # two tables (B, m)
    accumulate_gradient(model, run, advantages=advantages, weights=weights, config=config, micro_batch=64)
"""

from dataclasses import dataclass, replace

import torch


@dataclass
class AGRPOConfig:
    """The policy that writes, and how its gradient is estimated. Raises ValueError on values that cannot work."""

    sampling_steps: int = 128  # m: denoising steps of a completion
    block_length: int | None = None  # written positions per block; blocks are finished in order; None: one block
    temperature: float = 1.0  # 0 takes the likeliest token: to evaluate, not to train
    top_k: int | None = None  # choose among this many likeliest tokens; 0: all
    top_p: float = 1.0  # then among the fewest whose probability reaches p
    num_generations: int = 8  # G: completions per question
    shared_order: bool = False  # the G completions of a question unmask their positions in one common order
    mc_samples: int = 8  # k: timesteps drawn per completion; k >= T takes each step once, exactly
    importance_sampling: str = "uniform"  # uniform | entropy: draw timesteps in proportion to their entropy
    low_discrepancy: bool = True  # spread the k draws of a completion evenly
    epsilon_low: float = 0.2  # the ratio is clipped from below at 1 - epsilon_low
    epsilon_high: float = 0.2  # and from above at 1 + epsilon_high

    def __post_init__(self):
        least = {"sampling_steps": 1, "block_length": 1, "mc_samples": 1, "num_generations": 2, "temperature": 0}
        for name, bound in (least | {"top_k": 0, "epsilon_low": 0, "epsilon_high": 0}).items():
            require((value := getattr(self, name)) is None or value >= bound, f"{name} is {value}: at least {bound}")
        require(0 < self.top_p <= 1 and self.epsilon_low <= 1, "top_p is in (0, 1], epsilon_low at most 1")
        require(self.importance_sampling in ("uniform", "entropy"), "importance_sampling: choose uniform or entropy")


def require(condition, message):
    if not condition:
        raise ValueError(message)


# ---------------------------------------------------------------------------------------------- the policy
def token_logprobs(logits, mask_token_id, config, drawn=None):
    """log pi(. | s) at N positions: the only softmax here. Rollout, ratio, entropy and KL all go through it.
    logits (N, V) -> (N, V) in float32 or better. [MASK] has probability 0: an answer with it would not be finished.
    What top-k, then top-p leave out has probability 0 as well. drawn: indices of positions, and tokens that rows drew
    there; they stay, for all rows of a state, should an update have pushed one out: no kept set need be stored."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / (config.temperature or 1.0)
    never = torch.finfo(logits.dtype).min  # finite, so that p log p = 0 * never = 0 where -inf would give nan
    logits = logits.clamp(min=never).index_fill_(-1, torch.tensor(mask_token_id, device=logits.device), never)
    if config.top_k or config.top_p < 1:
        top, words = logits.detach().topk(min(config.top_k or logits.shape[-1], logits.shape[-1]))  # descending
        p = top.softmax(-1)
        within = ~(p.cumsum(-1) - p >= config.top_p) | (config.top_p == 1)  # the crossing word, and nan
        kept = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, words, within)  # (N, V)
        if drawn is not None:
            kept[drawn] = True
        logits = logits.masked_fill(~kept, never)
    return logits.log_softmax(-1)


def entropy(logp):
    """H = - sum_v p_v log p_v in nats, over the last dimension."""
    return -(logp.exp() * logp).sum(-1)


def uniforms(shape, generator):
    """Float64 in [0, 1), the only source of random numbers; on the generator's device, so a GPU gets the same ones."""
    return torch.rand(shape, dtype=torch.float64, generator=generator, device=generator.device)


def inverse_cdf(p, u):
    """Index i with p_0 + .. + p_(i-1) <= u sum(p) < p_0 + .. + p_i: p (N, S), u (N, k) in [0, 1) -> (N, k).
    In float64: in float32 an entry of about 1e-9 could never be drawn, and u could round up to 1, past the end.
    An entry of probability 0 is never drawn. Raises ValueError if one is not finite."""
    cumulative = p.double().cumsum(-1)
    require(bool(cumulative[:, -1].isfinite().all()), "probabilities are not finite: the model has diverged")
    u = u.double().clamp(max=1 - 2**-53)  # the largest double below 1: then u * total < total, also after rounding
    return torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)


# --------------------------------------------------------------------------------------------- the rollout
@dataclass
class Rollout:
    """B finished trajectories, stored so that every state and action of them can be read back."""

    ids: torch.Tensor  # (B, L) long
    attention_mask: torch.Tensor  # (B, L) bool, False: padding
    unmask_step: torch.Tensor  # (B, L) long, the plan and then the record: -1 given; 0 .. m - 1; m: by the early stop
    logprobs: torch.Tensor  # (B, L): log-probability of each token when it was written, 0 where none was
    entropies: torch.Tensor  # (B, L): entropy of the distribution it was drawn from, 0 where none was
    steps_taken: torch.Tensor  # (B,) long: T
    sampling_steps: int  # m
    mask_token_id: int
    eos_token_id: int

    def state_at(self, t):
        """s_t (B, L): the ids that the model saw before step t (B,), but for padding."""
        return self.ids.masked_fill(self.unmask_step >= t[:, None], self.mask_token_id)

    def action_at(self, t):
        """a_t, t (B,): its positions (B, L) bool, N in all; its tokens (N,) and their log-probabilities then (N,)."""
        written = self.unmask_step == t[:, None]
        return written, self.ids[written], self.logprobs[written]

    def step_entropies(self):
        """H (B, m) float64: the summed entropy of the tokens that each step wrote."""
        H = torch.zeros(len(self.ids), self.sampling_steps + 2, dtype=torch.float64, device=self.ids.device)
        # One column in front for what was given, one at the end for what the early stop filled in.
        return H.scatter_add(1, self.unmask_step + 1, self.entropies)[:, 1:-1]

    def __getitem__(self, rows):
        """The same, for some of the rows."""
        return replace(self, **{name: v[rows] for name, v in vars(self).items() if torch.is_tensor(v)})


def schedule(n, config):
    """[(first, last, count)] of each step: the written positions first .. last - 1 are its block, it writes count.
    The blocks share the m steps equally, a step writes at least one token, and the first steps of a block write one
    more where it does not divide evenly. The m that is used is the length of the list."""
    length, steps = config.block_length or n, config.sampling_steps
    require(n >= 1, "there is no [MASK] to fill in")
    blocks = [(first, min(first + length, n)) for first in range(0, n, length)]
    require(steps % len(blocks) == 0, f"sampling_steps {steps} is not a multiple of the {len(blocks)} blocks")
    plan = []
    for first, last in blocks:
        s = min(steps // len(blocks), last - first)
        plan += [(first, last, (last - first) // s + (i < (last - first) % s)) for i in range(s)]
    return plan


def draw_order(batch, plan, config, generator):
    """(B, n): which step writes each of the n positions. Drawn before the first token, so it knows nothing of the
    policy, and no gradient flows through it: that is why a group may share it, and the states that then coincide."""
    step_of = torch.arange(len(plan)).repeat_interleave(torch.tensor([count for *_, count in plan]))  # (n,)
    blocks, G = {step[:2]: None for step in plan}, config.num_generations if config.shared_order else 1
    require(batch % G == 0, f"shared_order: {batch} rows are not groups of {G}")
    u = uniforms((batch // G, len(step_of)), generator).repeat_interleave(G, 0).cpu()  # (B, n)
    return torch.cat([step_of[first:last][u[:, first:last].argsort(1)] for first, last in blocks], 1)


def distinct_passes(ids, attention_mask, positions, micro_batch):
    """One sequence per distinct state, as completions of a question share their first one, and often later ones. (Skip
    this at first: a sequence per row computes the same.) ids, attention_mask, positions (B, L): yields, `micro_batch`
    states at a time, their rows (b,), the model's inputs (S, L) with the union of the wanted positions, N' in all, and
    which of those each row wants (N,). Rows that want 5 7 and 7 8 of a state: union 5 7 8, places 0 1 1 2."""
    asking = positions.any(1).nonzero()[:, 0]
    seen = ids[asking].masked_fill(~attention_mask[asking], -1)  # (rows, L)
    factors = torch.randint(2**62, seen.shape[1:], generator=torch.Generator().manual_seed(0), device="cpu").to(ids)
    found, state = (seen * factors).sum(1).unique(return_inverse=True)  # a hash: faster than unique(dim=0)
    keys = seen.new_empty(len(found), seen.shape[1]).index_put_((state,), seen)  # (S, L)
    require(bool((keys[state] == seen).all()), "two states have one hash: a chance of 10^-12, change the seed above")
    union = torch.zeros_like(keys).index_add_(0, state, positions[asking].long()) > 0  # (S, L)
    for part in torch.arange(len(keys), device=ids.device).split(micro_batch or len(keys)) if len(keys) else ():
        here = (state >= part[0]) & (state <= part[-1])
        rows, key, wanted = asking[here], keys[part], union[part]  # (b,), (S, L), (S, L)
        place = wanted.flatten().cumsum(0).view(wanted.shape)[state[here] - part[0]] - 1  # (b, L)
        yield rows, (key.clamp(min=0), key >= 0, wanted), place[positions[rows]]


def unmask_random(model, run, t, block, count, config, uniforms, micro_batch):
    """One denoising step, in place: the positions whose turn it is are drawn. Every `step` function gets the block
    (B, L) bool that t is in, how many tokens a row writes, a uniform per position (B, L), and the size of a pass."""
    positions = run.unmask_step == t  # (B, L)
    write(run, t, positions, draw_tokens(model, run, positions, config, uniforms, micro_batch))


def draw_tokens(model, run, positions, config, uniforms, micro_batch):
    """Draw at positions (B, L) bool: tokens, their log-probabilities, the entropies behind them, (B, L) each."""
    tokens, logprobs, H = torch.zeros_like(run.ids), torch.zeros_like(run.logprobs), torch.zeros_like(run.logprobs)
    for rows, (ids, mask, wanted), place in distinct_passes(run.ids, run.attention_mask, positions, micro_batch):
        logp = token_logprobs(model(ids, attention_mask=mask, positions=wanted), run.mask_token_id, config)  # (N', V)
        kept, words = logp.topk(min(config.top_k, logp.shape[1])) if config.top_k else (logp, None)  # (N', top_k)
        row, column = positions[rows].nonzero(as_tuple=True)
        at = rows[row], column
        drawn, p = kept.argmax(1)[place], kept.exp()  # (N,), (N', V or top_k): no other word has a chance
        if config.temperature > 0:  # in parts of N', as many rows may share a place
            parts = zip(place.split(len(p)), uniforms[at][:, None].split(len(p)))
            drawn = torch.cat([inverse_cdf(p[i], u).squeeze(1) for i, u in parts])
        drawn = words[place, drawn] if config.top_k else drawn
        tokens[at], logprobs[at], H[at] = drawn, logp[place, drawn].double(), entropy(kept)[place].double()
    return tokens, logprobs, H


def write(run, t, positions, drawn):
    """Write what was drawn, three tables (B, L), at the positions (B, L) bool, and note the step."""
    for table, values in zip((run.ids, run.logprobs, run.entropies), drawn):
        table.copy_(values.where(positions, table))
    run.unmask_step.masked_fill_(positions, t)


def stop_early(run, block):
    """Finish the rows whose block (B, L), of several, came out all <eos>: their other [MASK] become <eos>, by rule,
    not by an action, so no term of the sum is lost. Not where given tokens follow, which belong to the text."""
    behind = ~block & (block.cumsum(1) == block.sum(1, keepdim=True))  # (B, L): after the block
    finished = ((run.ids == run.eos_token_id) | ~block).all(1)
    finished &= ~(behind & (run.unmask_step < 0) & run.attention_mask).any(1)
    rest = behind & finished[:, None] & (run.unmask_step >= 0)
    run.ids[rest], run.unmask_step[rest] = run.eos_token_id, run.sampling_steps


@torch.no_grad()
def rollout(model, ids, attention_mask, config, generator, micro_batch=None, step=unmask_random):
    """Fill in the [MASK] of ids (B, L), of which every row has the same number n: B trajectories under the policy.
    model(input_ids (B, L), attention_mask= (B, L) bool, False: padding, positions= (B, L) bool) gives logits (N, V) at
    the positions, row by row, and has mask_token_id and eos_token_id. `step` says which positions come next
    (variants.py has another). micro_batch sequences per pass, None: all. Raises ValueError on unequal rows."""
    blank = ids == model.mask_token_id  # (B, L)
    n, slot = int(blank[0].sum()), blank.cumsum(1) - 1  # slot (B, L): the index among the [MASK] of its row
    require(bool((blank.sum(1) == n).all()), "every row needs the same number of [MASK]")
    plan, zeros = schedule(n, config), torch.zeros_like(ids, dtype=torch.float64)
    order = torch.full_like(ids, -1).masked_scatter(blank, draw_order(len(ids), plan, config, generator).to(ids))
    tables = ids.clone(), attention_mask, order, zeros.clone(), zeros.clone(), torch.zeros_like(ids[:, 0])
    run = Rollout(*tables, len(plan), model.mask_token_id, model.eos_token_id)
    for t, (first, last, count) in enumerate(plan):
        block = blank & (slot >= first) & (slot < last)
        # One for every [MASK], used or not: a row's draws must not depend on which others are running.
        u = zeros.masked_scatter(blank, uniforms((len(ids), n), generator).to(ids.device))  # (B, L)
        step(model, run, t, block, count, config, u, micro_batch)
        run.steps_taken += (run.unmask_step == t).any(1)
        stop_early(run, block)
    return run


# ------------------------------------------------------------------------------- advantages and timesteps
def group_advantages(rewards, G):
    """A = R - mean of the group: rewards (B,) in groups of G neighbours -> (B,). Exactly 0 where a group agrees.
    The mean includes the completion itself: the exact direction, at (G - 1) / G of the scale of the others' mean."""
    require(bool(torch.isfinite(rewards).all()), "a reward is not finite")
    groups = rewards.view(-1, G)
    centred = groups - groups.mean(1, keepdim=True)
    return centred.masked_fill((groups == groups[:, :1]).all(1, keepdim=True), 0).flatten()  # rounding leaves 3e-8


def proposal(run, config):
    """q (B, m) float64, rows sum to 1: how likely one draw is to take step t. 0 only for steps that were not taken.
    entropy: in proportion to H_t, large where the model had a choice and the gradient tends to be large. q may depend
    on the finished completion: it only decides which terms of its sum are computed."""
    q = (torch.arange(run.sampling_steps, device=run.ids.device) < run.steps_taken[:, None]).double()
    if config.importance_sampling == "entropy":
        q = q * (run.step_entropies() + 1e-8)  # a step whose entropy rounds to 0 must still be possible: no bias
    return q / q.sum(1, keepdim=True)


def timestep_weights(q, u):
    """Weights w (B, m) of the steps that the uniforms u (B, k) draw from q (B, m): the whole draw as a pure function.
    A step drawn c times weighs c / (k q_t) / m: then E[ sum_t w_t f(t) ] = (1/m) sum_{t < T} f(t) for every f, as each
    of the k draws takes t with probability q_t. With k >= T there is nothing to estimate: each step weighs 1/m."""
    m, k = q.shape[1], u.shape[1]
    steps = inverse_cdf(q, u)  # (B, k)
    drawn = torch.zeros_like(q).scatter_add(1, steps, 1 / (k * q.gather(1, steps)) / m)
    return torch.where(k >= (q > 0).sum(1, keepdim=True), (q > 0).double() / m, drawn)


def sample_timesteps(run, config, generator):
    """w (B, m) float64: what each step counts for, 0 where it was not drawn. low_discrepancy: one uniform U per row,
    u_j = (j + U) / k: each is uniform on its k-th of [0, 1), so the mean is the same, the variance usually smaller."""
    k = min(config.mc_samples, run.sampling_steps)
    u = uniforms((len(run.ids), 1 if config.low_discrepancy else k), generator).to(run.ids.device)
    u = (torch.arange(k, device=u.device) + u) / k if config.low_discrepancy else u  # (B, k)
    return timestep_weights(proposal(run, config), u)


def estimate(run, rewards, config, generator, step_rewards=None):
    """AGRPO's advantages (B, m) and weights (B, m): unbiased, up to the constants 1/m and (G - 1) / G. The paper draws
    and averages over the steps up to the last token that is not <eos> alone: biased (variants.paper says why)."""
    advantages = group_advantages(rewards, config.num_generations).to(run.ids.device)  # (B,)
    return advantages[:, None].expand(-1, run.sampling_steps), sample_timesteps(run, config, generator)


# ----------------------------------------------------------------------------- the objective and its gradient
def clipped_objective(logp, old_logp, advantage, epsilon_low, epsilon_high):
    """min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A), rho = pi / pi_old, per token (PPO); to be maximised. pi_old
    wrote the rollout. Right after it rho = 1, and the gradient is A grad log pi: the policy gradient. In later updates
    the clip takes the gradient from a token that has moved by eps where A wants it."""
    ratio = (logp - old_logp).exp()
    return torch.minimum(ratio * advantage, ratio.clamp(1 - epsilon_low, 1 + epsilon_high) * advantage)


def accumulate_gradient(model, run, *, advantages, weights, config, micro_batch, penalty=None):
    """Add the gradient of the loss to .grad, `micro_batch` sequences per forward and backward pass; returns statistics.
        loss = - 1/B sum_i sum_t w_it sum_(tokens of a_it) [ clipped_objective - penalty ]
    advantages (B,) or (B, m), weights (B, m): grad log pi of a token has the factor A_it w_it / B in all. A step of
    weight 0 is not run, nor one of advantage 0 without a penalty: its gradient is exactly 0. penalty(logits (N, V),
    input_ids, attention_mask, positions) -> (N,). The first update after a rollout follows the policy gradient; later
    ones are biased by per-token ratios and the clip, as in PPO."""
    require(config.temperature > 0, "temperature 0 has no gradient: train with a positive temperature")
    w = weights.to(run.ids.device) / len(run.ids)  # (B, m)
    A = advantages.to(w.device).reshape(len(w), -1).expand(w.shape)
    needed = w != 0 if penalty else (w != 0) & (A != 0)
    rows, times = needed.nonzero(as_tuple=True)  # P pairs of a completion and a step
    positions, states = run[rows].action_at(times)[0], run[rows].state_at(times)  # (P, L)
    sums, error = w.new_zeros(5, dtype=torch.float64), w.new_zeros(())
    for pairs, inputs, place in distinct_passes(states, run.attention_mask[rows], positions, micro_batch):
        row, t = rows[pairs], times[pairs]
        loss, ratio, *rest = pass_loss(model, inputs, place, run[row], t, w[row, t], A[row, t], config, penalty)
        loss.backward()
        sums += torch.stack([loss.detach(), *rest])  # loss, tokens, clipped tokens, penalty, sequences
        error = torch.maximum(error, (ratio - 1).abs().max())  # unlike max(), it keeps a nan
    total, tokens, clipped, penalties, sequences = sums.tolist()
    return {
        "loss": total,  # no measure of progress: at rho = 1 minus a weighted mean of centred advantages, about 0
        "clip_fraction": clipped / max(tokens, 1),  # share of the tokens whose gradient the clip removed
        "penalty": penalties / max(tokens, 1),  # per token at the drawn steps
        "ratio_error": error.item(),  # largest |rho - 1|: rounding (of kept sets too), right after a rollout
        "evaluations": int(sequences),  # sequences run forward and backward
    }


def pass_loss(model, inputs, place, part, t, weight, advantage, config, penalty):
    """Loss of part, a Rollout of b rows, at t with weight and advantage (b,); inputs and place of distinct_passes.
    Returns it, the ratios (N,), the numbers of tokens and of clipped ones, the sum of the penalty, and S."""
    ids, mask, wanted = inputs  # (S, L)
    positions, tokens, old_logp = part.action_at(t)  # (b, L), (N,), (N,)
    weight, advantage = (x[positions.nonzero()[:, 0]] for x in (weight, advantage))  # (N,): those of its row
    logits = model(ids, attention_mask=mask, positions=wanted)  # (N', V)
    logp = token_logprobs(logits, part.mask_token_id, config, (place, tokens))[place, tokens]  # (N,)
    objective = clipped_objective(logp, old_logp, advantage, config.epsilon_low, config.epsilon_high)
    cost = penalty(logits, *inputs)[place] if penalty else torch.zeros_like(objective)
    loss = -(weight * (objective - cost)).sum()
    ratio = (logp.detach() - old_logp).exp()
    clipped = (advantage > 0) & (ratio > 1 + config.epsilon_high) | (advantage < 0) & (ratio < 1 - config.epsilon_low)
    return loss, ratio, loss.new_tensor(len(ratio)), clipped.sum(), cost.detach().sum(), loss.new_tensor(len(ids))


# -------------------------------------------------------------------- the whole loop, on the smallest of tasks
class SmallModel(torch.nn.Sequential):
    """Ten digits, <eos> and [MASK] in five places, and an MLP over all of them. Nothing is pretrained."""

    mask_token_id, eos_token_id = 11, 10

    def __init__(self):
        mlp = torch.nn.Linear(5 * 32, 256), torch.nn.ReLU(), torch.nn.Linear(256, 5 * 12)
        super().__init__(torch.nn.Embedding(12, 32), torch.nn.Flatten(), *mlp, torch.nn.Unflatten(1, (5, 12)))

    def forward(self, input_ids, attention_mask, positions):
        return super().forward(input_ids)[positions]  # (B, L) -> (N, V)


def demonstration():
    """Write four digits, one a step, whose sum modulo 5 is the given one. In the second update the clip acts."""
    generator, config, model = torch.manual_seed(0), AGRPOConfig(4, mc_samples=2), SmallModel()  # one seed for all
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for i in range(1, 81):
        given = torch.randint(5, (32, 1), generator=generator).repeat_interleave(config.num_generations, 0)  # (B, 1)
        ids = torch.cat([given, torch.full((len(given), 4), model.mask_token_id)], 1)  # (B, 5)
        run = rollout(model, ids, torch.ones_like(ids, dtype=torch.bool), config, generator)
        digits = run.ids[:, 1:]  # (B, 4)
        rewards = ((digits < 10).all(1) & (digits.sum(1) % 5 == given[:, 0])).float()  # R (B,)
        for _ in range(2):
            A, w = estimate(run, rewards, config, generator)  # in each update steps are drawn anew
            optimizer.zero_grad()
            stats = accumulate_gradient(model, run, advantages=A, weights=w, config=config, micro_batch=512)
            optimizer.step()
        if i % 10 == 0:
            print(f"rollout {i}: reward {rewards.mean():.2f}; second update: {stats['clip_fraction']:.0%} clipped")
    print(f"a sum of {given[0].item()} modulo 5: {' + '.join(map(str, digits[0].tolist()))} = {digits[0].sum()}")


if __name__ == "__main__":
    demonstration()
