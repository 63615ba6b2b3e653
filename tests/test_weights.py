"""Published checkpoints load as they are, sharded or not, without running code; broken ones say so in one line."""

import json

import pytest
import torch
from conftest import make_llada_folder
from safetensors.torch import load_file, save_file

import tiny_dllm
from tiny_dllm import MaskedDiffusionLM, load, load_tokenizer


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_every_weight_arrives(tmp_path, shards, dtype):
    original = make_llada_folder(tmp_path, shards).state_dict()
    loaded = MaskedDiffusionLM.from_pretrained(tmp_path, dtype).state_dict()
    assert loaded.keys() == original.keys()
    assert all(torch.equal(loaded[name], original[name].to(dtype)) for name in original)


def test_the_tokenizer_loads_without_the_folders_code_and_without_a_question(llada_folder, monkeypatch):
    def asked(*_):
        raise AssertionError("asked on standard input")

    monkeypatch.setattr("builtins.input", asked)
    tokenizer = load_tokenizer(llada_folder)  # trap.py there ends the process when it is run
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
        ("missing", "lacks model.transformer.ff_out.weight"),
        ("surplus", "surplus model.transformer.wpe.weight"),
        ("misshapen", "shape [3, 3]"),
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


def test_hub_repositories_are_pinned_and_only_data_is_downloaded(llada_folder, monkeypatch):
    asked = {}

    def snapshot_download(name, revision, allow_patterns):
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        return str(llada_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    load("GSAI-ML/LLaDA-8B-Instruct")
    assert asked["revision"] == "6059b30c9531767ce47e0ca6a8161a6bb0c67693"
    assert not any(pattern.endswith((".py", ".bin", "*")) for pattern in asked["patterns"])
    load("GSAI-ML/LLaDA-8B-Instruct", revision="main")
    assert asked["revision"] == "main"


def test_the_real_config_has_8_015_581_184_parameters():
    sizes = {"d_model": 4096, "n_layers": 32, "n_heads": 32, "mlp_hidden_size": 12288, "rope_theta": 500000.0}
    with torch.device("meta"):
        model = MaskedDiffusionLM(tiny_dllm.Config(126464, 126336, 126081, **sizes))
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_015_581_184
