"""The step baseline: r_t is the reward of the state's own greedy completion, judged once; and ours alone is gated."""

import pytest
import torch
from conftest import MASK, make_config, make_infillings, make_questions

import agrpo
import variants

G = 3


def judge(questions, ids):
    """Another reward for every question and every text."""
    return ((ids * torch.arange(1, ids.shape[1] + 1)).sum(1) * 7 + questions * 3) % 11 / 10


def roll_out(model, unmasking, config, questions, micro_batch=None, seed=0):
    """G completions of each of two questions: the wrapped model and the run."""
    ids, mask = (x[:2].repeat_interleave(G, 0) for x in questions())
    greedy = variants.GreedyCompletions(model)
    run = variants.ROLLOUTS[unmasking](greedy, ids, mask, config, torch.Generator().manual_seed(seed), micro_batch)
    return greedy, run


def expected_rewards(model, run):
    """r (B, m): an arg max over the words that are not [MASK], at what a full forward pass says of the state at t."""
    r = torch.zeros(2 * G, run.sampling_steps)
    for t in range(run.sampling_steps):
        states = run.state_at(torch.full((2 * G,), t))
        words = model(states, run.attention_mask).index_fill(2, torch.tensor(MASK), -torch.inf).argmax(2)
        rewards = judge(torch.arange(2 * G) // G, words.where(states == MASK, run.ids))
        r[:, t] = rewards.where(run.steps_taken > t, 0)
    return r


@pytest.mark.parametrize("micro_batch", [None, 1, 4])
@pytest.mark.parametrize("questions", [make_questions, make_infillings])
@pytest.mark.parametrize("unmasking", variants.ROLLOUTS)
@pytest.mark.parametrize("options", [{}, {"block_length": 2, "temperature": 2.0}, {"top_k": 2}])
def test_every_state_is_rewarded_by_its_own_greedy_completion_and_question(
    model, unmasking, options, questions, micro_batch
):
    with torch.no_grad():
        model.model.transformer.ff_out.weight[0] *= 2  # <eos>: some rows stop early
    greedy, run = roll_out(model, unmasking, make_config(**options), questions, micro_batch)
    r, expected = greedy.step_rewards(run, judge, G)(torch.ones(2 * G).bool()), expected_rewards(model, run)
    assert len(expected.unique()) > 4
    assert torch.equal(r, expected)


def test_some_of_these_rows_stop_early(model):
    """Then states of other rows stand at other calls of the model, and of fewer rows."""
    with torch.no_grad():
        model.model.transformer.ff_out.weight[0] *= 2
    stopped = [
        (
            roll_out(model, "random", make_config(block_length=2, temperature=2.0), make_questions, seed=s)[
                1
            ].steps_taken
            < 4
        )
        for s in range(20)
    ]
    assert any(rows.any() and not rows.all() for rows in stopped)


def test_what_is_written_does_not_depend_on_the_wrapper(model):
    ids, mask = make_infillings()
    runs = [
        agrpo.rollout(m, ids, mask, make_config(), torch.Generator().manual_seed(0))
        for m in (model, variants.GreedyCompletions(model))
    ]
    assert torch.equal(runs[0].ids, runs[1].ids) and torch.allclose(runs[0].logprobs, runs[1].logprobs, atol=1e-6)


def test_equal_completions_of_a_question_are_judged_once_and_unasked_rows_never(model):
    greedy, run = roll_out(model, "random", make_config(), make_questions)
    seen = []

    def noted(questions, ids):
        seen.extend(torch.cat([questions[:, None], ids], 1).tolist())
        return judge(questions, ids)

    rows = torch.tensor([False] * G + [True] * G)
    r = greedy.step_rewards(run, noted, G)(rows)
    assert torch.equal(r, expected_rewards(model, run) * rows[:, None])
    assert len({tuple(row) for row in seen}) == len(seen) < G * 4 and {row[0] for row in seen} == {1}
    assert not greedy.step_rewards(run, None, G)(torch.zeros(2 * G).bool()).any()  # nothing to judge


def called(monkeypatch, estimate, rewards):
    """(c, gate) that an estimator passes to stepwise_advantages, and the rows whose step rewards it asks for."""
    calls, asked, original = [], [], variants.stepwise_advantages

    def noted(run, rewards, r, config, c, gate):
        calls.append((torch.as_tensor(c).tolist(), gate))
        return original(run, rewards, r, config, c, gate)

    def step_rewards(rows):
        asked.append(rows.tolist())
        return torch.rand(6, 4)

    monkeypatch.setattr(variants, "stepwise_advantages", noted)
    run = agrpo.rollout(Coin(), *make_questions(), make_config(), torch.Generator().manual_seed(0))
    estimate(run, rewards, make_config(num_generations=3), torch.Generator(), step_rewards)
    return *calls[0], asked


class Coin:
    mask_token_id, eos_token_id = MASK, 0

    def __call__(self, ids, attention_mask, positions):
        return torch.zeros(int(positions.sum()), 12)


REWARDS = torch.tensor([1.0, 0.0, 1.0, 0.5, 0.5, 0.5])


def test_ours_is_a_gated_ramp_and_asks_where_rewards_differ(monkeypatch):
    c, gate, asked = called(monkeypatch, variants.agrpo_sa, REWARDS)
    assert c == [0, 0.25, 0.5, 0.75] and gate and asked == [[True] * 3 + [False] * 3]


def test_egspos_c_is_lambda_over_1_plus_lambda_and_it_asks_for_every_row(monkeypatch):
    """Asking where rewards differ alone would be a gate that reads the own reward: a bias."""
    c, gate, asked = called(monkeypatch, variants.egspo_sa, REWARDS)
    assert c == pytest.approx(0.5 / (1 + 0.5), abs=1e-7) and not gate and asked == [[True] * 6]


def test_the_gate_looks_at_the_fellows_alone():
    """The second row's fellows agree: no r_t is subtracted there. A group that agrees has no advantage at all."""
    run = agrpo.rollout(Coin(), *make_questions(), make_config(), torch.Generator().manual_seed(0))
    r, config = torch.rand(6, 4, generator=torch.Generator().manual_seed(0)), make_config(num_generations=3)
    A = variants.stepwise_advantages(run, REWARDS, r, config, c=0.5, gate=True)
    plain = agrpo.group_advantages(REWARDS, 3)[:, None].expand(6, 4)
    same = (plain == A).all(1)
    assert same.tolist() == [False, True, False, True, True, True] and (A[3:] == 0).all()
    ungated = variants.stepwise_advantages(run, REWARDS, r, config, c=0.5, gate=False)
    assert torch.equal(ungated[[0, 2]], A[[0, 2]]) and (ungated[1] != A[1]).all() and (ungated[3:] != 0).any()


def test_agrpo_sa_needs_two_fellows():
    run = agrpo.rollout(Coin(), *make_questions(), make_config(), torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="num_generations 3"):
        variants.agrpo_sa(run, REWARDS, make_config(num_generations=2), torch.Generator(), None)


def test_a_reward_that_is_not_finite_is_named():
    run = agrpo.rollout(Coin(), *make_questions(), make_config(), torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="not finite"):
        r = torch.full((6, 4), torch.nan)
        variants.stepwise_advantages(run, REWARDS, r, make_config(num_generations=3), c=0.5, gate=False)
