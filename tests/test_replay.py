"""A stored rollout replays the very states the model saw and the very actions it took."""

import pytest
import torch
from conftest import EOS, MASK, VOCAB, Recorder, distinct, make_config, make_infillings, make_questions, make_rollout

import agrpo
import variants


class Scripted:
    """A model that writes <eos> at every position of rows whose first token is 2, and never in the others."""

    mask_token_id, eos_token_id = MASK, EOS

    def __call__(self, ids, attention_mask, positions):
        logits = torch.zeros(*ids.shape, VOCAB)
        logits[ids[:, 0] == 2, :, EOS] = 1e4
        logits[ids[:, 0] != 2, :, EOS] = -1e4
        return logits[positions]


@pytest.mark.parametrize("questions", [make_questions, make_infillings])
@pytest.mark.parametrize("unmasking", variants.ROLLOUTS)
@pytest.mark.parametrize("options", [{}, {"block_length": 4}, {"sampling_steps": 3}, {"top_k": 4}, {"top_p": 0.7}])
def test_state_at_is_what_the_model_saw(model, unmasking, options, questions):
    config, recorder, (ids, mask) = make_config(**options), Recorder(model), questions()
    run = variants.ROLLOUTS[unmasking](recorder, ids, mask, config, torch.Generator().manual_seed(3))
    counts = [count for *_, count in agrpo.schedule(8, config)]
    for t, (seen, attention_mask, positions) in enumerate(recorder.calls):
        at = torch.full((6,), t)
        states, state = distinct(run.state_at(at), mask)
        seen, order = distinct(seen, attention_mask)
        assert torch.equal(states, seen) and len(order) == len(seen)  # each once
        positions = torch.zeros_like(positions).index_put((order,), positions)  # in the order of `states`
        scored, tokens, _ = run.action_at(at)
        written = run.unmask_step == t
        assert (written & positions[state] & (ids == MASK)).sum() == written.sum() == 6 * counts[t]
        union = torch.zeros_like(seen).index_add(0, state, scored.long()) > 0
        if unmasking != "low_confidence_kept":  # it asks for more than it keeps
            assert torch.equal(union, positions)  # no row of the head too many
        assert torch.equal(tokens[written[scored]], run.ids[written])
    assert len(recorder.calls) == len(counts) == run.sampling_steps and (run.steps_taken == len(counts)).all()
    assert (run.ids != MASK).all() and torch.equal(run.unmask_step < 0, ids != MASK)


def test_uneven_schedules_write_one_token_more_in_the_first_steps_of_each_block():
    def schedule(n, m, block=None):
        return agrpo.schedule(n, agrpo.AGRPOConfig(m, block_length=block))

    assert schedule(16, 6, 8) == [(0, 8, 3), (0, 8, 3), (0, 8, 2), (8, 16, 3), (8, 16, 3), (8, 16, 2)]
    assert schedule(7, 7) == [(0, 7, 1)] * 7
    assert schedule(7, 6, 3) == [(0, 3, 2), (0, 3, 1), (3, 6, 2), (3, 6, 1), (6, 7, 1)]  # the last is shorter
    assert schedule(4, 8) == [(0, 4, 1)] * 4  # a block takes at most one step a position


def test_blocks_are_finished_in_order_and_random_orders_are_uniform(model):
    run = make_rollout(model, make_config(block_length=4))
    assert (run.unmask_step[:, 5:9] < 2).all() and (run.unmask_step[:, 9:] >= 2).all()
    plan = agrpo.schedule(4, make_config(sampling_steps=2))
    steps = agrpo.draw_order(6000, plan, make_config(), torch.Generator().manual_seed(0))
    _, counts = steps.unique(dim=0, return_counts=True)
    assert len(counts) == 6 and ((counts - 1000).abs() < 4 * 1000**0.5).all()


@pytest.mark.parametrize("unmasking", variants.ROLLOUTS)
def test_a_row_whose_block_is_all_eos_stops_and_the_others_go_on(unmasking):
    prompts, recorder = torch.tensor([[2, 5], [3, 5], [2, 5]]), Recorder(Scripted())
    ids = torch.cat([prompts, torch.full((3, 8), MASK)], 1)
    rollout = variants.ROLLOUTS[unmasking]
    run = rollout(recorder, ids, ids > 0, make_config(block_length=2), torch.Generator().manual_seed(0))
    assert run.steps_taken.tolist() == [1, 4, 1]
    assert (run.ids[[0, 2], 2:] == EOS).all() and (run.ids[1] != EOS).all()
    assert (run.unmask_step[[0, 2], 4:] == 4).all()
    assert [len(seen) for seen, _, _ in recorder.calls] == [2, 1, 1, 1]  # two are equal; stopped rows cost nothing
    last = torch.tensor([3, 3, 3])
    assert (run.state_at(last)[0, -6:] == MASK).all()  # masked in every state
    assert not run.action_at(last)[0][0].any()  # chosen in none
    assert (run.step_entropies()[[0, 2], 1:] == 0).all() and (run.logprobs[[0, 2], 4:] == 0).all()


