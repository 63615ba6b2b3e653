"""Variants of AGRPO: what others do and what we do, each a small diff over agrpo.py.

An estimator is a function with the signature of agrpo.estimate that returns advantages (B, m) and weights (B, m).
`--algorithm` names one of these, or `my_file.py:my_function`. Beyond scale is the bias that no learning rate absorbs:
medians over random models, diffuse and sharp, by enumeration (experiments/exact.py, docs/laboratory.md).

    --algorithm  steps in the update            weight w_t           advantage A_t               bias beyond scale
    agrpo        k drawn by q                   1 / (k q m)          R - group mean              none
    paper        the same, up to the last       1 / (k q T)          the same                    0.16, 0.19
                 token that is not <eos>
    egspo        the k of highest entropy       T / (k m)            the same                    0.24, 0.19
    egspo-sa     the same                       the same             the same - (r_t - its       0.24, 0.19
                                                                     mean) / 3
    agrpo-sa     drawn from the whole batch,    1 / (p m)            the same - t/m (r_t -       none
    (ours)       step t with probability p                           its mean), gated

r_t is the reward of the greedy completion of the state s_t: all its [MASK] filled at once by the likeliest tokens.
Below the estimators: what they are made of, penalties (KL, entropy), and low-confidence unmasking.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch

import agrpo
from agrpo import Rollout, require


# ---------------------------------------------------------------------------------------------- estimators
def paper(run, rewards, config, generator, step_rewards=None):
    """Replaces the horizon, the mean and the draws by those of the AGRPO paper and its code (arXiv 2510.04019).

    Only steps up to the one that wrote the last token other than <eos> count, and their mean is over so many. Biased
    twice: 1 / T depends on what was drawn, and the decision to write <eos> gets no gradient. The draws are stratified
    over the batch and shuffled, which is unbiased, but a completion may draw a step twice."""
    kept = (run.ids != run.eos_token_id) & (run.unmask_step >= 0)
    horizon = run.unmask_step.where(kept, 0).amax(1) + 1  # T (B,), at least 1
    u = stratified_over_batch(len(rewards), min(config.mc_samples, run.sampling_steps), generator).to(horizon.device)
    weights = agrpo.timestep_weights(agrpo.proposal(replace(run, steps_taken=horizon), config), u)
    return group_mean(run, rewards, config), weights * run.sampling_steps / horizon[:, None]


def egspo(run, rewards, config, generator, step_rewards=None):
    """Replaces the draw by the k steps of highest entropy (EGSPO, arXiv 2603.12554). Biased: the others never count."""
    return group_mean(run, rewards, config), top_entropy_weights(run, config)


def egspo_sa(run, rewards, config, generator, step_rewards=None):
    """EGSPO with stepwise advantages: c r_t is subtracted, c = lambda / (1 + lambda) at lambda = 1/2. Biased as EGSPO.

    The paper's return (R + lambda (R - r_t)) / (1 + lambda) is R - c r_t. Its mean is taken at the same step; theirs,
    slot by slot over whatever steps were selected, is biased, as later states decide which step stands in a slot."""
    r = step_rewards(torch.ones(len(rewards), dtype=torch.bool))
    return stepwise_advantages(run, rewards, r, config, c=1 / 3, gate=False), top_entropy_weights(run, config)


def agrpo_sa(run, rewards, config, generator, step_rewards=None):
    """Ours: a baseline that looks at the state, and draws shared by the batch. Exact, at about half the variance.

    c_t = t / m, as much as r_t knows of R: nothing at the first step, almost all at the last. Draws go where |A_t| and
    the entropy are large; a step of advantage 0 is never drawn, so it carries no penalty."""
    require(config.num_generations >= 3, "agrpo-sa needs num_generations 3: with one fellow its gate is always shut")
    signal = (rewards.view(-1, config.num_generations) != rewards[:: config.num_generations, None]).any(1)
    r = step_rewards(signal.repeat_interleave(config.num_generations))  # elsewhere the gate is shut
    c = torch.arange(run.sampling_steps, dtype=r.dtype) / run.sampling_steps  # (m,)
    advantages = stepwise_advantages(run, rewards, r, config, c, gate=True)
    return advantages, shared_weights(run, advantages, config, generator)


egspo_sa.needs_step_rewards = agrpo_sa.needs_step_rewards = True  # the rollout must note greedy completions
agrpo_sa.needs_advantage = True  # no penalty reaches a step whose advantage is 0
ALGORITHMS = {"agrpo": agrpo.estimate, "paper": paper, "egspo": egspo, "egspo-sa": egspo_sa, "agrpo-sa": agrpo_sa}


# ---------------------------------------------------------------------------------------------- advantages
def group_mean(run, rewards, config):
    """AGRPO's advantages (B, m): R - mean of the group, at every step."""
    advantages = agrpo.group_advantages(rewards, config.num_generations).to(run.ids.device)
    return advantages[:, None].expand(-1, run.sampling_steps)


