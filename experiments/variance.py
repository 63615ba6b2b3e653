"""How noisy is each estimator on the real tiny tasks?

    python experiments/variance.py      half an hour, 3 GB a process

Claim: ours has about half the variance of the official draws at as many evaluations, at the base model and after
training: most of what drawing timesteps adds is avoidable.

A batch is rolled out, and the score grad log pi(a_t | s_t) of every step of every completion is computed: B m vectors.
Every estimator of the policy gradient is a weighted sum of them, so what drawing k timesteps per completion adds to its
variance needs no sampling: it follows from the products of the scores, and an integral over the uniforms. What is left,
the variance of the full sum over prompts, completions and orders, is measured from batch to batch. All estimators see
the same completions.
"""

import math
import statistics
import sys
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: the project's root
import agrpo
import train
import variants
from experiments import exact, oracle, runner
from experiments.report import T_975, finish, print_table, verdict
from support.runs import streams

GROUP_MEAN, RAMP = "group mean", "c_t = t / m, gate"
# The official draws count as independent ones: that they are stratified over the batch saves a third of a per cent.
FULL, OFFICIAL, DEFAULT, SHARED = "full sum", "entropy, independent", "uniform, low discrepancy", "shared by the batch"


# --------------------------------------------------------------------------------------------- one run
def measure_variance(task, m, updates, batches, prompts, base_steps, shared_order=True, seed=0):
    """Of the gradient sum_t w_t A S (the sum over steps, without the 1 / m of the loss), on a base model or after some
    updates of k = 2.

    Returns {"full": {baseline: products (batches, batches) of the full sums}, "added": {k: {draws: {baseline: [what
    they add to the variance of each batch]}}}, "sequences": distinct states of a batch}."""
    flags = "--sampling-steps", m, "--mc-samples", 2, "--shared-order" if shared_order else "--no-shared-order"
    setup, passed = runner.base_of(task, seed, base_steps, 0, *flags), []
    examples = setup.task.load("train")
    rng, generator = streams(seed, "reinforce")
    optimizer = torch.optim.AdamW(setup.model.parameters(), lr=setup.run.learning_rate, weight_decay=0.0, fused=True)
    for _ in range(updates):
        train.update(setup, rng.choices(examples, k=16), optimizer, generator)
    rng, generator = streams(seed, "variance")
    full, added, sequences = defaultdict(list), defaultdict(lambda: defaultdict(lambda: defaultdict(list))), 0
    setup.model.register_forward_pre_hook(lambda _, inputs: passed.append(len(inputs[0])))
    for _ in range(batches):
        passed.clear()
        run, R, r = roll_out(setup, rng.choices(examples, k=prompts), generator)
        sequences += sum(passed)
        S = torch.empty(len(R), m, sum(parameter.numel() for parameter in setup.model.parameters()))  # gigabytes
        for rows in torch.arange(len(R)).split(32):
            distinct, index = exact.scores(setup.model, run[rows], setup.config)
            S[rows] = distinct[index]
        S = S.flatten(0, 1)  # (B m, parameters)
        products = (S @ S.T).double()
        baselines = advantages_of(run, R, r, setup.config)
        for baseline, A in baselines.items():
            full[baseline].append(A.flatten().float() @ S / len(R))
            for k in (k for k in (1, 2, 4) if k < m):
                for name, value in added_by_draws(run, A, baselines[GROUP_MEAN], products, k).items():
                    added[f"k = {k}"][name][baseline].append(value / len(R) ** 2)
    full = {name: (torch.stack(g) @ torch.stack(g).T).tolist() for name, g in full.items()}
    return {"full": full, "added": added, "sequences": sequences / batches}


def roll_out(setup, prompts, generator):
    """A batch of G completions per prompt: the Rollout, rewards R (B,), step rewards r_t (B, m); nothing is learnt."""
    setup = replace(setup, estimate=variants.agrpo_sa)  # which asks for step rewards
    run, rewards, step_rewards, _ = train.roll_out(setup, prompts, generator)
    return run, rewards.double(), step_rewards(torch.ones(len(rewards), dtype=torch.bool)).double()


