"""Weights come in and go out here: checkpoints of LLaDA's structure, LoRA adapters, and the tokenizers beside them.
No code of the hub's is ever run, and no pickle is ever opened: config.json, safetensors and tokenizer.json are data.
What does not fit, or is not there, raises ValueError in one line."""

import copy
import json
import math
import warnings
from dataclasses import asdict, fields
from pathlib import Path

import torch

from agrpo import require
from support import package
from support.runs import check_types, failing_as, read_json, write_json
from tiny_dllm import Config, MaskedDiffusionLM

# What all models of this structure share, in the words of LLaDA's config.json. A folder that says otherwise is refused
# instead of being run as something that it is not.
STRUCTURE = {"model_type": "llada", "block_type": "llama", "layer_norm_type": "rms", "activation_type": "silu"}
LACKS = "alibi include_bias include_qkv_bias weight_tying attention_layer_norm input_emb_norm scale_logits"
STRUCTURE |= {"rope": True} | dict.fromkeys(LACKS.split(), False)

# Hub repositories change under their names; these do not. Others: --revision, or the newest, which is recorded.
REVISIONS = {"GSAI-ML/LLaDA-8B-Instruct": "6059b30c9531767ce47e0ca6a8161a6bb0c67693"}

# LoRA adapts every linear layer of the blocks. The vocabulary head is called ff_out too, but lies outside them.
LORA_TARGETS = r".*\.blocks\.\d+\.(q_proj|k_proj|v_proj|attn_out|ff_proj|up_proj|ff_out)"


# ------------------------------------------------------------------------------------------- reading and writing
def load(path_or_hub_id, dtype=None, device="cpu", revision=None):
    """The model of a folder or hub id; where that holds a LoRA adapter in peft's format, its base model with it."""
    folder = local_folder(path_or_hub_id, revision)
    if (stored := adapter_config(folder)) is None:
        return read_weights(path_or_hub_id, dtype, device, revision).eval()
    found = (folder / "adapter_model.safetensors").exists()
    require(found, f"{folder} has no adapter_model.safetensors; pickled adapters are not opened")
    base = read_weights(stored["base_model_name_or_path"], dtype, device, stored.get("revision"))
    peft = package("peft", "LoRA")
    with failing_as(f"the adapter in {folder} does not fit"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found missing adapter keys")  # that is an error, and follows in one line
        model = peft.PeftModel.from_pretrained(base, folder, is_trainable=True)
        found = set(peft.load_peft_weights(str(folder), "cpu"))
        needed = set(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
        lacks, surplus = sorted(needed - found), sorted(found - needed)
        problem = f"of {len(needed)} tensors {len(lacks)} are missing, {len(surplus)} do not belong there:"
        require(not lacks + surplus, f"{problem} {', '.join(lacks[:1] + surplus[:1])}")
        model.peft_config["default"].base_model_name_or_path = base.name_or_path
        # eval: an adapter that was trained with dropout must not have it here, see add_lora
        return model.eval()


def read_weights(path_or_hub_id, dtype=None, device="cpu", revision=None):
    """Our model with the weights of a folder or hub repository of LLaDA's structure, in dtype, on the device.
    Tensor by tensor into a model without memory, from files that are mapped: one tensor is held twice at most.
    Raises ValueError on another structure, missing, surplus or misshapen tensors, broken files, and pickles."""
    from safetensors import safe_open

    folder, tensors = local_folder(path_or_hub_id, revision), {}
    with torch.device("meta"):
        model = MaskedDiffusionLM(read_config(folder / "config.json"))
    with failing_as(f"the weights in {folder} do not fit"):
        index = read_json(folder / "model.safetensors.index.json")  # says which shards there are, if not one file
        for file in sorted(set(index["weight_map"].values())) if index else ["model.safetensors"]:
            there = (folder / file).exists()
            require(there, f"there is no {file}; a pickle (.bin, .pt) could run code and is not opened")
            with safe_open(folder / file, "pt", device=str(device)) as shard:
                for name in shard.keys():  # noqa: SIM118 (it is no dict)
                    tensor = shard.get_tensor(name)
                    tensors[name] = tensor.to(dtype or tensor.dtype, copy=True)  # a copy: the file may be replaced
        model.load_state_dict(tensors, assign=True)  # says what is missing, surplus or misshapen
    # Where they came from: peft and add_lora write both into adapters. A snapshot's folder is named after its commit.
    # A path is absolute: adapters are read from other places, too.
    local = Path(path_or_hub_id).is_dir()
    model.name_or_path = str(folder.resolve() if local else path_or_hub_id)
    model.revision = None if local else folder.name
    return model


def read_config(file):
    """LLaDA's config.json -> Config. Raises ValueError if it describes another structure."""
    with failing_as(f"{file} does not describe a model of LLaDA's structure"):
        stored = json.loads(file.read_text())
        check_types(Config, stored, "it says")
        same = {"n_kv_heads": stored["n_heads"], "embedding_size": stored["vocab_size"]}  # null means the same
        expected = STRUCTURE | {name: value for name, value in same.items() if stored.get(name) is not None}
        wrong = {name: stored[name] for name, value in expected.items() if stored.get(name, value) != value}
        config = Config(**{field.name: stored[field.name] for field in fields(Config)})
        require(not wrong, f"it has {wrong}")
        return config


def save(model, path):
    """Write what load reads into the folder `path`: the whole model, or its adapter alone in peft's format."""
    from safetensors.torch import save_file

    if hasattr(model, "peft_config"):
        # Left to itself, peft reads the base model's config.json with a class of transformers, to compare vocabularies.
        return model.save_pretrained(path, save_embedding_layers=False)
    folder, config = Path(path), model.config
    folder.mkdir(parents=True, exist_ok=True)
    stored = STRUCTURE | asdict(config) | {"n_kv_heads": config.n_heads, "embedding_size": config.vocab_size}
    write_json(folder / "config.json", stored)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})


