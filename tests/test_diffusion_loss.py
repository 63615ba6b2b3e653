"""The base model's training loss is LLaDA's: masked cross-entropy over t, the prompt never masked."""

import math

import torch
from conftest import MASK, VOCAB, make_prompts

from tiny_dllm import character_tokenizer, diffusion_loss


class Constant:
    """Predicts one fixed distribution everywhere, and remembers what it was shown."""

    mask_token_id = MASK

    def __init__(self, logits):
        self.logits, self.calls = logits, []

    def __call__(self, ids, attention_mask, positions):
        self.calls.append((ids, positions))
        return self.logits.expand(int(positions.sum()), -1)


def test_its_mean_is_the_negative_log_likelihood_where_that_is_known():
    """A model that ignores its input has -log p(o) = - sum log p(o_i), and the bound is tight."""
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(0))
    prompts, mask = make_prompts(400)
    answers = torch.randint(2, VOCAB, (400, 6), generator=torch.Generator().manual_seed(1))
    generator, model = torch.Generator().manual_seed(2), Constant(logits)
    losses = torch.stack([diffusion_loss(model, prompts, mask, answers, generator) for _ in range(400)])
    exact = -logits.log_softmax(0)[answers].mean()
    assert abs(losses.mean() - exact) < 4 * losses.std() / math.sqrt(len(losses))
    assert losses.std() / math.sqrt(len(losses)) < 0.01 * exact


def test_the_prompt_is_never_masked_and_t_is_stratified():
    prompts, mask = make_prompts(1000)
    answers, model = torch.full((1000, 6), 3), Constant(torch.zeros(VOCAB))
    diffusion_loss(model, prompts, mask, answers, torch.Generator().manual_seed(0))
    ids, positions = model.calls[0]
    assert torch.equal(ids[:, :5], prompts) and not positions[:, :5].any()
    assert torch.equal(ids[:, 5:] == MASK, positions[:, 5:])
    share = positions[:, 5:].float().mean(1).view(10, 100).mean(1)  # row i is masked with probability about i / 1000
    assert torch.allclose(share, (torch.arange(10) + 0.5) / 10, atol=0.08)


def test_the_tokenizer_is_reversible_and_its_template_renders_the_question_alone():
    tokenizer = character_tokenizer()
    chat = [{"role": "system", "content": "ignored"}, {"role": "user", "content": "03 07 12=16"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert tokenizer.decode(ids) == "<bos>03 07 12=16"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "03 07 12=16"
    assert tokenizer.mask_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id
    assert tokenizer("\n")["input_ids"] == [tokenizer.unk_token_id]
