"""State tracking must be written step by step: what that means of a model, and of estimators."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train
from experiments import dial, oracle
from support import evaluation, settings

POLICY = {"ids": dial.QUESTION, "sampling_steps": 3, "block_length": 1}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_pass_or_another_order_cannot_answer_what_left_to_right_can(tmp_path):
    """On the base model of the main job: accuracies over 500 validation questions; chance is 20%."""
    run, config = settings.parse_arguments(["--task", "tracking"])
    setup = train.base_model(run, config, Path(tmp_path))
    questions = setup.task.load("validation")

    def accuracy(kind, steps, block_length):
        asked = replace(setup, config=replace(config, block_length=block_length))
        return evaluation.mean(evaluation.grade(asked, questions, kind, steps), "correct")

    assert accuracy("greedy", 8, 1) >= 0.95
    assert accuracy("sampled", 8, 1) <= 0.5  # it makes mistakes: that is what rewards are for
    assert accuracy("sampled", 1, None) <= 0.3 and accuracy("greedy", 1, None) <= 0.3
    assert accuracy("sampled", 8, None) <= 0.3  # in random order


@pytest.mark.parametrize("model", dial.WORLDS.values())
def test_one_pass_leaves_the_policy_gradient_as_tokens_come_to_depend_on_the_one_before(model):
    found = []
    for turned in (0.0, 0.5, 1.0):
        problem = oracle.Problem(0, world=(model(0, turned), dial.last_state), **POLICY)
        found.append({name: measure(problem)["beyond_scale"] for name, measure in dial.ESTIMATORS.items()})
        assert found[-1]["AGRPO, k = 2"] < 1e-12 and found[-1]["AGRPO-SA (ours)"] < 1e-12
    one_pass = [x["one pass (diffu-GRPO)"] for x in found]
    assert one_pass[0] < 1e-12 and min(one_pass[1:]) > 0.05
    consistent = [x["ELBO of random masks"] < 1e-12 for x in found]
    assert consistent == ([True] * 3 if model is dial.Consistent else [True, False, False])


def test_the_micro_models_write_what_they_say():
    """The policy is the chain's conditional probability, asked step by step, whichever model answers."""
    chain, consistent = dial.Chain(3, 0.7), dial.Consistent(3, 0.7)
    ids = torch.tensor([[*dial.QUESTION[:4], 2, 0, oracle.MASK]])
    logits = [model(ids)[0, 6, :3].log_softmax(-1) for model in (chain, consistent)]
    assert torch.allclose(*logits, atol=1e-12)
    asked = torch.tensor([dial.QUESTION])  # nothing known: the marginals
    logits = [model(asked)[0, 4:, :3].log_softmax(-1) for model in (chain, consistent)]
    assert torch.allclose(*logits, atol=1e-12)