def advantages_of(run, R, r, config):
    """{baseline: A (B, m) float64}."""
    ramp, stepwise = torch.arange(r.shape[1]) / r.shape[1], partial(variants.stepwise_advantages, run, R, r, config)
    return {
        GROUP_MEAN: variants.group_mean(run, R, config),
        "c = 1/3 (EGSPO-SA's)": stepwise(1 / 3, gate=False),
        "c_t = t / m, no gate": stepwise(ramp, gate=False),
        RAMP: stepwise(ramp, gate=True),
    }


# ------------------------------------------------------------------------------------- what draws add
def added_by_draws(run, A, plain, products, k):
    """{draws: E||sum_it w_it A_it S_it - sum_it A_it S_it||^2}, w of mean 1, exactly.

    A, plain (B, m): advantages, and those of the official scheme; products (B m, B m) of the scores S."""
    B, m = A.shape
    H, norms = run.step_entropies() + 1e-8, products.diagonal().view(B, m).sqrt()
    K = A[:, :, None] * products.view(B, m, B, m).diagonal(dim1=0, dim2=2).permute(2, 0, 1) * A[:, None]  # (B, m, m)
    found = {FULL: 0.0}
    named = {"uniform": torch.ones_like(H), "entropy": H, "square root of entropy": H.sqrt()}
    for name, q in (named | {"oracle: |A_t| x norm of the score": norms * A.abs() + 1e-12}).items():
        q = q / q.sum(1, keepdim=True)
        found[f"{name}, independent"] = ((K.diagonal(dim1=1, dim2=2) / q).sum() - K.sum()).item() / k
        pieces = oracle.outcomes(lambda q=q: (A, agrpo.timestep_weights(q, low_discrepancy(len(q), k)) * m))
        squares = sum(chance @ torch.einsum("bs,bst,bt->b", w, K, w) for chance, _, w in pieces)
        found[f"{name}, low discrepancy"] = (squares - K.sum()).item()
    q = H / H.sum(1, keepdim=True)
    # As many evaluations as the official draws, some of which fall on one step twice, need in the update.
    total = ((1 - (1 - q) ** k) * (plain != 0)).sum()
    p = variants.inclusion_probabilities(variants.batch_proposal(run, A), total)
    pieces = oracle.outcomes(lambda: (A, variants.systematic_draw(p, agrpo.uniforms((), None)) / p.clamp(min=1e-300)))
    chance, _, w = (torch.stack(column) for column in zip(*pieces))
    error = ((w - 1) * A).flatten(1)  # (pieces, B m)
    found[SHARED] = (chance[:, 0] @ ((error @ products) * error).sum(1)).item()
    return found


def low_discrepancy(rows, k):
    """u (rows, k), as agrpo.sample_timesteps has them."""
    return (torch.arange(k) + agrpo.uniforms((rows, 1), None)) / k


# ------------------------------------------------------------------------------------- the finding
def full_sum(measured, baseline, keep):
    """Of the batches `keep`: the variance of a batch's full sum, and the squared gradient."""
    M = torch.tensor(measured["full"][baseline], dtype=torch.float64)[keep][:, keep]
    own, cross = M.diagonal().mean(), (M.sum() - M.diagonal().sum()) / (len(M) * (len(M) - 1))
    return (own - cross).item(), cross.item() or math.nan  # nan: no gradient, in --quick


def variance(measured, k, draws, baseline, keep):
    """Of a batch's gradient, the draws of its timesteps included."""
    added = torch.tensor(measured["added"][k][draws][baseline])[keep].mean().item()
    return full_sum(measured, baseline, keep)[0] + added


def ratio(one, other, batches):
    """[one(batches) / other(batches), half of its 95% interval], by a jackknife over batches."""
    values = [one(keep) / (other(keep) or math.nan) for keep in (batches, *(batches[batches != i] for i in batches))]
    return [values[0], T_975[len(batches)] * ((len(batches) - 1) * statistics.pvariance(values[1:])) ** 0.5]


