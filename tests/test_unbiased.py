"""The expectation of the gradient that training follows is the policy gradient, to 1e-10: by enumeration, in float64.

What is biased is offered under its name, and its bias is measured here. `pytest -s tests/test_unbiased.py` prints
the table.
"""

import itertools
import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import agrpo
import variants
from experiments import contrasts, exact, oracle, runner

LEFT_TO_RIGHT = {"block_length": 1}
TWO_TOKENS = {"ids": oracle.QUESTION[:-2], "sampling_steps": 2, "block_length": 1}  # seven trajectories
CONFIDENT_BLOCKS = {"unmasking": "low_confidence", "block_length": 2, "temperature": 0.7}


# ---- The table ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", exact.EXACT)
def test_the_expected_gradient_is_the_policy_gradient(name):
    for seed, sharpness in ((0, 1.0), (2, 4.0)):
        assert exact.EXACT[name](seed, sharpness)["bias"] < 1e-10


def test_it_is_for_a_reward_of_27_different_values():
    x = oracle.problem(0, levels=10**6, **exact.SHORT)
    assert len(x.rewards.unique()) == 27 and exact.measure(x, exact.ENTROPY)["bias"] < 1e-10


@pytest.fixture(scope="module")
def biases():
    rows = exact.medians([{name: row(seed) for name, row in exact.BIASED.items()} for seed in range(3)])
    exact.print_rows(rows)
    return rows


BEYOND_SCALE = {  # no learning rate makes up for these: at least so much
    "horizon: last token that is not end-of-text": 0.05,
    "the same, per-trajectory mean (the paper's)": 0.05,
    "per-trajectory mean, blocks with early stop": 0.05,
    "group mean / standard deviation, G = 4": 0.01,
    "KL per state, against the trajectory's KL": 0.01,
    "entropy per state, against the trajectory's entropy": 0.01,
    "entropy without importance weights": 0.01,
    "k steps of highest entropy (EGSPO)": 0.1,
    "k steps of highest entropy, r_t (EGSPO-SA)": 0.1,
    "r_t, a mean per slot of the draw": 0.001,
    "r_t, a mean per slot, blocks with early stop": 0.01,
    "r_t, own steps in the mean": 0.03,
    "low confidence, kept tokens alone": 0.05,
    "one pass, all masked (diffu-GRPO)": 0.2,
    "ELBO of random masks (ESPO, BGPO)": 0.01,
}
GROUP_MEAN = "group mean, own sample included, G = 4"


@pytest.mark.parametrize("name", BEYOND_SCALE)
def test_what_is_called_biased_is_biased_beyond_scale(biases, name):
    assert biases[name]["beyond_scale"] > BEYOND_SCALE[name]


def test_the_group_mean_costs_scale_only(biases):
    assert biases[GROUP_MEAN]["beyond_scale"] < 1e-10
    assert biases[GROUP_MEAN]["scale"] == pytest.approx(3 / 4, abs=1e-10)


def test_kl_and_entropy_per_state_point_the_right_way(biases):
    for name in exact.BIASED:
        assert "per state" not in name or biases[name]["cosine"] > 0.95


def test_every_row_is_held_to_a_claim():
    assert set(exact.BIASED) - set(BEYOND_SCALE) == {GROUP_MEAN}


# ---- The oracle --------------------------------------------------------------------------------


def flip_the_objective(logp, old_logp, advantage, *eps, original=agrpo.clipped_objective):
    return -original(logp, old_logp, advantage, *eps)


def flip_the_advantage(rewards, G, original=agrpo.group_advantages):
    return -original(rewards, G)


def a_step_too_late(run, t, original=agrpo.Rollout.state_at):
    return original(run, t + 1)


def the_next_action(run, t, original=agrpo.Rollout.action_at):
    return original(run, t + 1)


def no_importance_weights(q, u, original=agrpo.timestep_weights):
    return original(q, u) * q * q.shape[1]


def a_horizon_too_short(run, config, original=agrpo.proposal):
    return original(replace(run, steps_taken=run.steps_taken - 1), config)