def stepwise_advantages(run, rewards, step_rewards, config, c, gate):
    """A_t = R - c_t r_t - mean over the others j of the group of (R_j - c_t r_jt), times (G - 1) / G: (B, m).

    rewards R (B,); step_rewards r (B, m), after the last step R itself; c a number or (m,).
    r_t is a function of the state, which comes before the action, and the mean looks at other completions alone, at
    the same t: subtracting them leaves the expected gradient as it is, however timesteps are drawn. (Of R, the own
    sample in the mean only changes the scale; of r_t it would bias.) gate: c is 0 for a completion whose fellows all
    agree in reward. It looks at the others alone, so it is exact too, and a group that agrees costs no update."""
    G, plain = config.num_generations, agrpo.group_advantages(rewards, config.num_generations)  # (B,)
    require(bool(torch.isfinite(step_rewards).all()), "a reward is not finite")
    r = step_rewards.where(executed_steps(run).to(rewards.device), rewards[:, None]).view(-1, G, run.sampling_steps)
    centred = r - (r.sum(1, keepdim=True) - r) / (G - 1)  # r_t less the mean of the others
    centred = centred.masked_fill((r == r[:, :1]).all(1, keepdim=True), 0).view(len(rewards), -1)  # not 3e-8
    if gate:
        others = ~torch.eye(G, dtype=torch.bool, device=rewards.device)
        fellows = rewards.view(-1, 1, G).expand(-1, G, G)[:, others].view(-1, G - 1)  # (B, G - 1)
        centred = centred * (fellows != fellows[:, :1]).any(1, keepdim=True)
    return (plain[:, None] - c * centred * (G - 1) / G).to(run.ids.device)