# ------------------------------------------------------------------------------------------------------- adapters
def add_lora(model, rank, alpha, generator):
    """The model with a fresh adapter (arXiv 2106.09685): W x + alpha / rank B A x, B = 0, W frozen. No dropout: with
    it, rollout and update would be two policies, and the ratio not 1."""
    peft = package("peft", "LoRA")
    commit = getattr(model, "revision", None)  # of the weights it was read from; a new model has none
    lora = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=LORA_TARGETS, revision=commit)
    model = peft.get_peft_model(model, lora)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:  # (rank, inputs): peft's own distribution, from our generator; B (outputs, rank) is 0
            bound = 1 / math.sqrt(parameter.shape[1])
            parameter.data.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
    return model.eval()


def unwrapped(model):
    """The MaskedDiffusionLM itself, also inside a LoRA adapter."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def frozen_copy(model):
    """The reference policy of a KL penalty, as a callable: under LoRA the same weights with the adapter off."""
    if not hasattr(model, "peft_config"):
        return copy.deepcopy(model)

    def reference(*inputs, **options):
        with model.disable_adapter():
            return model(*inputs, **options)

    return reference


def adapter_config(folder):
    """What adapter_config.json says, None where the folder holds no adapter."""
    file = folder / "adapter_config.json"
    with failing_as(f"{file} does not describe an adapter"):
        stored = read_json(file)
        names = not file.exists() or isinstance(stored["base_model_name_or_path"], str)
        require(names, "base_model_name_or_path names no model")
        return stored


# -------------------------------------------------------------------------------------------- tokenizers, the hub
def load_tokenizer(path_or_hub_id, revision=None):
    """The tokenizer of a folder or hub id, padding on the left. Its class is named here instead of left to
    AutoTokenizer, which asks on standard input whether it may run the repository's code."""
    from transformers import PreTrainedTokenizerFast

    folder = local_folder(path_or_hub_id, revision)
    if (adapter := adapter_config(folder)) and not (folder / "tokenizer.json").exists():
        return load_tokenizer(adapter["base_model_name_or_path"], adapter.get("revision"))
    with failing_as(f"{folder} has no tokenizer that can be read"):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, padding_side="left")
    chats = tokenizer.chat_template is not None
    require(chats, f"the tokenizer in {folder} has no chat template: is it an instruction-tuned model?")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def local_folder(path_or_hub_id, revision=None):
    """The folder itself, or the hub repository's snapshot, downloaded if need be: data only, at a fixed commit."""
    if Path(path_or_hub_id).is_dir():
        return Path(path_or_hub_id)
    from huggingface_hub import snapshot_download

    commit, data = revision or REVISIONS.get(path_or_hub_id), ["*.json", "*.safetensors", "*.jinja"]
    with failing_as(f"{path_or_hub_id} is no folder here, and the hub did not give it"):
        return Path(snapshot_download(str(path_or_hub_id), revision=commit, allow_patterns=data))
