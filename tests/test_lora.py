"""LoRA adapters: where they sit, that they start as the base model, travel in peft's format, and are the only thing
trained; and activation checkpointing, which changes memory and nothing else."""

import copy
import json

import pytest
import torch

import agrpo
from agrpo import AGRPOConfig, accumulate_gradient, group_advantages, rollout
from support.weights import add_lora, frozen_copy, load, save, unwrapped
from tiny_dllm import Config, MaskedDiffusionLM
from variants import kl_penalty

pytest.importorskip("peft")
EOS, MASK, VOCAB = 0, 1, 12
CONFIG = AGRPOConfig(sampling_steps=4, mc_samples=2)


def sequences():
    """Six questions of different lengths, padded on the left, and eight [MASK]: ids, attention_mask (6, 13)."""
    ids = torch.randint(2, VOCAB, (6, 5), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(13) >= (torch.arange(6) % 3)[:, None]
    ids = torch.cat([ids, torch.full((6, 8), MASK)], 1)
    return ids.where(mask, EOS), mask


def trajectories(model, config=CONFIG):
    return rollout(model, *sequences(), config, torch.Generator().manual_seed(2))


def accumulate(model, run, config=CONFIG, micro_batch=3, penalty=None):
    """One update of the run with fixed rewards; returns its statistics, and what is in .grad, which it clears."""
    weights = agrpo.sample_timesteps(run, config, torch.Generator().manual_seed(0))
    tables = {"advantages": group_advantages(torch.tensor([1.0, 0.0, 0.0, 3.0, 1.0, 0.0]), 3), "weights": weights}
    stats = accumulate_gradient(model, run, **tables, config=config, micro_batch=micro_batch, penalty=penalty)
    gradient = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return stats, gradient


@pytest.fixture
def base(tmp_path):
    config = Config(VOCAB, MASK, EOS, d_model=16, n_layers=2, n_heads=2, mlp_hidden_size=32)
    save(MaskedDiffusionLM(config).init_weights(torch.Generator().manual_seed(0)), tmp_path / "base")
    return load(tmp_path / "base")


@pytest.fixture
def adapted(base):
    return add_lora(copy.deepcopy(base), 4, 8, torch.Generator().manual_seed(1))


def perturb(model):
    """Move the adapter away from zero, as training does."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.1
    return model


def test_seven_matrices_of_each_block_are_adapted_and_not_the_head(adapted):
    names = {name.split(".lora_A")[0] for name, _ in adapted.named_parameters() if "lora_A" in name}
    layers = "q_proj k_proj v_proj attn_out ff_proj up_proj ff_out".split()
    assert names == {f"base_model.model.model.transformer.blocks.{i}.{layer}" for i in range(2) for layer in layers}
    assert all("lora_" in name for name, parameter in adapted.named_parameters() if parameter.requires_grad)


def test_a_fresh_adapter_is_the_base_model_and_the_same_for_the_same_seed(base, adapted):
    ids, mask = sequences()
    assert torch.equal(adapted(ids, attention_mask=mask), base(ids, attention_mask=mask))
    again = add_lora(copy.deepcopy(base), 4, 8, torch.Generator().manual_seed(1))
    assert all(torch.equal(a, b) for a, b in zip(adapted.parameters(), again.parameters()))


def test_on_policy_the_ratio_is_1_and_only_the_adapter_gets_a_gradient(adapted):
    config = AGRPOConfig(sampling_steps=4, mc_samples=2, temperature=0.6, top_k=5, top_p=0.9)
    stats, gradient = accumulate(adapted, trajectories(perturb(adapted), config), config)
    assert stats["ratio_error"] < 1e-6 and stats["evaluations"] > 0
    assert gradient.keys() == {name for name, _ in adapted.named_parameters() if "lora_" in name}


def test_the_reference_policy_is_the_model_with_its_adapter_off(base, adapted):
    ids, mask = sequences()
    reference = frozen_copy(perturb(adapted))
    assert torch.equal(reference(ids, attention_mask=mask), base(ids, attention_mask=mask))
    assert not torch.allclose(adapted(ids, attention_mask=mask), base(ids, attention_mask=mask))


def test_without_an_adapter_it_is_a_copy_that_stays(base):
    ids, mask = sequences()
    reference, before = frozen_copy(base), base(ids, attention_mask=mask)
    with torch.no_grad():
        next(base.parameters()).add_(1.0)
    assert torch.equal(reference(ids, attention_mask=mask), before)
    assert not torch.allclose(base(ids, attention_mask=mask), before)


def test_a_kl_to_the_adapters_absence_is_zero_at_first_and_pulls_back_later(adapted):
    penalty = kl_penalty(frozen_copy(adapted), 0.1, CONFIG, MASK)
    run = trajectories(adapted)
    plain, (stats, gradient) = accumulate(adapted, run), accumulate(adapted, run, penalty=penalty)
    assert stats["penalty"] == pytest.approx(0, abs=1e-7)
    assert all(torch.allclose(g, plain[1][name], atol=1e-7) for name, g in gradient.items())
    stats, _ = accumulate(perturb(adapted), run, penalty=penalty)
    assert stats["penalty"] > 1e-5


def test_an_adapter_travels_in_pefts_format(base, adapted, tmp_path):
    save(perturb(adapted), tmp_path / "adapter")
    stored = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert stored["base_model_name_or_path"] == str(tmp_path / "base") and stored["r"] == 4
    ids, mask = sequences()
    assert torch.equal(load(tmp_path / "adapter")(ids, attention_mask=mask), adapted(ids, attention_mask=mask))
    import peft

    other = peft.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter")  # as a user of peft would
    assert torch.equal(other(ids, attention_mask=mask), adapted(ids, attention_mask=mask))


def test_an_adapter_trained_with_dropout_runs_without_it(adapted, tmp_path):
    save(perturb(adapted), tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(stored | {"lora_dropout": 0.5}))
    ids, mask = sequences()
    assert torch.equal(load(tmp_path)(ids, attention_mask=mask), adapted(ids, attention_mask=mask))


@pytest.mark.parametrize("how", ["truncated", "no base"])
def test_a_broken_adapter_says_so_in_one_line(adapted, tmp_path, how):
    save(adapted, tmp_path)
    if how == "truncated":
        file = tmp_path / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-50])
    else:
        (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": null}')
    with pytest.raises(ValueError, match="adapter") as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_pickled_adapters_are_refused(adapted, tmp_path):
    save(adapted, tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="pickled"):
        load(tmp_path)


@pytest.mark.parametrize("lora", [False, True])
def test_activation_checkpointing_changes_no_gradient(base, adapted, lora):
    model = perturb(adapted) if lora else base
    run, gradients = trajectories(model), []
    for recompute in (False, True):
        unwrapped(model).gradient_checkpointing = recompute
        gradients.append(accumulate(model, run, micro_batch=4)[1])
    plain, recomputed = (torch.cat([g.flatten() for g in gradient.values()]) for gradient in gradients)
    assert plain.norm() > 0 and torch.allclose(plain, recomputed, rtol=1e-6, atol=1e-8)