class GreedyCompletions:
    """A model that, while it serves a rollout, notes the greedy completion of every state that it is asked about.

    It asks for the logits of every [MASK] and hands back those asked for. Noted under the state, not under row or
    call: micro-batches, stopped rows and shared states do not matter."""

    def __init__(self, model):
        self.model, self.completions = model, {}
        self.mask_token_id, self.eos_token_id = model.mask_token_id, model.eos_token_id

    def __call__(self, input_ids, attention_mask, positions):
        hidden = input_ids == self.mask_token_id  # (B, L), M in all
        logits = self.model(input_ids, attention_mask=attention_mask, positions=hidden)  # (M, V)
        likeliest = logits.index_fill(-1, torch.tensor(self.mask_token_id, device=logits.device), -torch.inf).argmax(-1)
        filled = input_ids.masked_scatter(hidden, likeliest).cpu()  # (B, L)
        self.completions |= zip(self.keys(input_ids, attention_mask), filled)
        return logits[positions[hidden]]

    @staticmethod
    def keys(ids, attention_mask):
        return [row.tobytes() for row in ids.masked_fill(~attention_mask, -1).cpu().numpy()]  # padding: any token

    def step_rewards(self, run, judge, G):
        """What an estimator calls: rows (B,) bool -> r (B, m), 0 for other rows and after the last step.

        judge(questions (N,), ids (N, L)) -> rewards (N,); question i has the rows i G .. i G + G - 1. Equal
        completions of a question are judged once."""

        def of(rows):
            row, t = (executed_steps(run) & rows.to(run.ids.device)[:, None]).nonzero(as_tuple=True)
            r = torch.zeros(len(run.ids), run.sampling_steps)
            if len(row):
                found = [self.completions[key] for key in self.keys(run[row].state_at(t), run.attention_mask[row])]
                pairs = torch.cat([row[:, None].cpu() // G, torch.stack(found)], 1)  # (B m, 1 + L)
                distinct, index = pairs.unique(dim=0, return_inverse=True)
                judged = judge(distinct[:, 0], distinct[:, 1:])
                r = r.to(judged.dtype).index_put((row.cpu(), t.cpu()), judged[index])
            return r

        return of


# ------------------------------------------------------------------------------------------------- weights
def executed_steps(run):
    """(B, m) bool: the steps t < T that were taken."""
    return torch.arange(run.sampling_steps, device=run.ids.device) < run.steps_taken[:, None]


def top_entropy_weights(run, config):
    """(B, m): T / (k m) for the k steps of highest entropy of their tokens; 1 / m for all if there are no more."""
    k, executed = min(config.mc_samples, run.sampling_steps), executed_steps(run)
    H = (Rollout.step_entropies(run) + 1e-8).where(executed, 0)  # of what was kept, also under low confidence
    best = H.argsort(dim=1, descending=True, stable=True)[:, :k]
    T = run.steps_taken[:, None]
    chosen = torch.zeros_like(H).scatter(1, best, (T.double() / k / run.sampling_steps).expand(-1, k))
    return torch.where(k >= T, executed.double() / run.sampling_steps, chosen)


def stratified_over_batch(rows, k, generator):
    """u (rows, k): one uniform from each of rows x k equal parts of [0, 1), shuffled over the batch."""
    strata = torch.randperm(rows * k, generator=generator).view(rows, k)
    return (strata + agrpo.uniforms((rows, k), generator)) / strata.numel()


def shared_weights(run, advantages, config, generator):
    """w (B, m) = 1 / (p m) for the steps that the batch takes, k on average per completion that has an advantage."""
    q, k = batch_proposal(run, advantages), min(config.mc_samples, run.sampling_steps)
    p = inclusion_probabilities(q, total=k * int((q > 0).any(1).sum()))
    taken = systematic_draw(p, agrpo.uniforms((), generator).to(p.device))
    return taken / p.where(taken > 0, 1.0) / run.sampling_steps


def batch_proposal(run, advantages):
    """q (B, m) float64, sum 1: the share of the batch's draws that each step should get; all 0 without advantages.

    The variance is least where a step is taken with a probability in proportion to the norm of its term,
    |A_t| ||grad log pi(a_t | s_t)||, and the squared norm of that gradient is about as large as the entropy H_t."""
    q = advantages.double().abs() * executed_steps(run) * (run.step_entropies() + 1e-8).sqrt()
    return q / q.sum().clamp(min=1e-300)


def inclusion_probabilities(q, total):
    """p = min(1, kappa q), of any shape, with sum p = total, or 1 for every positive q if they are fewer.

    For q = .5 .3 .1 .1 and total 2, kappa = 2 would make p = 1 .6 .2 .2: the first is capped at 1, and the others
    share what is left of the total with a larger kappa. Each round makes at least one more step certain."""
    certain = torch.zeros_like(q, dtype=torch.bool)
    while True:
        rest = q.where(~certain, 0.0)
        p = (rest * ((total - certain.sum()) / rest.sum().clamp(min=1e-200))).where(~certain, 1.0)
        if not (p > 1).any():
            return p
        certain |= p >= 1


def systematic_draw(p, U):
    """Which steps are taken, 0 or 1 of the shape of p, each with probability p, all by one uniform U ().

    The p are laid end to end, and a comb of spacing 1, shifted by U, takes those that it hits:

        p          |---.6---|-.2-|------.9------|--.3--|
        comb            ^                 ^                       1 0 1 0

    No step is hit twice, and the number of hits differs from sum p by less than 1."""
    passed = (p.flatten().cumsum(0) + U).floor()  # integers in front of each end
    return passed.diff(prepend=passed.new_zeros(1)).view_as(p)


# ----------------------------------------------------------------------------------------------- penalties
def kl_penalty(reference, beta, config, mask_token_id):
    """beta KL(pi || reference) in nats at every scored token, summed exactly over the vocabulary, not sampled.

    Exact at each visited state; how theta changes which states are visited gets no gradient (beyond scale 0.04 to
    0.09 of the trajectories' KL). Before top-k and top-p: the reference may lack a token that is kept here."""
    whole = replace(config, top_k=None, top_p=1.0)

    def penalty(logits, input_ids, attention_mask, positions):
        with torch.no_grad():
            theirs = reference(input_ids, attention_mask=attention_mask, positions=positions)  # (N, V)
        logp, logp_reference = (agrpo.token_logprobs(x, mask_token_id, whole) for x in (logits, theirs))
        return beta * (logp.exp() * (logp - logp_reference)).sum(-1)

    return penalty


def entropy_penalty(bonus, config, mask_token_id):
    """- bonus H at every scored token: an entropy bonus. Per state, as the KL is (beyond scale 0.02 to 0.03)."""
    return lambda logits, *_: -bonus * agrpo.entropy(agrpo.token_logprobs(logits, mask_token_id, config))


# -------------------------------------------------------------------------------- low-confidence unmasking
def unmask_low_confidence(model, run, t, block, count, config, uniforms, micro_batch, remember=None):
    """A step for agrpo.rollout: draw every [MASK] of the block, keep the `count` most confident. At temperature 0 this
    is LLaDA's decoding. remember(t, positions, drawn) is told all that was drawn."""
    hidden = block & (run.ids == run.mask_token_id)  # (B, L)
    drawn = agrpo.draw_tokens(model, run, hidden, config, uniforms, micro_batch)  # three of (B, L)
    best = drawn[1].masked_fill(~hidden, -torch.inf).topk(count).indices  # (B, count)
    agrpo.write(run, t, torch.zeros_like(hidden).scatter(1, best, True) & hidden, drawn)
    if remember:
        remember(t, hidden, drawn)


@dataclass
class LowConfidenceRollout(Rollout):
    """A Rollout whose action is all that a step drew; keeping the most confident of it is the environment's answer.

    pi(a_t | s_t) is then the product over all drawn tokens, exact almost everywhere: the ranking depends on theta only
    through jumps. To score the kept tokens alone is biased (beyond scale 0.15, 0.11): that a token was kept says that
    it was drawn likely, and its probability of being kept is not its probability of being drawn."""

    drawn_ids: torch.Tensor = None  # (B, m, L) long: every token drawn at each step, -1: none
    drawn_logprobs: torch.Tensor = None  # (B, m, L)
    drawn_entropy: torch.Tensor = None  # (B, m)

    def action_at(self, t):
        rows = torch.arange(len(t), device=t.device)
        tokens, drawn = self.drawn_ids[rows, t], self.drawn_ids[rows, t] >= 0  # (B, L)
        return drawn, tokens[drawn], self.drawn_logprobs[rows, t][drawn]

    def step_entropies(self):
        return self.drawn_entropy


def rollout_low_confidence(model, ids, attention_mask, config, generator, micro_batch=None):
    """agrpo.rollout under low-confidence unmasking, as a LowConfidenceRollout."""
    found = []

    def remember(t, positions, drawn):
        tokens, logprobs, H = drawn
        found.append((tokens.masked_fill(~positions, -1), logprobs, H.sum(1)))

    step = partial(unmask_low_confidence, remember=remember)
    run = agrpo.rollout(model, ids, attention_mask, config, generator, micro_batch, step)
    drawn_ids, drawn_logprobs, drawn_entropy = (torch.stack(tables, 1) for tables in zip(*found))
    drawn = {"drawn_ids": drawn_ids, "drawn_logprobs": drawn_logprobs, "drawn_entropy": drawn_entropy}
    return LowConfidenceRollout(**vars(run), **drawn)


def rollout_kept(model, ids, attention_mask, config, generator, micro_batch=None):
    """agrpo.rollout under low-confidence unmasking, whose action is what was kept: EGSPO's published way. Biased."""
    return agrpo.rollout(model, ids, attention_mask, config, generator, micro_batch, unmask_low_confidence)


ROLLOUTS = {"random": agrpo.rollout, "low_confidence": rollout_low_confidence, "low_confidence_kept": rollout_kept}
