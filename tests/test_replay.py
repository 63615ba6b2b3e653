"""A stored rollout replays the very states the model saw and the very actions it took."""

import pytest
import torch
from conftest import EOS, MASK, VOCAB, make_config, make_prompts, make_rollout

from agrpo import AGRPOConfig, rollout

UNMASKINGS = ["random", "left_to_right", "low_confidence"]


class Recorder:
    """A model that remembers its inputs."""

    def __init__(self, model):
        self.model, self.calls = model, []
        self.mask_token_id, self.eos_token_id = model.mask_token_id, model.eos_token_id

    def __call__(self, ids, attention_mask, positions):
        self.calls.append((ids, attention_mask, positions))
        return self.model(ids, attention_mask, positions)


class Scripted:
    """A model that writes `word` at every position of rows whose first prompt token is 2, and anything elsewhere."""

    mask_token_id, eos_token_id = MASK, EOS

    def __call__(self, ids, attention_mask, positions):
        logits = torch.zeros(*ids.shape, VOCAB)
        logits[ids[:, 0] == 2, :, EOS] = 1e4
        logits[ids[:, 0] != 2, :, EOS] = -1e4
        return logits[positions]


@pytest.mark.parametrize("unmasking", UNMASKINGS)
@pytest.mark.parametrize("options", [{}, {"block_length": 4}, {"sampling_steps": 3}, {"top_k": 4}])
def test_state_at_is_what_the_model_saw(model, unmasking, options):
    config, recorder = make_config(unmasking=unmasking, **options), Recorder(model)
    run = rollout(recorder, *make_prompts(), config, torch.Generator().manual_seed(3))
    for t, (ids, attention_mask, positions) in enumerate(recorder.calls):
        at = torch.full((6,), t)
        assert torch.equal(run.state_at(at), ids)
        assert torch.equal(attention_mask[:, :5], run.prompt_mask) and attention_mask[:, 5:].all()
        written = run.unmasked_at(at)
        assert (positions[:, 5:] & written).sum() == written.sum() == 6 * config.tokens_per_step[t]
        assert unmasking == "low_confidence" or torch.equal(positions[:, 5:], written)  # no row of the head too many
    assert len(recorder.calls) == config.sampling_steps
    assert (run.completion_ids != MASK).all()


def test_uneven_schedules_write_one_token_more_in_the_first_steps_of_each_block():
    assert AGRPOConfig(completion_length=16, sampling_steps=6, block_length=8).tokens_per_step == [3, 3, 2, 3, 3, 2]
    assert AGRPOConfig(completion_length=7, sampling_steps=7).tokens_per_step == [1] * 7


def test_blocks_are_finished_left_to_right_and_random_orders_are_uniform(model):
    run = make_rollout(model, make_config(block_length=4), batch=6)
    assert (run.unmask_step[:, :4] < 2).all() and (run.unmask_step[:, 4:] >= 2).all()
    from agrpo import draw_unmask_steps

    steps = draw_unmask_steps(
        6000, make_config(sampling_steps=2, completion_length=4), torch.Generator().manual_seed(0)
    )
    _, counts = steps.unique(dim=0, return_counts=True)
    assert len(counts) == 6 and ((counts - 1000).abs() < 4 * 1000**0.5).all()


def test_a_row_whose_block_is_all_eos_stops_and_the_others_go_on():
    prompts = torch.tensor([[2, 5], [3, 5], [2, 5]])
    recorder = Recorder(Scripted())
    run = rollout(recorder, prompts, prompts > 0, make_config(block_length=2), torch.Generator().manual_seed(0))
    assert run.steps_taken.tolist() == [1, 4, 1]
    assert (run.completion_ids[[0, 2]] == EOS).all() and (run.completion_ids[1] != EOS).all()
    assert (run.unmask_step[[0, 2], 2:] == 4).all()
    assert [len(ids) for ids, _, _ in recorder.calls] == [3, 1, 1, 1]  # stopped rows cost nothing
    assert (run.state_at(torch.tensor([3, 3, 3]))[0, -6:] == MASK).all()  # masked in every state
    assert not run.unmasked_at(torch.tensor([3, 3, 3]))[0].any()  # chosen in none


def test_the_mask_token_is_never_written_even_if_the_model_wants_it(model):
    with torch.no_grad():
        model.model.transformer.ff_out.weight[MASK] *= 50
    for options in ({}, {"top_k": 3}, {"temperature": 0.0}, {"unmasking": "low_confidence"}, {"top_k": VOCAB + 5}):
        assert (make_rollout(model, make_config(**options)).completion_ids != MASK).all()


def test_the_kept_set_is_top_k_then_the_fewest_that_reach_p_crossing_token_included():
    from agrpo import kept_ids

    logits = torch.tensor([[0.05, 9.0, 0.4, 0.3, 0.2, 0.05]]).log().index_fill(1, torch.tensor(1), 7.0)  # 1 is [MASK]
    support = {p: kept_ids(logits, 1, make_config(top_k=4, top_p=p)).tolist()[0] for p in (0.3, 0.5, 0.8, 1.0)}
    assert support[0.3] == [2, -1, -1, -1]
    assert support[0.5] == [2, 3, -1, -1]  # 0.4 / 0.95 < 0.5: the token that crosses stays
    assert support[0.8] == [2, 3, 4, -1]
    assert support[1.0][:3] == [2, 3, 4] and support[1.0][3] in (0, 5)
    assert kept_ids(logits, 1, make_config(top_k=8)).shape == (1, 8)  # wider than the vocabulary: padded


def test_same_draws_same_rollout_and_temperature_0_takes_the_likeliest(model):
    first, again = (make_rollout(model, make_config()) for _ in range(2))
    assert torch.equal(first.completion_ids, again.completion_ids) and torch.equal(first.logprobs, again.logprobs)
    greedy = make_rollout(model, make_config(temperature=0.0, unmasking="left_to_right"))
    at = torch.zeros(6, dtype=torch.long)
    logits = model(greedy.state_at(at), torch.cat([greedy.prompt_mask, torch.ones(6, 8).bool()], 1))[:, 5:7]
    logits[..., MASK] = -torch.inf
    assert torch.equal(greedy.completion_ids[:, :2], logits.argmax(2))


@pytest.mark.parametrize(
    "options, word",
    [
        ({"sampling_steps": 9}, "exceeds"),
        ({"block_length": 3}, "multiple"),
        ({"block_length": 2, "sampling_steps": 6}, "blocks"),
        ({"mc_samples": 0}, "mc_samples"),
        ({"num_generations": 1}, "group"),
        ({"top_p": 0.9}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"temperature": -1.0}, "temperature"),
        ({"unmasking": "sideways"}, "choose"),
        ({"beta": -0.1}, "beta"),
        ({"completion_length": 0}, "completion_length"),
        ({"block_length": 16}, "multiple"),
        ({"epsilon_low": 1.5}, "epsilon_low"),
    ],
)
def test_impossible_settings_are_refused_where_they_are_built(options, word):
    with pytest.raises(ValueError, match=word):
        make_config(**options)
