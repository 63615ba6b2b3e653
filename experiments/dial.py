"""When is a cheap likelihood enough? A micro model whose tokens need the token before them not at all, a bit, entirely.

    python experiments/dial.py          seconds

Claim: the one-pass likelihood of diffu-GRPO is exact where tokens are independent given the question, and leaves the
policy gradient as each comes to depend on the one before; the ELBO leaves it less; the exact estimators never do.
State tracking in small: three states, two letters, three steps left to right, reward for the last state.
"""

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
    """p(x_1 x_2 x_3), logits sqrt(1 - dial^2) a_j + dial b[letter_j, x_(j-1)]: a state by its place or by the one before.

    Asked about a half-masked answer it gives each token's true conditional probability, as a perfectly trained masked
    diffusion model would: whatever a likelihood of one pass misses is not the model's fault."""

    mask_token_id, eos_token_id = oracle.MASK, 4  # no state ends an answer

    def __init__(self, seed, dial):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        a, b = (2 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 3), (2, 3, 3)))
        self.a, self.b, self.dial = torch.nn.Parameter(a), torch.nn.Parameter(b), dial
        self.answers = torch.cartesian_prod(*[torch.arange(3)] * 3)  # (27, 3)

    def forward(self, input_ids, attention_mask=None, positions=None):
        """ids (B, 7) -> logits (B, 7, 4), or (N, 4) at the positions."""
        start, *letters = QUESTION[:4]
        before = torch.cat([torch.full((27, 1), start), self.answers[:, :-1]], 1)  # (27, 3)
        logits = (1 - self.dial**2) ** 0.5 * self.a + self.dial * self.b[
            torch.tensor(letters) - 1, before
        ]  # (27, 3, 3)
        logp = logits.log_softmax(-1).gather(2, self.answers[..., None]).sum((1, 2))  # (27,)
        seen = input_ids[:, None, 4:]  # (B, 1, 3)
        possible = ((seen == oracle.MASK) | (seen == self.answers)).all(2)  # (B, 27)
        has = self.answers[..., None] == torch.arange(3)  # (27, 3, 3): answer, place, state
        never = torch.tensor(-1e4, dtype=logp.dtype)
        found = logp[:, None, None].where(possible[..., None, None] & has, never).logsumexp(1)  # (B, 3, 3)
        logits = torch.nn.functional.pad(found, (0, 1, 4, 0))  # [MASK] and what is given: never asked
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


def finding(scale):
    seeds = range(2 if scale == runner.QUICK else 25)
    rows = {name: {} for name in ESTIMATORS}
    for dial in DIALS:
        policy = {"ids": QUESTION, "sampling_steps": 3, "block_length": 1}
        problems = [oracle.Problem(seed, world=(Chain(seed, dial), last_state), **policy) for seed in seeds]
        for name, measure in ESTIMATORS.items():
            measured = [measure(problem) for problem in problems]
            rows[name][dial] = {of: sorted(x[of] for x in measured) for of in ("cosine", "beyond_scale")}
    for title, of in (
        ("cosine with the policy gradient", "cosine"),
        ("bias that no learning rate absorbs", "beyond_scale"),
    ):
        cells = {name: [f"{statistics.median(x[of]):.3g}" for x in row.values()] for name, row in rows.items()}
        report.print_table([f"dial {dial:g}" for dial in DIALS], cells, f"{title}, median of {len(seeds)} models")
    report.finish("dial", {"rows": rows}, partial(draw, rows), (6, 4), (1, 1))


def draw(rows, axes):
    """The median cosine of each estimator, with the quarters of the models around it."""
    for name, row in rows.items():
        low, middle, high = zip(*(statistics.quantiles(x["cosine"], n=4) for x in row.values()))
        line = axes[0].plot(list(row), middle, "o-", label=name)[0]
        axes[0].fill_between(list(row), low, high, color=line.get_color(), alpha=0.12, lw=0)
    axes[0].set(xlabel="dial: how much a state depends on the one before", ylabel="cosine with the policy gradient")
    axes[0].legend()


if __name__ == "__main__":
    runner.main(finding, __doc__)
