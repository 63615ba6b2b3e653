"""A masked diffusion language model with LLaDA's architecture and parameter names, in one sitting.

LLaDA (arXiv 2502.09992) is a LLaMA block without the causal mask: every position sees every other, and the
model predicts all [MASK] tokens at once. The same class is a tiny model trained from scratch on a CPU and,
filled with its published weights, LLaDA-8B. No code of the hub's is ever run, and no pickle is ever opened.

    ids (B, L) -> wte -> n_layers x [ x + attention(norm(x)) ; x + mlp(norm(x)) ] -> ln_f -> ff_out -> logits

Reading order: Config, RMSNorm, rotate, Block, MaskedDiffusionLM, diffusion_loss; then how weights come in
(load, add_lora) and text (load_tokenizer, character_tokenizer).
"""

import json
import math
import os
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# What every model of this structure has in common, in the words of LLaDA's config.json: written on save, and a
# folder that says otherwise is refused on load instead of being run as something that it is not.
STRUCTURE = {
    "model_type": "llada",
    "block_type": "llama",
    "layer_norm_type": "rms",
    "activation_type": "silu",
    "rope": True,
    "alibi": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "weight_tying": False,
    "attention_layer_norm": False,
    "input_emb_norm": False,
    "scale_logits": False,
}

# Hub repositories change under their names; these do not. Others: --revision, or the newest, which is recorded.
REVISIONS = {"GSAI-ML/LLaDA-8B-Instruct": "6059b30c9531767ce47e0ca6a8161a6bb0c67693"}

# LoRA adapts every linear layer of the blocks. The vocabulary head is called ff_out too, but lies outside them.
LORA_TARGETS = r".*\.blocks\.\d+\.(q_proj|k_proj|v_proj|attn_out|ff_proj|up_proj|ff_out)"


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
    angle = torch.arange(length, device=like.device, dtype=torch.float64)[:, None] * frequency  # (L, head_size / 2)
    angle = torch.cat([angle, angle], 1)
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
        q, k, v = (
            w(h).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for w in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)  # (B, heads, L, head_size)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        return self.attn_out(mixed.transpose(1, 2).flatten(2))


class MaskedDiffusionLM(nn.Module):
    """The model: a callable from ids to logits, with mask_token_id and eos_token_id as attributes."""

    def __init__(self, config):
        super().__init__()
        self.config, self.mask_token_id, self.eos_token_id = config, config.mask_token_id, config.eos_token_id
        self.name_or_path = self.revision = None  # where the weights came from; peft writes both into adapters
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
        if attention_mask is not None:
            attention_mask = None if attention_mask.all() else attention_mask[:, None, None, :]  # (B, 1, 1, L)
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for block in transformer.blocks:
            inputs = x, cos, sin, attention_mask
            x = checkpoint(block, *inputs, use_reentrant=False) if recompute else block(*inputs)
        return transformer.ff_out(transformer.ln_f(x if positions is None else x[positions]))

    def save_pretrained(self, path):
        """Write config.json and model.safetensors into the folder `path`, each renamed into place when complete."""
        from safetensors.torch import save_file

        os.makedirs(path, exist_ok=True)
        sizes = asdict(self.config)
        config = STRUCTURE | sizes | {"n_kv_heads": sizes["n_heads"], "embedding_size": sizes["vocab_size"]}
        with open(os.path.join(path, "config.json.tmp"), "w") as file:
            json.dump(config, file, indent=2)
        save_file(self.state_dict(), os.path.join(path, "model.safetensors.tmp"), metadata={"format": "pt"})
        for name in ("model.safetensors", "config.json"):
            os.replace(os.path.join(path, name + ".tmp"), os.path.join(path, name))

    @classmethod
    def from_pretrained(cls, path_or_hub_id, dtype=None, device="cpu", revision=None):
        """Our model with the weights of a folder or hub repository of LLaDA's structure, in dtype, on the device.

        Tensor by tensor into a model without memory, from a file that is mapped: one tensor is held twice at most.
        Raises ValueError, in one line, on another structure, missing, surplus or misshapen tensors, broken files, and
        pickles.
        """
        from safetensors import SafetensorError, safe_open

        folder = local_folder(path_or_hub_id, revision)
        with torch.device("meta"):
            model = cls(read_config(os.path.join(folder, "config.json")))
        shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
        try:
            files = weight_files(folder)
            if wrong := sorted(shapes.keys() ^ files.keys()):
                which = "lacks" if wrong[0] in shapes else "has a surplus"
                raise ValueError(f"it {which} {wrong[0]} ({len(wrong)} such tensors in all)")
            for file in sorted(set(files.values())):
                with safe_open(file, "pt", device=str(device)) as shard:
                    names = [name for name in files if files[name] == file]
                    if wrong := sorted(set(shard.keys()).symmetric_difference(names)):
                        raise ValueError(f"index and {os.path.basename(file)} differ in {wrong[0]}")
                    for name in names:
                        found = shard.get_slice(name).get_shape()
                        if found != shapes[name]:
                            raise ValueError(f"{name} has shape {found}, not {shapes[name]}")
                        tensor = shard.get_tensor(name)
                        tensor = tensor.to(dtype or tensor.dtype, copy=True)  # a copy: the file may be replaced
                        model.load_state_dict({name: tensor}, strict=False, assign=True)
        except (SafetensorError, OSError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"the weights in {folder} do not fit: {' '.join(str(error).split())}") from error
        # A snapshot's folder is named after its commit.
        model.name_or_path = str(path_or_hub_id)
        model.revision = None if os.path.isdir(path_or_hub_id) else os.path.basename(folder)
        return model


