"""The script that measures LLaDA-8B on a GPU runs, at small size, on a CPU. How fast is not a test's business."""

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from experiments import speed


def test_the_measurement_at_lladas_shapes_runs_small(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.setattr(speed, "RESULTS", tmp_path)
    speed.measure("llada-small")
    result = json.loads((tmp_path / "speed-llada-small.json").read_text())
    assert result["matmul_peak"] > 0
    for part in ("rollout", "update"):
        assert 0 < result[part]["utilisation"] < 1 and result[part]["peak_memory_bytes"] > 0
        assert result[part]["seconds"] > 0 and result[part]["tokens_per_second"] > 0


def test_the_operations_are_those_of_the_matrix_products():
    setting = speed.SETTINGS["llada-small"]
    model = speed.random_model(setting, "cpu", torch.float32)
    length = setting.prompt_length + setting.config.completion_length
    positions = torch.zeros(2, length, dtype=torch.bool)
    positions[:, -3:] = True
    # The counter knows attention only as the two products that its plain form has.
    plain, counter = sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False)
    with plain, counter, torch.no_grad(), model.disable_adapter():
        model(torch.zeros(2, length, dtype=torch.long), positions=positions)
    assert counter.get_total_flops() == speed.operations(setting, 2, head_rows=6, backward=False)
