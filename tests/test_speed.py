"""The script that measures LLaDA-8B on a GPU runs, at small size, on a CPU. How fast is not a test's business."""

import json

import pytest

from experiments import report, speed


def test_the_measurement_at_lladas_shapes_runs_small(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    speed.main(["llada-small"])
    result = json.loads((tmp_path / "speed-llada-small.json").read_text())
    for part in ("rollout", "update"):
        assert all(number > 0 for number in result[part].values()) and result[part]["ratio"] > 1
        assert result[part]["tokens_per_second"] * result[part]["seconds"] == pytest.approx(4 * 24)


def test_the_bare_passes_are_those_of_the_call(monkeypatch):
    """A rollout has a pass a step, without gradient; an update one micro-batch after the other, with it; both run each
    distinct state once, and at most a third of the states are distinct."""
    setting = speed.Setting(speed.COUNTDOWN, speed.AGRPOConfig(2, mc_samples=2), (12, 8), completions=6, micro_batch=2)
    seen = {"rollout": [], "update": []}

    def numbers(part, model, tokens, setting):
        for with_gradient, ((ids, *_), options) in speed.passes_of(part, model):
            assert with_gradient == (part.__name__ == "update") and int(options["positions"].sum()) == 4 * len(ids)
            seen[part.__name__].append(len(ids))

    monkeypatch.setattr(speed, "numbers", numbers)
    speed.measure(setting)
    assert len(seen["rollout"]) == 2 and seen["rollout"][0] == 1  # one question
    assert sum(seen["update"]) == sum(seen["rollout"]) <= 6 * 2 / 3 and max(seen["update"]) <= 2
