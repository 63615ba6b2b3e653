"""The README's code runs and its commands parse."""

import re
import shlex
from pathlib import Path

import train

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


def test_the_example_learns_the_answer_it_says(capsys):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    exec(code, {})
    assert capsys.readouterr().out.strip() == code.rsplit("# ", 1)[1].strip()


def test_every_train_command_is_accepted():
    commands = re.findall(r"(?:python|torchrun[^`\n]*?) (train\.py[^`\n]*)", README)
    assert len(commands) >= 12
    for command in commands:
        train.parse_arguments(shlex.split(command.partition("#")[0])[1:])


def test_every_file_it_links_exists():
    root = Path(__file__).resolve().parent.parent
    for link in re.findall(r"\]\(([\w/]+\.?\w*)\)", README):
        assert (root / link).exists() or (root / (link + ".py")).exists(), link


def test_every_module_is_listed_with_about_its_number_of_lines():
    rows = re.findall(r"^\| \[([\w/]+\.py)\]\([^)]*\) \| (\d+) \|", README, re.MULTILINE)
    root = Path(__file__).resolve().parent.parent
    modules = [*root.glob("*.py"), *root.glob("experiments/*.py")]
    assert {name for name, _ in rows} == {str(path.relative_to(root)) for path in modules}
    for name, count in rows:
        actual = len((root / name).read_text().splitlines())
        assert abs(actual - int(count)) <= 0.05 * actual, (name, actual)
