"""The model is a LLaMA without the causal mask: equal to transformers' own with the same weights, to 1e-5."""

import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tiny_dllm import Config, MaskedDiffusionLM

EOS, MASK, VOCAB = 0, 1, 12

NAMES = {  # LLaDA's -> LLaMA's
    "model.transformer.wte": "model.embed_tokens",
    "model.transformer.ln_f": "model.norm",
    "model.transformer.ff_out": "lm_head",
    "model.transformer.blocks": "model.layers",
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "blocks.N.ff_out": "mlp.down_proj",
}


def llama_name(name):
    block = re.match(r"model\.transformer\.blocks\.(\d+)\.(\w+)\.weight", name)
    if not block:
        return NAMES[name.removesuffix(".weight")] + ".weight"
    index, part = block.groups()
    return f"model.layers.{index}.{NAMES.get('blocks.N.' + part) or NAMES[part]}.weight"


@pytest.fixture
def model():
    config = Config(VOCAB, MASK, EOS, d_model=16, n_layers=2, n_heads=2, mlp_hidden_size=32)
    return MaskedDiffusionLM(config).init_weights(torch.Generator().manual_seed(0))


def padded_rows(batch, length):
    """Random tokens after 0, 1 or 2 of padding: ids (B, L), attention_mask (B, L)."""
    ids = torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(length) >= (torch.arange(batch) % 3)[:, None]
    return ids.where(mask, EOS), mask


@pytest.fixture
def llama(model):
    c = model.config
    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.d_model,
        intermediate_size=c.mlp_hidden_size,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads,
        rms_norm_eps=c.rms_norm_eps,
        rope_theta=c.rope_theta,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        attn_implementation="eager",
    )
    for p in model.parameters():  # norms too: weights of 1 would hide a misplaced one
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    oracle = LlamaForCausalLM(config).eval()
    missing, unexpected = oracle.load_state_dict(
        {llama_name(k): v for k, v in model.state_dict().items()}, strict=False
    )
    assert not missing and not unexpected
    return oracle


def bidirectional(mask):
    """An additive mask (B, 1, L, L) under which everyone sees everyone but padding."""
    return torch.where(mask[:, None, None, :], 0.0, torch.finfo(torch.float32).min).expand(-1, 1, mask.shape[1], -1)


@pytest.mark.parametrize("padded", [False, True])
def test_logits_equal_transformers_llama(model, llama, padded):
    ids, mask = padded_rows(6, 9)
    mask = mask if padded else torch.ones_like(mask)
    positions = torch.arange(9).expand(6, -1)
    expected = llama(ids, attention_mask=bidirectional(mask), position_ids=positions).logits
    assert (model(ids, mask) - expected)[mask].abs().max() < 1e-5


def test_positions_equals_slicing_and_padding_is_invisible(model):
    ids, mask = padded_rows(6, 9)
    positions = torch.rand(6, 9, generator=torch.Generator().manual_seed(0)) < 0.3
    assert torch.allclose(model(ids, mask, positions), model(ids, mask)[positions], atol=1e-6)
    row = 2  # two tokens of padding on the left
    assert torch.allclose(model(ids[row : row + 1, 2:])[0], model(ids, mask)[row, 2:], atol=1e-5)


def test_it_sees_the_future(model):
    ids = padded_rows(1, 9)[0]
    changed = ids.clone()
    changed[0, -1] = 3 if ids[0, -1] != 3 else 4
    assert not torch.allclose(model(ids)[0, 0], model(changed)[0, 0])


def test_bfloat16_stays_bfloat16_and_norms_run_in_float32(model):
    ids, mask = padded_rows(6, 5)
    logits = model.to(torch.bfloat16)(ids, mask)
    assert logits.dtype == torch.bfloat16
    norm = model.model.transformer.ln_f
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = x.float() / (x.float().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert torch.equal(norm(x), norm.weight * exact.bfloat16())


def test_the_real_sizes_have_8_015_581_184_parameters():
    sizes = {"d_model": 4096, "n_layers": 32, "n_heads": 32, "mlp_hidden_size": 12288, "rope_theta": 500000.0}
    with torch.device("meta"):
        model = MaskedDiffusionLM(Config(126464, 126336, 126081, **sizes))
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_015_581_184


def test_gradient_checkpointing_changes_no_gradient(model):
    ids, mask = padded_rows(6, 9)
    gradients = []
    for model.gradient_checkpointing in (False, True):
        loss = model(ids, mask).logsumexp(-1).sum()
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    assert gradients[0].norm() > 0 and torch.allclose(*gradients, rtol=1e-6, atol=1e-8)
