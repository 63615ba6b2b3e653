"""When is a cheap likelihood enough? A micro model whose tokens need the token before them not at all, a bit, entirely.

    python experiments/dial.py          a minute

Claim: the one-pass likelihood of diffu-GRPO is exact where tokens are independent given the question, and leaves the
policy gradient as each comes to depend on the one before. The ELBO is exact too for a model whose predictions all agree
with one distribution over answers, and for no other. The policy gradient's own estimators are exact for all. State
tracking in small: three states, two letters, three steps left to right, reward for the last state.
"""

import itertools
import statistics
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: the project's root
import variants
from experiments import contrasts, exact, oracle, report, runner

QUESTION = (1, 1, 2, 1, *[oracle.MASK] * 3)  # the start, three letters (1 or 2), three states to be written
DIALS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


class Chain(torch.nn.Module):
    """Logits sqrt(1 - dial^2) a_j + dial b[letter_j, x_(j-1)] of three states: each by its place, or by the one before.

    Where the one before is still [MASK] stands a row c_j of its own, trained to the marginal probability given the
    question, as a table would have it; and what comes after a state is not looked at."""

    mask_token_id, eos_token_id = oracle.MASK, 4  # no state ends an answer

    def __init__(self, seed, dial):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        a, b = (2 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 3), (2, 3, 3)))
        self.a, self.b, self.c = (torch.nn.Parameter(x) for x in (a, b, torch.zeros_like(a)))
        self.dial, self.answers = dial, torch.cartesian_prod(*[torch.arange(3)] * 3)  # (27, 3)
        unseen = torch.full((1, 3), oracle.MASK)
        self.c.data = ((self.true_logits(unseen) - self.logits(unseen))[0] / (dial or 1)).detach()

    def logits(self, seen):
        """Of each state (B, 3, 3), where seen (B, 3) is known in part."""
        before = torch.cat([torch.full_like(seen[:, :1], QUESTION[0]), seen[:, :-1]], 1)  # (B, 3)
        rows = self.b[torch.tensor(QUESTION[1:4]) - 1, before.clamp(max=2)]  # (B, 3, 3)
        rows = rows.where((before != oracle.MASK)[..., None], self.c)
        return (1 - self.dial**2) ** 0.5 * self.a + self.dial * rows

    def true_logits(self, seen):
        """The same by the sum over all answers: log p(state | what is known, before and after it) + a constant."""
        logp = self.logits(self.answers).log_softmax(-1).gather(2, self.answers[..., None]).sum((1, 2))  # (27,)
        possible = ((seen[:, None] == oracle.MASK) | (seen[:, None] == self.answers)).all(2)  # (B, 27)
        has = self.answers[..., None] == torch.arange(3)  # (27, 3, 3): answer, place, state
        never = torch.tensor(-1e4, dtype=logp.dtype)
        return logp[:, None, None].where(possible[..., None, None] & has, never).logsumexp(1)

    def forward(self, input_ids, attention_mask=None, positions=None):
        """ids (B, 7) -> logits (B, 7, 4), or (N, 4) at the positions; [MASK] and what is given are never asked for."""
        logits = torch.nn.functional.pad(self.logits(input_ids[:, 4:]), (0, 1, 4, 0))
        return logits if positions is None else logits[positions]


class Consistent(Chain):
    """The same policy, all its predictions true ones: what a likelihood misses is not the model's fault."""

    def forward(self, input_ids, attention_mask=None, positions=None):
        logits = torch.nn.functional.pad(self.true_logits(input_ids[:, 4:]), (0, 1, 4, 0))
        return logits if positions is None else logits[positions]


def last_state(questions, ids):
    """R (B,): 1 where the last state is 0."""
    return (ids[:, -1] == 0).double()


ESTIMATORS = {
    "AGRPO, k = 2": partial(exact.measure, options={}),
    "AGRPO-SA (ours)": partial(
        exact.measure, options=exact.THREES | exact.ONE, estimate=variants.agrpo_sa, draws=exact.shared_draws
    ),
    "ELBO of random masks": partial(exact.likelihood, accumulate=exact.ELBO, masks=exact.all_masks(3)),
    "one pass (diffu-GRPO)": partial(
        exact.likelihood, accumulate=contrasts.diffu_grpo, masks=torch.ones(1, 3, dtype=torch.bool)
    ),
}


WORLDS = {"unseen states have a row of their own": Chain, "predictions agree with one distribution": Consistent}


def finding(scale):
    seeds, rows = range(2 if scale == runner.QUICK else 25), {}
    policy = {"ids": QUESTION, "sampling_steps": 3, "block_length": 1}
    for (title, model), dial in itertools.product(WORLDS.items(), DIALS):
        problems = [oracle.Problem(seed, world=(model(seed, dial), last_state), **policy) for seed in seeds]
        for name, measure in ESTIMATORS.items():
            measured = [measure(problem) for problem in problems]
            kept = {of: [x[of] for x in measured] for of in ("cosine", "beyond_scale")}
            rows.setdefault(title, {}).setdefault(name, {})[dial] = kept
    for title, of in itertools.product(rows, ("cosine", "beyond_scale")):
        medians = {name: [statistics.median(x[of]) for x in row.values()] for name, row in rows[title].items()}
        cells = {name: [f"{x:.3g}" for x in row] for name, row in medians.items()}
        report.print_table([f"dial {dial:g}" for dial in DIALS], cells, f"{title}: {of}, median of {len(seeds)}")
    report.finish("dial", {"rows": rows}, partial(draw, rows), (11, 4), (1, 2))


def draw(rows, axes):
    """The median cosine of each estimator, with the quarters of the models around it."""
    for axis, (title, estimators) in zip(axes, rows.items()):
        for width, (name, row) in zip((7, 4, 2, 1), estimators.items()):  # what lies on top leaves the rest to be seen
            low, middle, high = zip(*(statistics.quantiles(x["cosine"], n=4) for x in row.values()))
            line = axis.plot(list(row), middle, "o-", lw=width, label=name)[0]
            axis.fill_between(list(row), low, high, color=line.get_color(), alpha=0.12, lw=0)
        axis.set(title=title, xlabel="dial: how much a state depends on the one before", ylim=(-0.05, 1.05))
    axes[0].set(ylabel="cosine with the policy gradient")
    axes[0].legend()


if __name__ == "__main__":
    runner.main(finding, __doc__)
