"""The model is a LLaMA without the causal mask: equal to transformers' own with the same weights, to 1e-5."""

import json
import re

import pytest
import torch
from conftest import EOS, MASK, VOCAB, make_prompts
from transformers import LlamaConfig, LlamaForCausalLM

from tiny_dllm import STRUCTURE, MaskedDiffusionLM

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
    ids, mask = make_prompts(6, 9)
    mask = mask if padded else torch.ones_like(mask)
    positions = torch.arange(9).expand(6, -1)
    expected = llama(ids, attention_mask=bidirectional(mask), position_ids=positions).logits
    assert (model(ids, mask) - expected)[mask].abs().max() < 1e-5


def test_positions_equals_slicing_and_padding_is_invisible(model):
    ids, mask = make_prompts(6, 9)
    positions = torch.rand(6, 9, generator=torch.Generator().manual_seed(0)) < 0.3
    assert torch.allclose(model(ids, mask, positions), model(ids, mask)[positions], atol=1e-6)
    row = 2  # two tokens of padding on the left
    assert torch.allclose(model(ids[row : row + 1, 2:])[0], model(ids, mask)[row, 2:], atol=1e-5)


def test_it_sees_the_future(model):
    ids = make_prompts(1, 9)[0]
    changed = ids.clone()
    changed[0, -1] = 3 if ids[0, -1] != 3 else 4
    assert not torch.allclose(model(ids)[0, 0], model(changed)[0, 0])


def test_bfloat16_stays_bfloat16_and_norms_run_in_float32(model):
    ids, mask = make_prompts()
    logits = model.to(torch.bfloat16)(ids, mask)
    assert logits.dtype == torch.bfloat16
    norm = model.model.transformer.ln_f
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = x.float() / (x.float().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert torch.equal(norm(x), norm.weight * exact.bfloat16())


def test_weights_and_config_travel_under_lladas_names(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "llada" and config["d_model"] == 16 and config["mask_token_id"] == MASK
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {"model.transformer.wte.weight", "model.transformer.blocks.1.ff_out.weight"} < names
    again = MaskedDiffusionLM.from_pretrained(tmp_path)
    ids, mask = make_prompts()
    assert torch.equal(again(ids, mask), model(ids, mask)) and again.eos_token_id == EOS
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    "change, word",
    [
        ({"include_bias": True}, "include_bias"),
        ({"n_kv_heads": 1}, "n_kv_heads"),
        ({"mlp_hidden_size": 48}, "shape"),
        ({"n_layers": 3}, "blocks.2"),
        ({"mask_token_id": VOCAB}, "vocabulary"),
        ({"n_heads": 3}, "heads"),
    ],
)
def test_another_structure_is_refused_in_one_line(model, tmp_path, change, word):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=word) as error:
        MaskedDiffusionLM.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)
    assert set(STRUCTURE) <= set(config)