def local_folder(path_or_hub_id, revision=None):
    """The folder itself, or the hub repository's snapshot, downloaded if need be: data only, at a fixed commit."""
    if os.path.isdir(path_or_hub_id):
        return str(path_or_hub_id)
    from huggingface_hub import snapshot_download

    revision = revision or REVISIONS.get(path_or_hub_id)
    try:
        return snapshot_download(
            str(path_or_hub_id), revision=revision, allow_patterns=["*.json", "*.safetensors", "*.jinja"]
        )
    except Exception as error:  # its own kinds differ between releases
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path_or_hub_id} is no folder here, and the hub did not give it: {reason}") from error


def read_config(file):
    """LLaDA's config.json -> Config. Raises ValueError, in one line, if it describes another structure."""
    try:
        with open(file) as opened:
            stored = json.load(opened)
        wrong = {name: stored[name] for name, value in STRUCTURE.items() if stored.get(name, value) != value}
        if stored.get("n_kv_heads") not in (None, stored["n_heads"]):
            wrong["n_kv_heads"] = stored["n_kv_heads"]
        if stored.get("embedding_size") not in (None, stored["vocab_size"]):
            wrong["embedding_size"] = stored["embedding_size"]
        config = Config(**{f.name: stored[f.name] for f in fields(Config)})
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"{file} does not describe a model of LLaDA's structure: {error}") from error
    if wrong:
        raise ValueError(f"{file} does not describe a model of LLaDA's structure: it has {wrong}")
    return config


def weight_files(folder):
    """{name of a tensor: the safetensors file that holds it}, from one file or from shards with an index."""
    from safetensors import safe_open

    index, single = (os.path.join(folder, "model.safetensors" + end) for end in (".index.json", ""))
    if os.path.exists(index):
        with open(index) as file:
            return {name: os.path.join(folder, shard) for name, shard in json.load(file)["weight_map"].items()}
    if os.path.exists(single):
        with safe_open(single, "pt") as shard:
            return dict.fromkeys(shard.keys(), single)
    pickles = [name for name in os.listdir(folder) if name.endswith((".bin", ".pt", ".pth"))]
    found = f"only {pickles[0]}, a pickle, which could run code and is not opened" if pickles else "no weights"
    raise ValueError(f"there is no model.safetensors, but {found}")


def load(path_or_hub_id, dtype=None, device="cpu", revision=None):
    """The model of a folder or hub id; where that holds a LoRA adapter in peft's format, its base model with it."""
    folder = local_folder(path_or_hub_id, revision)
    if (stored := adapter_config(folder)) is None:
        return MaskedDiffusionLM.from_pretrained(path_or_hub_id, dtype, device, revision).eval()
    if not os.path.exists(os.path.join(folder, "adapter_model.safetensors")):
        raise ValueError(f"{folder} has no adapter_model.safetensors; pickled adapters are not opened")
    base = MaskedDiffusionLM.from_pretrained(stored["base_model_name_or_path"], dtype, device, stored.get("revision"))
    peft = import_peft()
    try:  # eval: an adapter that was trained with dropout must not have it here, see add_lora
        return peft.PeftModel.from_pretrained(base, folder, is_trainable=True).eval()
    except Exception as error:  # its own kinds, and safetensors'
        raise ValueError(f"the adapter in {folder} does not fit: {' '.join(str(error).split())[:300]}") from error