def test_the_mask_token_is_never_written_even_if_the_model_wants_it(model):
    with torch.no_grad():
        model.model.transformer.ff_out.weight[MASK] *= 50
    for options in ({}, {"top_k": 3}, {"top_p": 0.5}, {"temperature": 0.0}, {"top_k": VOCAB + 5}):
        for rollout in variants.ROLLOUTS.values():
            run = rollout(model, *make_questions(), make_config(**options), torch.Generator().manual_seed(0))
            assert (run.ids != MASK).all()


def test_the_kept_set_is_top_k_then_the_fewest_that_reach_p_crossing_token_included():
    logits = torch.tensor([[0.05, 9.0, 0.4, 0.3, 0.2, 0.05]]).log().index_fill(1, torch.tensor(1), 7.0)  # 1 is [MASK]

    def kept(**options):
        return agrpo.token_logprobs(logits, 1, make_config(**options)).exp()[0].nonzero()[:, 0].tolist()

    assert kept(top_k=4, top_p=0.3) == [2]
    assert kept(top_k=4, top_p=0.5) == [2, 3]  # 0.4 / 0.95 < 0.5: the token that crosses stays
    assert kept(top_k=4, top_p=0.8) == [2, 3, 4]
    assert kept(top_k=4)[:3] == [2, 3, 4] or kept(top_k=4)[1:] == [2, 3, 4]  # with 0 or 5
    assert kept(top_p=0.5) == [2, 3] and kept(top_k=8) == kept(top_k=0) == kept() == [0, 2, 3, 4, 5]
    assert kept(top_k=4, top_p=0.7, temperature=2.0) == [2, 3, 4]  # of what the temperature left


@pytest.mark.parametrize("unmasking", variants.ROLLOUTS)
def test_same_draws_same_rollout_and_temperature_0_takes_the_likeliest(model, unmasking):
    rollout, (ids, mask) = variants.ROLLOUTS[unmasking], make_infillings()
    first, again = (rollout(model, ids, mask, make_config(), torch.Generator().manual_seed(2)) for _ in range(2))
    assert torch.equal(first.ids, again.ids) and torch.equal(first.logprobs, again.logprobs)
    greedy = rollout(model, ids, mask, make_config(temperature=0.0, sampling_steps=8), torch.Generator())
    for t in range(8):
        logits = model(greedy.state_at(torch.full((6,), t)), mask).index_fill(2, torch.tensor(MASK), -torch.inf)
        written = greedy.unmask_step == t
        assert torch.equal(greedy.ids[written], logits.argmax(2)[written])
        if unmasking != "random":  # LLaDA's decoding: where the model is most sure
            sure = logits.softmax(2).amax(2).masked_fill(greedy.unmask_step < t, 0)
            assert torch.equal(sure.argmax(1), written.int().argmax(1))


@pytest.mark.parametrize(
    "options, word",
    [
        ({"sampling_steps": 0}, "sampling_steps"),
        ({"block_length": 0}, "block_length"),
        ({"mc_samples": 0}, "mc_samples"),
        ({"num_generations": 1}, "num_generations"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"temperature": -1.0}, "temperature"),
        ({"importance_sampling": "top_entropy"}, "choose"),
        ({"epsilon_low": 1.5}, "epsilon_low"),
        ({"epsilon_high": -0.1}, "epsilon_high"),
    ],
)
def test_impossible_settings_are_refused_where_they_are_built(options, word):
    with pytest.raises(ValueError, match=word):
        make_config(**options)


def test_questions_that_do_not_fit_are_refused(model):
    ids, mask = make_questions()
    with pytest.raises(ValueError, match="same number"):
        agrpo.rollout(model, ids.index_fill(1, torch.tensor(12), 3).where(mask, MASK), mask, make_config(), None)
    with pytest.raises(ValueError, match="no .MASK."):
        agrpo.rollout(model, ids.clamp(min=2), mask, make_config(), None)
    with pytest.raises(ValueError, match="multiple of the 3 blocks"):
        agrpo.rollout(model, ids, mask, make_config(block_length=3), None)
