"""The step baseline as train.py uses it: r_t is the reward of the state's own completion, and ours alone is gated."""

import random

import pytest
import torch

import agrpo
import tasks
import tiny_dllm
import train


def tiny_sudoku(batch=3, G=4, m=8):
    """(rollout, tokenizer, task, prompts, texts): greedy completions, right, wrong and repeated, by no model."""
    task, tokenizer = tasks.TASKS["sudoku"], tiny_dllm.character_tokenizer()
    prompts, rng = task.load("validation")[:batch], random.Random(0)

    def spoilt(prompt):
        """The solution, or with the upper half wrong, as in other states too, or with six random cells overwritten."""
        cells = list(task.solution(prompt, rng))
        for cell in rng.choice([[], range(8), rng.sample(range(16), 6)]):
            cells[cell] = "1"
        return "".join(cells)

    texts = [[spoilt(prompt) for _ in range(m)] for prompt in prompts for _ in range(G)]
    ids = torch.tensor([[tokenizer(text)["input_ids"] for text in row] for row in texts])  # (B, m, n)
    empty = torch.zeros(batch * G, 16)
    steps = torch.zeros(batch * G, 16, dtype=torch.long)
    run = agrpo.Rollout(steps, steps > -1, steps, steps, empty, empty, torch.full((batch * G,), m), greedy_ids=ids)
    return run, tokenizer, task, prompts, texts


def test_every_state_is_rewarded_by_its_own_greedy_completion_and_question():
    run, tokenizer, task, prompts, texts = tiny_sudoku()
    asked = torch.tensor([True, False, True])
    r = train.step_rewards(run, tokenizer, task, prompts, False, asked)
    expected = torch.tensor([[task.reward(text, prompts[i // 4]) for text in row] for i, row in enumerate(texts)])
    assert len(expected.unique()) > 4
    assert torch.equal(r, expected * asked.repeat_interleave(4)[:, None])


@pytest.mark.parametrize("algorithm, gated", [("agrpo-sa", True), ("egspo-sa", False)])
def test_ours_alone_is_gated(tmp_path, monkeypatch, algorithm, gated):
    gates, original = [], agrpo.stepwise_advantages
    monkeypatch.setattr(agrpo, "stepwise_advantages", lambda *args: gates.append(args[-1]) or original(*args))
    flags = "--task sudoku --base-steps 2 --base-batch 8 --max-steps 1 --eval-steps 8 --eval-prompts 2"
    sizes = "--prompts-per-step 1 --eval-split validation"
    assert train.main([*flags.split(), *sizes.split(), "--algorithm", algorithm, "--out", str(tmp_path / "run")]) == 0
    assert gates == [gated]


def test_the_ramp_is_the_share_of_the_steps_taken_and_egspos_c_is_lambda_over_1_plus_lambda():
    ramp = agrpo.AGRPOConfig(completion_length=4, sampling_steps=4, step_baseline="ramp")
    assert agrpo.step_coefficients(ramp).tolist() == [0, 0.25, 0.5, 0.75]
    constant = agrpo.replace(ramp, step_baseline="constant")
    assert torch.allclose(agrpo.step_coefficients(constant), torch.full((4,), 0.5 / (1 + 0.5)))
