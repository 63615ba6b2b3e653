"""Published checkpoints load as they are, sharded or not, without running code; broken ones say so in one line."""

import json

import pytest
import torch
from llada_folder import make_llada_folder
from safetensors.torch import load_file, save_file

from support.weights import STRUCTURE, load, load_tokenizer, read_weights, save


def logits(model):
    ids = torch.arange(6, 46).view(4, 10)
    return model(ids, torch.arange(10) >= torch.arange(4)[:, None])


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_every_weight_arrives(tmp_path, shards, dtype):
    original = make_llada_folder(tmp_path, shards).state_dict()
    loaded = read_weights(tmp_path, dtype).state_dict()
    assert loaded.keys() == original.keys()
    assert all(torch.equal(loaded[name], original[name].to(dtype)) for name in original)


def test_weights_and_config_travel_under_lladas_names(tmp_path):
    model = make_llada_folder(tmp_path / "hub", shards=1)
    save(model, tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["model_type"] == "llada" and config["d_model"] == 16 and config["mask_token_id"] == 5
    assert STRUCTURE.items() <= config.items()
    names = load_file(tmp_path / "ours" / "model.safetensors").keys()
    assert {"model.transformer.wte.weight", "model.transformer.blocks.1.ff_out.weight"} < names
    again = read_weights(tmp_path / "ours")
    assert torch.equal(logits(again), logits(model)) and again.eos_token_id == 1
    assert again.name_or_path == str(tmp_path / "ours") and again.revision is None
    assert not list((tmp_path / "ours").glob("*.tmp"))


def test_the_tokenizer_loads_without_the_folders_code_and_without_a_question(tmp_path, monkeypatch):
    def asked(*_):
        raise AssertionError("asked on standard input")

    make_llada_folder(tmp_path)
    monkeypatch.setattr("builtins.input", asked)
    tokenizer = load_tokenizer(tmp_path)  # trap.py there ends the process when it is run
    chat = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1"}]
    ids = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
    text = tokenizer.decode(ids)
    assert text.startswith("<|startoftext|><|start_header_id|>system") and text.count("<|startoftext|>") == 1
    assert text.endswith("<|start_header_id|>assistant<|end_header_id|>\n\n") and tokenizer.padding_side == "left"


def broken(folder, how):
    """Break the one-file checkpoint in the folder."""
    file = folder / "model.safetensors"
    state = load_file(file)
    head = "model.transformer.ff_out.weight"
    if how == "missing":
        save_file({name: tensor for name, tensor in state.items() if name != head}, file)
    elif how == "surplus":
        save_file(state | {"model.transformer.wpe.weight": torch.zeros(1)}, file)
    elif how == "misshapen":
        save_file(state | {head: torch.zeros(3, 3)}, file)
    elif how == "truncated":
        file.write_bytes(file.read_bytes()[:-1000])
    elif how == "pickle":
        torch.save(state, folder / "pytorch_model.bin")
        file.unlink()
    elif how == "no shard":
        index = {"weight_map": dict.fromkeys(state, "model-00001-of-00001.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif how == "structure":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"weight_tying": True}))


@pytest.mark.parametrize(
    "how, word",
    [
        ("missing", 'Missing key(s) in state_dict: "model.transformer.ff_out.weight"'),
        ("surplus", 'Unexpected key(s) in state_dict: "model.transformer.wpe.weight"'),
        ("misshapen", "shape torch.Size([3, 3])"),
        ("truncated", "do not fit"),
        ("pickle", "a pickle"),
        ("no shard", "model-00001-of-00001"),
        ("structure", "weight_tying"),
    ],
)
def test_a_broken_checkpoint_says_so_in_one_line(tmp_path, how, word):
    make_llada_folder(tmp_path, shards=1)
    broken(tmp_path, how)
    with pytest.raises(ValueError) as error:
        load(tmp_path)
    assert word in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, word",
    [
        ({"include_bias": True}, "include_bias"),
        ({"n_kv_heads": 1}, "n_kv_heads"),
        ({"mlp_hidden_size": 48}, "shape"),
        ({"n_layers": 3}, "blocks.2"),
        ({"mask_token_id": 102}, "vocabulary"),
        ({"n_heads": 3}, "heads"),
    ],
)
def test_another_structure_is_refused_in_one_line(tmp_path, change, word):
    make_llada_folder(tmp_path, shards=1)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=word) as error:
        read_weights(tmp_path)
    assert "\n" not in str(error.value)


def test_hub_repositories_are_pinned_and_only_data_is_downloaded(tmp_path, monkeypatch):
    make_llada_folder(tmp_path)
    asked = {}

    def snapshot_download(name, revision, allow_patterns):
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert load("GSAI-ML/LLaDA-8B-Instruct").revision == tmp_path.name  # a snapshot's folder is named after its commit
    assert asked["revision"] == "6059b30c9531767ce47e0ca6a8161a6bb0c67693"
    assert not any(pattern.endswith((".py", ".bin", "*")) for pattern in asked["patterns"])
    load("GSAI-ML/LLaDA-8B-Instruct", revision="main")
    assert asked["revision"] == "main"
