"""A masked diffusion language model with LLaDA's architecture and parameter names, its loss, and a tokenizer.

LLaDA (arXiv 2502.09992) is a LLaMA block without the causal mask: every position sees every other, and the
model predicts all [MASK] tokens at once. The same class is a tiny model trained from scratch on a CPU and,
filled with its published weights, LLaDA-8B (support/weights.py reads and writes them, and adds LoRA adapters).

    ids (B, L) -> wte -> n_layers x [ x + attention(norm(x)) ; x + mlp(norm(x)) ] -> ln_f -> ff_out -> logits

Reading order: Config, RMSNorm, rotate, Block, MaskedDiffusionLM, diffusion_loss; then the text, character_tokenizer.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass
class Config:
    """Sizes and ids, under LLaDA's names. Raises ValueError where they do not fit together."""

    vocab_size: int
    mask_token_id: int
    eos_token_id: int
    d_model: int = 64  # width of the residual stream
    n_layers: int = 4
    n_heads: int = 2
    mlp_hidden_size: int = 128
    rope_theta: float = 100.0  # LLaDA-8B: 500000. The longest wavelength of RoPE should match the context length
    rms_norm_eps: float = 1e-5

    def __post_init__(self):
        for name in ("d_model", "n_layers", "n_heads", "mlp_hidden_size", "rope_theta", "rms_norm_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, not positive and finite")
        if self.d_model % (2 * self.n_heads):
            raise ValueError(f"d_model {self.d_model} does not split into {self.n_heads} heads of even size")
        for name in ("mask_token_id", "eos_token_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ValueError(f"{name} {getattr(self, name)} is outside the vocabulary of {self.vocab_size}")


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, the division in float32 (or better) whatever the dtype of x."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight * F.rms_norm(wide, wide.shape[-1:], eps=self.eps).to(x.dtype)


def rope_angles(length, head_size, theta, like):
    """cos and sin (L, head_size) of position x theta^(-2i / head_size), i < head_size / 2, twice: for both halves.

    On the device of the tensor `like`, in its dtype or float32, whichever is finer."""
    frequency = theta ** -(torch.arange(0, head_size, 2, device=like.device, dtype=torch.float64) / head_size)
    angle = torch.arange(length, device=like.device, dtype=torch.float64)[:, None] * frequency.repeat(2)
    dtype = torch.promote_types(like.dtype, torch.float32)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x, cos, sin):
    """RoPE: rotate each pair (x_i, x_(i + half)) of x (B, heads, L, head_size) by its angle, in float32 or better."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)


class Block(nn.Module):
    """x + attention(norm(x)), then x + SwiGLU(norm(x)). No biases."""

    def __init__(self, config):
        super().__init__()
        d, hidden, self.n_heads = config.d_model, config.mlp_hidden_size, config.n_heads
        self.attn_norm, self.ff_norm = RMSNorm(d, config.rms_norm_eps), RMSNorm(d, config.rms_norm_eps)
        self.q_proj, self.k_proj = nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False)
        self.v_proj, self.attn_out = nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False)
        self.ff_proj, self.up_proj = nn.Linear(d, hidden, bias=False), nn.Linear(d, hidden, bias=False)
        self.ff_out = nn.Linear(hidden, d, bias=False)

    def forward(self, x, cos, sin, attention_mask):
        x = x + self.attention(self.attn_norm(x), cos, sin, attention_mask)
        h = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h))

    def attention(self, h, cos, sin, attention_mask):
        """Bidirectional: h (B, L, d) -> (B, L, d); attention_mask (B, 1, 1, L) or None hides padding from everyone."""
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (w(h).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for w in projections)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)  # (B, heads, L, head_size)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        return self.attn_out(mixed.transpose(1, 2).flatten(2))


class MaskedDiffusionLM(nn.Module):
    """The model: a callable from ids to logits, with mask_token_id and eos_token_id as attributes."""

    def __init__(self, config):
        super().__init__()
        self.config, self.mask_token_id, self.eos_token_id = config, config.mask_token_id, config.eos_token_id
        self.gradient_checkpointing = False  # keep one activation per block and compute the others again: less memory
        transformer = {
            # Not nn.Embedding(...), whose own random numbers would be drawn only to be overwritten.
            "wte": nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.d_model), freeze=False),
            "blocks": nn.ModuleList(Block(config) for _ in range(config.n_layers)),
            "ln_f": RMSNorm(config.d_model, config.rms_norm_eps),
            "ff_out": nn.Linear(config.d_model, config.vocab_size, bias=False),
        }
        self.model = nn.ModuleDict({"transformer": nn.ModuleDict(transformer)})  # names: model.transformer.blocks.0...

    def init_weights(self, generator):
        """For training from scratch at tiny size. Standard deviation 0.5 for embeddings and 0.7 / sqrt(fan_in) for
        linear layers: with GPT's 0.02 everywhere the policy gradient drowned in noise and nothing was learnt."""
        for module in self.modules():
            if isinstance(module, (nn.Embedding, nn.Linear)):
                std = 0.5 if isinstance(module, nn.Embedding) else 0.7 / math.sqrt(module.in_features)
                nn.init.normal_(module.weight, std=std, generator=generator)
        return self

    def forward(self, input_ids, attention_mask=None, positions=None):
        """input_ids (B, L) long; attention_mask (B, L) bool, False = padding; positions (B, L) bool or None.

        Returns logits (B, L, V), or (N, V) at the N True positions in row-major order: with 126,464 words the head
        is most of the memory, and a step needs a few rows of it.
        """
        transformer = self.model.transformer
        x = transformer.wte(input_ids)  # (B, L, d)
        cos, sin = rope_angles(x.shape[1], self.config.d_model // self.config.n_heads, self.config.rope_theta, x)
        if attention_mask is not None:  # also where nothing is padding: another kernel would round otherwise, and
            attention_mask = attention_mask[:, None, None, :]  # (B, 1, 1, L): rollout and update differ in their rows
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for block in transformer.blocks:
            inputs = x, cos, sin, attention_mask
            x = checkpoint(block, *inputs, use_reentrant=False) if recompute else block(*inputs)
        return transformer.ff_out(transformer.ln_f(x if positions is None else x[positions]))


def diffusion_loss(model, ids, attention_mask, answer, generator):
    """LLaDA's training loss, an upper bound on -log p(answer | given) per token of it, in nats (arXiv 2502.09992).

    Each sequence draws t in (0, 1], masks every token of its answer with probability t, and pays the cross-entropy
    of the masked tokens, divided by t. What is given is never masked, wherever it stands. t is stratified over the
    batch: t_i = (i + U) / B. ids (B, L) long with the true answers in place; attention_mask and answer (B, L) bool.
    """
    batch = len(ids)
    t = (torch.arange(batch) + 1 - torch.rand(1, generator=generator)) / batch  # (B,) in (0, 1]
    t = t[:, None].expand_as(ids)  # (B, L)
    masked = answer.clone()  # (B, L)
    masked[answer] = torch.rand(int(answer.sum()), generator=generator) < t[answer]  # one draw a token, row by row
    logits = model(ids.masked_fill(masked, model.mask_token_id), attention_mask, positions=masked)  # (N, V)
    nll = F.cross_entropy(logits, ids[masked], reduction="none")  # (N,)
    return (nll / t[masked]).sum() / answer.sum()


CHARACTERS = "0123456789+-*/()= abcdefghijklmnop"


def character_tokenizer():
    """A tokenizer of one token per character for the tiny model, with the interface of LLaDA's.

    Its chat template renders <bos> and the last message only, so tiny and LLaDA share apply_chat_template, padding
    (left) and decode. A character outside CHARACTERS becomes <unk>.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"eos_token": "<eos>", "bos_token": "<bos>", "mask_token": "<mask>", "unk_token": "<unk>"}
    ids = {token: i for i, token in enumerate([*special.values(), *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", pad_token="<eos>", **special)
    fast.chat_template = "{{ bos_token }}{{ messages[-1]['content'] }}"
    return fast
