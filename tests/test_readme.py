"""The README's four lines run, its commands parse, its links lead somewhere, and the lesson keeps its size."""

import re
import shlex
from pathlib import Path

import pytest
import torch

import agrpo
import train
from experiments import oracle

ROOT = Path(__file__).resolve().parent.parent
PAGES = {page: (ROOT / page).read_text() for page in ("README.md", "docs/laboratory.md", "docs/large-models.md")}
README = PAGES["README.md"]


def test_the_four_lines_are_the_algorithm():
    """Around them an optimizer step: what was rewarded becomes more likely."""
    torch.manual_seed(0)
    model, generator = agrpo.SmallModel(), torch.Generator().manual_seed(0)
    config = agrpo.AGRPOConfig(sampling_steps=4, mc_samples=2)
    ids = torch.full((64, 5), model.mask_token_id)
    ids[:, 0] = 3
    names = {"agrpo": agrpo, "model": model, "ids": ids, "attention_mask": ids > -1, "config": config}
    names |= {"generator": generator, "judge": lambda ids: (ids[:, 1:] == 7).float().mean(1)}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    code, rewards = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1), []
    assert len(code.splitlines()) == 4
    for _ in range(30):
        optimizer.zero_grad()
        exec(code, names)
        optimizer.step()
        rewards.append(names["rewards"].mean().item())
    assert rewards[0] < 0.3 < 0.8 < rewards[-1]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_accepted(page):
    commands = re.findall(r"(?:python|torchrun[^`\n]*?) (train\.py[^`\n|]*)", PAGES[page])
    assert len(commands) >= (2 if "laboratory" in page else 6)
    for command in commands:
        train.parse_arguments(shlex.split(command.partition("#")[0])[1:])


@pytest.mark.parametrize("page", PAGES)
def test_every_file_it_names_exists(page):
    for link in re.findall(r"\]\(([\w./-]+?)(?:#[\w-]+)?\)", PAGES[page]):
        assert ((ROOT / page).parent / link).exists(), link
    for file in re.findall(r"python (experiments/[\w/]+\.py)", PAGES[page]):
        assert (ROOT / file).exists(), file


def test_the_files_to_read_are_listed_with_their_number_of_lines():
    rows = re.findall(r"^\| \[([\w/]+\.py)\]\([^)]*\) \| (\d+) \|", README, re.MULTILINE)
    assert {name for name, _ in rows} == {path.name for path in ROOT.glob("*.py")}
    for name, count in rows:
        actual = len((ROOT / name).read_text().splitlines())
        assert abs(actual - int(count)) <= 0.05 * actual, (name, actual)


def test_the_lesson_fits_in_a_sitting():
    assert len(README.split()) <= 2500 and len(README.splitlines()) <= 230
    assert len((ROOT / "agrpo.py").read_text().splitlines()) <= 400


def test_the_example_of_an_own_estimator_is_caught(capsys):
    oracle.main([str(ROOT / "experiments/my_estimate.py:lowest_entropy")])
    assert "biased" in capsys.readouterr().out.splitlines()[-1]


def test_agrpo_learns_by_itself(capsys):
    """python agrpo.py: the reward rises, and the clip is seen to act in a second update."""
    torch.manual_seed(0)
    agrpo.demonstration()
    lines = capsys.readouterr().out.splitlines()
    rewards = [float(re.search(r"reward ([\d.]+)", line).group(1)) for line in lines[:-1]]
    clipped = [int(re.search(r"(\d+)% clipped", line).group(1)) for line in lines[:-1]]
    assert rewards[0] < 0.6 and rewards[-1] > 0.95 and max(clipped) > 0