def summary(measured):
    """Variance over the squared gradient {k: {draws: {baseline: x}}}; ours over the official scheme's {k: ratio}."""
    batches = torch.arange(len(measured["full"][RAMP]))
    rows, ratios, square = {}, {}, full_sum(measured, RAMP, batches)[1]
    for k, draws in measured["added"].items():
        of = partial(partial, variance, measured, k)
        rows[k] = {name: {b: of(name, b)(batches) / square for b in baselines} for name, baselines in draws.items()}
        ratios[k] = ratio(of(SHARED, RAMP), of(OFFICIAL, GROUP_MEAN), batches)
    return {"variance / squared gradient": rows, "ours / official": ratios}


def finding(scale):
    quick, steps = scale == runner.QUICK, {"countdown": 3000, "sudoku": 600}  # as train.py has them
    size = {"batches": 2, "prompts": 2} if quick else {"batches": 10, "prompts": 32}
    cases = [("countdown", 6, 150), ("countdown", 6, 0), ("sudoku", 8, 0), ("sudoku", 8, 80), ("countdown", 2, 0)]
    jobs = [{"task": task, "m": m, "updates": u, "base_steps": steps[task]} | size for task, m, u in cases]
    jobs = [jobs[0] | {"updates": 1, "base_steps": scale.base_steps}] if quick else jobs
    own_order = [job | {"shared_order": False} for job in jobs if not job["updates"] or quick]
    bases = [{"task": job["task"], "seed": 0, "base_steps": job["base_steps"]} for job in jobs]
    runner.do_all(runner.make_base, bases, "base models")
    done = runner.do_all(measure_variance, jobs + own_order, "variance")
    results, orders = {}, {}
    for job, measured in zip(jobs, done):
        results[title(job)] = summary(measured)
        for k, rows in results[title(job)]["variance / squared gradient"].items():
            cells = {label: [f"{x:.2f}" for x in row.values()] for label, row in rows.items()}
            print_table(list(measured["full"]), cells, f"{title(job)}, {k}: variance / squared gradient")
            less, half = results[title(job)]["ours / official"][k]
            verdict("ours has less variance than the official draws", [1 - less, half], "% less")
    for job, own in zip(own_order, done[len(jobs) :]):
        common, k = done[jobs.index({name: job[name] for name in jobs[0]})], list(own["added"])[:2][-1]
        of = [partial(variance, x, k, DEFAULT, GROUP_MEAN) for x in (common, own)]
        more, half = ratio(*of, torch.arange(size["batches"]))
        share = common["sequences"] / own["sequences"]
        orders[title(job)] = {"variance": [more, half], "sequences": share}
        print(f"\n{title(job)}: with a common order {share:.0%} of the sequences")
        verdict("a common order has more variance", [more - 1, half], "% more")
    finish("variance", {"settings": results, "common / own order": orders}, partial(draw, results), (13, 6), (2, 3))


def title(job):
    return f"{job['task'].capitalize()}, m = {job['m']}, {'trained' if job['updates'] else 'base'}"


def draw(cases, axes):
    """What two timesteps (m = 2: one) have, with the group mean and with ours; dotted: the full sum."""
    for axis, (name, result) in zip(axes, cases.items()):
        k, rows = list(result["variance / squared gradient"].items())[:2][-1]
        for i, baseline in enumerate((GROUP_MEAN, RAMP)):
            values = [row[baseline] for row in rows.values()]
            axis.plot(values, list(rows), "o", color=f"C{i}", label=baseline)
            axis.axvline(rows[FULL][baseline], color=f"C{i}", ls=":")
        axis.invert_yaxis()
        axis.set(title=f"{name}, {k}", xlabel="variance / squared gradient")
    axes[0].legend()


if __name__ == "__main__":
    runner.main(finding, __doc__)
