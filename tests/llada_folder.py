"""A small random checkpoint of LLaDA's structure as the hub has it, and a tokenizer that chats as its own does."""

import json

import pytest
import torch

from support.weights import save
from tiny_dllm import Config, MaskedDiffusionLM

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
    save(model.init_weights(torch.Generator().manual_seed(0)), folder)
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
