"""Shared by the tests: small models and rollouts. One thread: the tensors are tiny, and other tests run beside."""

import json

import pytest
import torch

from agrpo import AGRPOConfig, rollout
from tiny_dllm import Config, MaskedDiffusionLM

torch.set_num_threads(1)
EOS, MASK, VOCAB = 0, 1, 12


@pytest.fixture
def model():
    config = Config(VOCAB, MASK, EOS, d_model=16, n_layers=2, n_heads=2, mlp_hidden_size=32)
    return MaskedDiffusionLM(config).init_weights(torch.Generator().manual_seed(0))


def make_config(**options):
    return AGRPOConfig(**{"completion_length": 8, "sampling_steps": 4, "mc_samples": 2} | options)


def make_prompts(batch=6, length=5):
    """Prompts of different lengths, padded on the left: ids (B, P), mask (B, P)."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCAB, (batch, length), generator=generator)
    mask = torch.arange(length) >= (torch.arange(batch) % 3)[:, None]
    return ids.where(mask, EOS), mask


def make_rollout(model, config, batch=6, seed=2, micro_batch=None):
    return rollout(model, *make_prompts(batch), config, torch.Generator().manual_seed(seed), micro_batch)


def gradient(model):
    """What has been accumulated in .grad, as one vector; clears it."""
    flat = torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in model.parameters()])
    model.zero_grad()
    return flat


# What LLaDA's own tokenizer does with a chat: a header and an end for every message, then the assistant's header.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] }}<|eot_id|>{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)


def make_llada_folder(folder, shards=2, **sizes):
    """A small random checkpoint of LLaDA's structure as the hub has it: sharded, with a trap in place of its code."""
    from safetensors.torch import save_file
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|startoftext|>", "<|endoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|mask|>"]
    characters = ["\n", *map(chr, range(32, 127))]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(special + characters)}, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[1])
    fast.add_special_tokens({"additional_special_tokens": special[2:]})
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    sizes = {"d_model": 16, "n_layers": 2, "n_heads": 2, "mlp_hidden_size": 32} | sizes
    model = MaskedDiffusionLM(Config(len(fast), mask_token_id=5, eos_token_id=1, **sizes))
    model.init_weights(torch.Generator().manual_seed(0)).save_pretrained(folder)
    (folder / "trap.py").write_text("raise SystemExit('remote code was run')")
    trap = {"auto_map": {name: f"trap.{name}" for name in ("AutoConfig", "AutoModel", "AutoTokenizer")}}
    for name in ("config.json", "tokenizer_config.json"):
        stored = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(stored | trap))
    if shards > 1:
        state = model.state_dict()
        files = {n: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, n in enumerate(state)}
        for file in set(files.values()):
            save_file({name: state[name] for name in state if files[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        (folder / "model.safetensors").unlink()
    return model


@pytest.fixture(scope="session")
def llada_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llada")
    make_llada_folder(folder)
    return folder