PLANTED = {
    "flip_the_objective": (agrpo, "clipped_objective", 1.9),
    "flip_the_advantage": (agrpo, "group_advantages", 1.9),
    "a_step_too_late": (agrpo.Rollout, "state_at", 0.01),
    "the_next_action": (agrpo.Rollout, "action_at", 0.1),
    "no_importance_weights": (agrpo, "timestep_weights", 0.01),
    "a_horizon_too_short": (agrpo, "proposal", 0.1),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_caught(bug, monkeypatch):
    """The problem is enumerated before: only what follows it is spoilt."""
    owner, name, least = PLANTED[bug]
    x = oracle.problem(0, 4.0, **exact.SHORT)
    assert exact.measure(x, exact.ENTROPY | exact.ONE)["bias"] < 1e-10
    monkeypatch.setattr(owner, name, globals()[bug])
    assert exact.measure(x, exact.ENTROPY | exact.ONE)["bias"] > least


@pytest.mark.parametrize(
    "policy", [exact.BLOCKS | {"temperature": 0.7}, exact.CONFIDENT, CONFIDENT_BLOCKS, exact.PADDED]
)
def test_the_oracle_is_the_slope_of_the_expected_reward(policy, monkeypatch):
    """The exact gradient, by autograd, against central differences of sum_tau p(tau) R(tau) with agrpo's p(tau).

    Under low confidence the oracle holds the kept tokens fixed, and the differences rank them anew."""
    x = oracle.problem(0, **policy)

    def expected_reward(parameters):
        with monkeypatch.context() as patched:
            patched.setattr(oracle, "micro_model", lambda *_: model)
            torch.nn.utils.vector_to_parameters(parameters, model.parameters())
            moved = oracle.Problem(0, **policy)
        return (moved.p * moved.rewards).sum().item()

    model = oracle.micro_model(0)
    parameters = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    direction = torch.randn(len(parameters), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = [expected_reward(parameters + sign * 1e-5 * direction) for sign in (1, -1)]
    assert (values[0] - values[1]) / 2e-5 == pytest.approx((x.gradient @ direction).item(), rel=1e-6)


def test_justgrpo_is_reinforce_on_the_chain_of_prefixes():
    """Left to right with k = m = n, against autoregressive log-probabilities written out: prefix, then [MASK]s."""
    x = oracle.problem(0, **LEFT_TO_RIGHT)
    ids = torch.tensor(oracle.QUESTION).repeat(6, 1)
    run = agrpo.rollout(x.model, ids, ids > -1, x.config, torch.Generator().manual_seed(1))
    A = torch.randn(6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = agrpo.sample_timesteps(run, replace(x.config, mc_samples=4), torch.Generator())  # nothing is drawn
    moved = SimpleNamespace(run=run, model=x.model, config=x.config)
    ours, log_p = oracle.Problem.follow(moved, A, weights), 0
    for place in range(3, 7):
        states = run.ids.where(torch.arange(7) < place, oracle.MASK)
        logp = x.model(states)[:, place, : oracle.MASK].log_softmax(-1).gather(1, run.ids[:, place, None]).squeeze(1)
        log_p = log_p + logp.where(run.unmask_step[:, place] < 4, 0)  # after <eos> nothing is written
    (A * log_p).mean().backward()
    assert torch.allclose(ours, oracle.flat_gradient(x.model), atol=1e-14, rtol=1e-10)


TOP = {"top_k": 2, "temperature": 0.7}


@pytest.mark.parametrize(
    "policy",
    [
        {},
        exact.BLOCKS | {"sampling_steps": 4},
        TOP,
        {"top_k": 3, "top_p": 0.8},
        {"sampling_steps": 3},
        {"unmasking": "low_confidence"},
        CONFIDENT_BLOCKS | {"sampling_steps": 4},
        exact.INFILLING,
        exact.PADDED | exact.BLOCKS | {"sampling_steps": 4},
    ],
)
def test_rollouts_have_the_enumerated_probabilities(policy):
    """The enumeration is about the very distribution that rollout() samples from: a chi-square test."""
    x, samples = oracle.problem(3, **{"sampling_steps": 2} | policy), 20_000
    ids = torch.tensor(policy.get("ids", oracle.QUESTION)).repeat(samples, 1)
    rollout = variants.ROLLOUTS[policy.get("unmasking", "random")]
    mask = x.run.attention_mask[:1].expand(samples, -1)
    run = rollout(x.model, ids, mask, x.config, torch.Generator().manual_seed(0))
    index = {str(key): i for i, key in enumerate(trajectories(x.run))}
    seen = torch.tensor([index[str(key)] for key in trajectories(run)])
    count, often = torch.bincount(seen, minlength=len(x.p)), samples * x.p > 5
    count = torch.cat([count[often], count[~often].sum()[None]]).double()  # where chi-square holds; the rest is one bin
    expected = samples * torch.cat([x.p[often], x.p[~often].sum()[None]])
    count, expected = count[expected > 0], expected[expected > 0]
    chi_square, freedom = ((count - expected) ** 2 / expected).sum().item(), len(count) - 1
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5
    for name in ("logprobs", "entropies", "drawn_entropy"):
        if hasattr(run, name):
            assert torch.allclose(getattr(run, name), getattr(x.run[seen], name), atol=1e-12)
    oracles = oracle.trajectory_logp(x.model, x.run, x.config).exp() * x.order_p
    assert torch.allclose(oracles, x.p, atol=1e-14)


def trajectories(run):
    """All that was drawn, one list per row."""
    parts = [run.ids, run.unmask_step]
    return torch.cat([*parts, run.drawn_ids.flatten(1)] if hasattr(run, "drawn_ids") else parts, 1).tolist()


def test_low_confidence_keeps_the_likeliest_of_what_it_drew():
    run = oracle.problem(0, **exact.CONFIDENT | exact.BLOCKS | {"sampling_steps": 4}).run
    for t in range(4):
        drawn, tokens, logprobs = run.action_at(torch.full_like(run.steps_taken, t))
        kept = run.unmask_step == t
        assert (tokens[kept[drawn]] == run.ids[kept]).all()
        assert (kept <= drawn).all() and (kept.sum(1) == (run.steps_taken > t)).all()
        confidence = torch.full(drawn.shape, -torch.inf, dtype=torch.float64).masked_scatter(drawn, logprobs)
        assert (confidence.amax(1) == confidence.where(kept, -torch.inf).amax(1)).all()


# ---- Expectations and variances ----------------------------------------------------------------


@pytest.mark.parametrize("name", variants.ALGORITHMS)
@pytest.mark.parametrize("sharpness", [1.0, 4.0])
def test_every_group_by_itself_says_what_facts_and_own_draws_say(name, sharpness):
    """E[A w] = E[A] E[w] is not assumed where every group is called, and every outcome of its draws taken."""
    x, estimate = oracle.problem(0, sharpness, **TWO_TOKENS), variants.ALGORITHMS[name]
    config = replace(x.config, num_generations=3, mc_samples=1, importance_sampling="entropy")
    table = oracle.expected_table(x, estimate, config)
    A = exact.expected_advantages(x, estimate, config)
    if name == "agrpo-sa":
        expected = A / 2 * variants.executed_steps(x.run)  # its draws depend on A: given the batch, E[A w] = A / m
    else:
        expected = A * sum(chance[:, None] * w for chance, w in exact.own_draws(x, estimate, config, None))
    assert torch.allclose(table, x.p[:, None] * expected, atol=1e-14)


@pytest.mark.parametrize("sharpness", [1.0, 4.0])
def test_given_a_finished_batch_shared_draws_are_unbiased(sharpness):
    """All trajectories in one batch: E[w] = 1/m wherever there is an advantage."""
    x = oracle.problem(0, sharpness, **exact.SHORT | exact.BLOCKS | {"sampling_steps": 4})
    A = x.rewards[:, None] * x.step_rewards  # some are 0
    for k in (1, 2, 3):
        config = replace(x.config, mc_samples=k)
        found = oracle.outcomes(lambda c=config: (A, variants.shared_weights(x.run, A, c, None)))
        mean = sum(chance[:, None] * w for chance, _, w in found)
        needed = (A != 0) & variants.executed_steps(x.run)
        assert torch.allclose(mean, needed / torch.tensor(x.run.sampling_steps).double(), atol=1e-12)
        taken = [(w > 0).sum() for _, _, w in found]
        assert max(taken) - min(taken) <= 1  # k on average per completion that has an advantage, and never more


@pytest.mark.parametrize("importance_sampling", ["uniform", "entropy"])
@pytest.mark.parametrize("low_discrepancy", [True, False])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("policy", [exact.BLOCKS, exact.SHORT | LEFT_TO_RIGHT, exact.PADDED | exact.BLOCKS])
def test_the_weights_undo_the_sampling(importance_sampling, low_discrepancy, k, policy):
    """E[sum_t w_t f(t)] = (1/m) sum_{t < T} f(t) for every f, every trajectory, also after an early stop."""
    x = oracle.problem(1, 4.0, **policy)
    options = {"importance_sampling": importance_sampling, "low_discrepancy": low_discrepancy, "mc_samples": k}
    config, m = replace(x.config, **options), x.run.sampling_steps
    weights = agrpo.sample_timesteps(x.run, config, torch.Generator())
    expected = variants.executed_steps(x.run).double() / m
    done = k >= x.run.steps_taken
    assert torch.equal(weights[done], expected[done]) and (x.run.steps_taken < m).any()  # nothing is random there
    if k < 4:
        draws = exact.own_draws(x, agrpo.estimate, config, None)
        assert torch.allclose(sum(chance[:, None] * w for chance, w in draws), expected, atol=1e-12)


def test_one_call_is_one_draw_of_the_moments():
    """E[g] and E||g||^2 from scores, against one backward pass of accumulate_gradient per trajectory and draw."""
    x = oracle.problem(0, 4.0, **exact.SHORT | LEFT_TO_RIGHT)
    config = replace(x.config, **exact.ENTROPY)
    A, first, second = (x.rewards - x.p @ x.rewards)[:, None].expand(-1, 3), 0, 0
    draws = exact.own_draws(x, agrpo.estimate, config, None)
    for chance, weights in draws:
        for i in range(len(x.p)):
            g = x.follow(A[i : i + 1], weights[i : i + 1], slice(i, i + 1))
            first, second = first + x.p[i] * chance[i] * g, second + x.p[i] * chance[i] * (g @ g)
    assert exact.mean_square(x, A, draws).item() == pytest.approx(second.item(), rel=1e-10)
    mean = x.expected(x.p[:, None] * A * sum(chance[:, None] * w for chance, w in draws))
    assert torch.allclose(mean, first, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("policy", [{}, TOP, exact.BLOCKS, exact.CONFIDENT, exact.INFILLING])
def test_the_mean_from_scores_is_the_mean_of_accumulate_gradient(policy):
    x = oracle.problem(0, **policy)
    table = x.p[:, None] * torch.randn(x.step_rewards.shape, generator=torch.Generator().manual_seed(0)).double()
    S, index = exact.scores(x.model, x.run, x.config)
    mean = x.run.sampling_steps * torch.einsum("nm,nmd->d", table * variants.executed_steps(x.run), S[index])
    assert (mean - x.expected(table)).norm() < 1e-10 * mean.norm()


def test_a_mean_per_slot_does_no_harm_where_there_is_one_slot():
    x = oracle.problem(0, **exact.BLOCKS)
    assert exact.by_slot(x, exact.ENTROPY | exact.ONE)["bias"] < 1e-10


def test_the_stepwise_advantage_is_r_minus_c_r_t_minus_its_expectation():
    """The c that was asked for: rescaled by G / (G - 1) and averaged over the fellows, nothing else is left."""
    x = oracle.problem(0, **exact.BLOCKS)
    executed = variants.executed_steps(x.run)
    r = x.step_rewards.where(executed, x.rewards[:, None])  # (N, m): after the last step the reward is known
    expected = x.p @ (x.rewards[:, None] - 0.5 * r)  # (m,)
    A = 1.5 * exact.expected_advantages(x, exact.stepwise, replace(x.config, num_generations=3))
    assert torch.allclose(A[executed], (exact.returns(x) - expected)[executed], atol=1e-12)


def test_the_gate_moves_the_advantage():
    """Otherwise the gated rows would say nothing new."""
    x = oracle.problem(0, **exact.BLOCKS)
    config = replace(x.config, num_generations=3)
    gated, free = (exact.expected_advantages(x, partial(exact.stepwise, gate=gate), config) for gate in (True, False))
    assert (gated - free).abs().max() > 0.03


# ---- The contrasts -----------------------------------------------------------------------------


def test_the_contrasts_draw_what_was_enumerated(monkeypatch):
    """As a training loop calls them. l and the order of three uniforms: 18 equally likely masks."""
    x = oracle.problem(0, **exact.SHORT)
    A = x.rewards - x.p @ x.rewards
    u = [[(size + 0.5) / 3, *order] for size in range(3) for order in itertools.permutations((0.1, 0.2, 0.3))]
    tables = {"advantages": A * x.p * len(A), "weights": torch.full_like(x.step_rewards, 1 / 3), "micro_batch": 1000}
    for method, masks, k in ((contrasts.diffu_grpo, torch.ones(1, 3) > 0, 1), (exact.ELBO, exact.all_masks(3), 18)):
        with monkeypatch.context() as patched:
            patched.setattr(agrpo, "uniforms", lambda shape, generator: torch.tensor(u).repeat(len(A), 1))
            stats = method(x.model, x.run, **tables, config=replace(x.config, mc_samples=k))
        mean = -3 * oracle.flat_gradient(x.model)
        assert exact.likelihood(x, method, masks)["bias"] == pytest.approx(oracle.compare(mean, x.gradient)["bias"])
        ends = x.run.ids[A != 0][:, -3:]  # the contrasts run a state once, whatever trajectories led to it
        states = {tuple(end.where(~mask, -1).tolist()) for end in ends for mask in masks}
        assert stats["evaluations"] == len(states) and stats["ratio_error"] == 0


def test_masks_of_the_elbo_have_a_uniform_size_and_uniform_places():
    masked = contrasts.random_masks(torch.rand(60_000, 5, generator=torch.Generator().manual_seed(0)))
    sizes = torch.bincount(masked.sum(1), minlength=5).double() / len(masked)
    assert sizes.tolist() == pytest.approx([0, 0.25, 0.25, 0.25, 0.25], abs=0.01)
    assert masked.double().mean(0).tolist() == pytest.approx([0.625] * 4, abs=0.01)


def test_diffu_grpo_is_exact_where_there_is_one_step():
    x = oracle.problem(0, sampling_steps=1)
    assert exact.likelihood(x, contrasts.diffu_grpo, torch.ones(1, 4) > 0)["bias"] < 1e-10


def test_the_contrasts_refuse_what_they_do_not_have():
    x = oracle.problem(0, **exact.SHORT)
    tables = {"advantages": x.rewards, "weights": x.step_rewards, "micro_batch": 8}
    for options in ({"temperature": 0.0}, {"top_k": 2}, {"top_p": 0.5}):
        with pytest.raises(ValueError, match="temperature|contrasts"):
            contrasts.diffu_grpo(x.model, x.run, **tables, config=replace(x.config, **options))
    with pytest.raises(ValueError, match="no KL"):
        contrasts.diffu_grpo(x.model, x.run, **tables, config=x.config, penalty=lambda *_: 0)


def test_the_elbos_variance_is_that_of_pairs_of_masks():
    """k = 2: every pair of masks is tried, each mask with a backward pass of its own."""
    x = oracle.problem(0, **exact.SHORT)
    masks = list(itertools.product((False, True), repeat=3))[1:]
    sizes = [sum(mask) for mask in masks]
    chances = torch.tensor([1 / 3 / sizes.count(size) for size in sizes], dtype=torch.float64)
    A, square = 2 * exact.expected_advantages(x, agrpo.estimate, x.config)[:, 0], 0
    ends, index = x.run.ids.unique(dim=0, return_inverse=True)
    for i in range(len(ends)):
        rows = (index == i).nonzero()[:1, 0]
        each = []
        for mask in torch.tensor(masks):
            factor, masked = A[rows] * 3 / mask.sum(), torch.cat([torch.zeros(1, 3).bool(), mask[None]], 1)
            contrasts.likelihood_gradient(x.model, x.run[rows], masked, factor, x.config, 8, None)
            each.append(-oracle.flat_gradient(x.model))
        pairs = (torch.stack(each)[:, None] + torch.stack(each)).square().sum(2) / 4  # (M, M)
        square = square + x.p[index == i].sum() * (chances @ pairs @ chances)
    row = exact.likelihood(x, exact.ELBO, exact.all_masks(3))
    mean = (row["scale"] * x.gradient.norm()) ** 2
    assert row["variance"] == pytest.approx(((square - mean) / (x.gradient @ x.gradient)).item(), rel=1e-9)


# ---- The draws, as pure functions --------------------------------------------------------------


def test_the_chances_of_shared_draws_are_at_most_1_and_sum_to_the_budget():
    q = torch.tensor([[100.0, 3.0, 0.0], [1.0, 1e-9, 50.0]], dtype=torch.float64)
    for total in (0, 1, 3, 4, 5, 6):  # five steps are eligible
        p = variants.inclusion_probabilities(q, total)
        assert p.max() <= 1 and p.sum().item() == pytest.approx(min(total, 5))
        assert total == 0 or (p > 0).equal(q > 0)


def test_the_comb_of_the_docstring():
    p = torch.tensor([0.6, 0.2, 0.9, 0.3], dtype=torch.float64)
    assert variants.systematic_draw(p, torch.tensor(0.7)).tolist() == [1, 0, 1, 0]
    assert variants.systematic_draw(p.view(2, 2), torch.tensor(0.1)).tolist() == [[0, 0], [1, 1]]


def test_a_rare_step_can_be_drawn_and_the_largest_uniform_stays_inside():
    q = torch.tensor([[1.0, 1e-9, 1.0, 0.0]], dtype=torch.float64)
    u = torch.tensor([[0.5, 0.5 + 3e-10, 1.0]], dtype=torch.float64)
    assert agrpo.inverse_cdf(q, u).tolist() == [[1, 2, 2]]
    weights = agrpo.timestep_weights(q / q.sum(), u[:, 1:2] - 2e-10)
    assert weights.nonzero().tolist() == [[0, 1]] and weights.max().item() == pytest.approx((2 + 1e-9) / 1e-9 / 4)


# ---- The commands ------------------------------------------------------------------------------


@pytest.fixture
def few_calls(monkeypatch):
    monkeypatch.setattr(oracle, "sample", partial(oracle.sample, calls=60))


@pytest.mark.parametrize("name", ["experiments/my_estimate.py:lowest_entropy", "egspo"])
def test_the_oracle_catches_a_biased_estimator(few_calls, capsys, name):
    assert oracle.main([name]) is None
    printed = capsys.readouterr().out
    assert name in printed and "biased: it points elsewhere" in printed and "cosine" in printed


@pytest.mark.parametrize("name", ["agrpo", "agrpo-sa"])
def test_the_oracle_finds_nothing_in_an_unbiased_one(few_calls, capsys, name):
    oracle.main([name])
    printed = capsys.readouterr().out
    assert "no bias beyond what these samples can see" in printed and "factor" not in printed
    assert float(printed.split("every draw:")[1].split()[0]) < 1e-10


OWN = """
import agrpo

def doubled(run, rewards, config, generator, step_rewards=None):
    advantages, weights = agrpo.estimate(run, rewards, config, generator)
    return 2 * advantages, weights

def downhill(run, rewards, config, generator, step_rewards=None):
    advantages, weights = agrpo.estimate(run, rewards, config, generator)
    return -advantages, weights

def one_number(run, rewards, config, generator, step_rewards=None):
    return agrpo.group_advantages(rewards, config.num_generations), agrpo.sample_timesteps(run, config, generator)
"""


def test_a_factor_is_no_bias_and_a_sign_is(few_calls, capsys, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    oracle.main([f"{tmp_path / 'own.py'}:doubled"])
    assert "up to a factor" in capsys.readouterr().out
    oracle.main([f"{tmp_path / 'own.py'}:downhill"])
    assert "biased: it points elsewhere" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["nonsense", "missing.py:f", "experiments/my_estimate.py:absent", "OWN:one_number"])
def test_a_broken_file_or_name_is_one_line(capsys, tmp_path, name):
    (tmp_path / "own.py").write_text(OWN)
    assert oracle.main([name.replace("OWN", str(tmp_path / "own.py"))]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1


def test_the_table_writes_its_numbers_and_its_picture(tmp_path, monkeypatch, capsys):
    name = "one pass, all masked (diffu-GRPO)"
    monkeypatch.setattr(exact, "EXACT", {"uniform": exact.EXACT["uniform"]})
    monkeypatch.setattr(exact, "BIASED", {name: exact.BIASED[name]})
    runner.main(exact.table, exact.__doc__, ["--quick", "--out", str(tmp_path)])
    written = json.loads((tmp_path / "estimators-exact.json").read_text())
    assert written["command"] == "python experiments/exact.py" and list(written["tables"]) == ["diffuse", "sharp"]
    row = written["tables"]["sharp"]["uniform"]
    keys = ["bias", "beyond_scale", "cosine", "scale", "variance", "largest_weight", "exact"]
    assert list(row) == keys and row["bias"] < 1e-10 and row["largest_weight"] == 2 and row["exact"]
    assert written["tables"]["sharp"][name]["largest_weight"] is None
    assert (tmp_path / "estimators-exact.png").stat().st_size > 5_000 and "beyond scale" in capsys.readouterr().out