def adapter_config(folder):
    """What adapter_config.json says, None where the folder holds no adapter."""
    file = os.path.join(folder, "adapter_config.json")
    if not os.path.exists(file):
        return None
    try:
        with open(file) as opened:
            stored = json.load(opened)
        if not isinstance(stored["base_model_name_or_path"], str):
            raise ValueError("base_model_name_or_path names no model")
        return stored
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"{file} does not describe an adapter: {error}") from error


def save(model, path):
    """What load reads: the whole model, or its adapter alone in peft's format."""
    # peft would compare the vocabulary with the hub's configuration class, to see whether embeddings were resized.
    model.save_pretrained(path, **({"save_embedding_layers": False} if hasattr(model, "peft_config") else {}))


def add_lora(model, rank, alpha, generator):
    """The model with a fresh adapter (arXiv 2106.09685): W x + alpha / rank B A x, B = 0, W frozen. No dropout: with
    it, rollout and update would be two policies, and the ratio not 1."""
    peft = import_peft()
    lora = peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=LORA_TARGETS, revision=model.revision
    )
    model = peft.get_peft_model(model, lora)
    for name, parameter in model.named_parameters():
        if (
            "lora_A" in name
        ):  # A (rank, inputs): peft's own distribution, but from our generator. B (outputs, rank) is 0
            bound = 1 / math.sqrt(parameter.shape[1])
            parameter.data.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
    return model.eval()


def import_peft():
    """peft is needed for adapters only, and asked for in one line where it is missing."""
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ValueError("LoRA needs peft: pip install peft") from error
    return peft


def diffusion_loss(model, prompt_ids, prompt_mask, completion_ids, generator):
    """LLaDA's training loss, an upper bound on -log p(completion | prompt) per token, in nats (arXiv 2502.09992).

    Each completion draws t in (0, 1], masks every token of it with probability t, and pays the cross-entropy of
    the masked tokens, divided by t. The prompt is never masked. t is stratified over the batch: t_i = (i + U) / B.
    prompt_ids, prompt_mask (B, P), completion_ids (B, n).
    """
    batch, n = completion_ids.shape
    t = (torch.arange(batch) + 1 - torch.rand(1, generator=generator)) / batch  # (B,) in (0, 1]
    masked = torch.rand(batch, n, generator=generator) < t[:, None]  # (B, n)
    ids = torch.cat([prompt_ids, completion_ids.masked_fill(masked, model.mask_token_id)], 1)
    attention_mask = F.pad(prompt_mask, (0, n), value=True)
    logits = model(ids, attention_mask, positions=F.pad(masked, (prompt_ids.shape[1], 0)))  # (N, V)
    nll = F.cross_entropy(logits, completion_ids[masked], reduction="none")  # (N,)
    return (nll / t[:, None].expand(-1, n)[masked]).sum() / (batch * n)


def load_tokenizer(path_or_hub_id, revision=None):
    """The tokenizer of a folder or hub id, padding on the left. Its class is named here instead of left to
    AutoTokenizer, which asks on standard input whether it may run the repository's code."""
    from transformers import PreTrainedTokenizerFast

    folder = local_folder(path_or_hub_id, revision)
    if (adapter := adapter_config(folder)) and not os.path.exists(os.path.join(folder, "tokenizer.json")):
        return load_tokenizer(adapter["base_model_name_or_path"], adapter.get("revision"))
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, padding_side="left")
    except Exception as error:  # a broken tokenizer.json raises a bare Exception
        raise ValueError(f"{folder} has no tokenizer that can be read: {' '.join(str(error).split())[:200]}") from error
    if tokenizer.chat_template is None:
        raise ValueError(f"the tokenizer in {folder} has no chat template: is it an instruction-tuned model?")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


CHARACTERS = "0123456789+-*/()= abcdefghijklmnop"


def character_tokenizer():
    """A tokenizer of one token per character for the tiny model, with the interface of LLaDA's.

    Its chat template renders <bos> and the last message only, so tiny and LLaDA share apply_chat_template, padding
    (left) and decode. A character outside CHARACTERS becomes <unk>.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<eos>", "<bos>", "<mask>", "<unk>"]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate([*special, *CHARACTERS])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="left",
        eos_token="<eos>",
        pad_token="<eos>",
        bos_token="<bos>",
        mask_token="<mask>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = "{{ bos_token }}{{ messages[-1]['content'] }}"
    return fast
