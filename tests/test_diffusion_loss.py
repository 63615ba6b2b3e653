"""The base model's training loss is LLaDA's: masked cross-entropy over t, what is given never masked."""

import math
from itertools import permutations

import torch

from tiny_dllm import Config, MaskedDiffusionLM, character_tokenizer, diffusion_loss

EOS, MASK, VOCAB = 0, 1, 12


class Constant:
    """Predicts one fixed distribution everywhere, and remembers what it was shown."""

    mask_token_id = MASK

    def __init__(self, logits):
        self.logits, self.calls = logits, []

    def __call__(self, ids, attention_mask, positions):
        self.calls.append((ids, positions))
        return self.logits.expand(int(positions.sum()), -1)


def questions(batch):
    """Given tokens after 0 to 2 of padding, then six of an answer: ids, attention_mask and answer, all (B, 11)."""
    ids = torch.randint(2, VOCAB, (batch, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(11) >= (torch.arange(batch) % 3)[:, None]
    return ids.where(mask, EOS), mask, (torch.arange(11) >= 5).expand(batch, -1)


def infillings(batch):
    """The same, but the six tokens of the answer stand anywhere among the given ones, elsewhere in every row."""
    ids, mask, _ = questions(batch)
    order = torch.rand(batch, 11, generator=torch.Generator().manual_seed(2)).where(mask, -1.0).argsort(1)
    return ids, mask, torch.zeros_like(mask).scatter(1, order[:, 5:], True)


def near(losses, exact):
    """The mean of the losses is `exact` within four standard errors, and these are below 1% of it."""
    error = losses.std() / math.sqrt(len(losses))
    return abs(losses.mean() - exact) < 4 * error < 0.04 * exact


def test_its_mean_is_the_negative_log_likelihood_where_that_is_known():
    """A model that ignores its input has -log p(o) = - sum log p(o_i), and the bound is tight."""
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(0))
    for ids, mask, answer in (questions(400), infillings(400)):
        generator, model = torch.Generator().manual_seed(2), Constant(logits)
        losses = torch.stack([diffusion_loss(model, ids, mask, answer, generator) for _ in range(400)])
        assert near(losses, -logits.log_softmax(0)[ids[answer]].mean())


def test_its_mean_is_that_over_all_orders_of_filling_in_an_answer_between_given_tokens():
    """A real model, an answer of three with given tokens before, in and after it: - mean log p over the 3! orders."""
    config = Config(VOCAB, MASK, EOS, d_model=16, n_layers=2, n_heads=2, mlp_hidden_size=32)
    model = MaskedDiffusionLM(config).init_weights(torch.Generator().manual_seed(0))
    for parameter in model.model.transformer.blocks.parameters():
        parameter.data *= 3  # so that what is masked matters: 2.41 below; 2.27 with all of it masked, 3.35 with none
    ids = torch.tensor([[EOS, 3, 4, 5, 6, 7, 8, 9]])
    mask, places = ids != EOS, [2, 4, 5]
    answer = torch.zeros_like(mask).index_fill(1, torch.tensor(places), True)
    exact = 0.0
    with torch.no_grad():
        for order in permutations(places):
            state = ids.masked_fill(answer, MASK)
            for place in order:
                exact -= model(state, mask)[0, place].log_softmax(0)[ids[0, place]].item() / 6 / 3
                state[0, place] = ids[0, place]
        many, generator = [x.expand(500, -1) for x in (ids, mask, answer)], torch.Generator().manual_seed(1)
        losses = torch.stack([diffusion_loss(model, *many, generator) for _ in range(120)])
    assert near(losses, exact)


def test_what_is_given_is_never_masked_and_t_is_stratified():
    for ids, mask, answer in (questions(1000), infillings(1000)):
        model = Constant(torch.zeros(VOCAB))
        diffusion_loss(model, ids, mask, answer, torch.Generator().manual_seed(0))
        shown, positions = model.calls[0]
        assert torch.equal(shown[~answer], ids[~answer]) and not positions[~answer].any()
        assert torch.equal(shown == MASK, positions) and torch.equal(shown[~positions], ids[~positions])
        share = positions[answer].float().view(10, 600).mean(1)  # row i is masked with probability about i / 1000
        assert torch.allclose(share, (torch.arange(10) + 0.5) / 10, atol=0.08)


def test_the_tokenizer_is_reversible_and_its_template_renders_the_question_alone():
    tokenizer = character_tokenizer()
    chat = [{"role": "system", "content": "ignored"}, {"role": "user", "content": "03 07 12=16"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert tokenizer.decode(ids) == "<bos>03 07 12=16"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "03 07 12=16"
    assert tokenizer.mask_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id
    assert tokenizer("\n")["input_ids"] == [tokenizer.unk_token_id]
