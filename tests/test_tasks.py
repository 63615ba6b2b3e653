"""The tasks: splits that do not leak, rewards that are exact, parsers that nothing upsets."""

import ast
import itertools
import json
import operator
import random
import subprocess
import sys
import time
import types
from fractions import Fraction

import pytest

from support import words
from tasks import SPLITS, TASKS, all_grids, evaluate, extract_answer, solutions

COUNTDOWN, SUDOKU, TRACKING = TASKS["countdown"], TASKS["sudoku"], TASKS["tracking"]
GAME = {"numbers": [3, 7, 12], "target": 16}
GRID = {"puzzle": "0310200404001043", "solution": "4312213434211243"}
HOSTILE = (
    "",
    " ",
    "=16",
    "9**9**9**9",
    "(" * 10_000 + "1" + ")" * 10_000,
    "(" * 50 + "1" + ")" * 50,
    "(" * 99,
    "٣+١٢-٧",
    "3²",
    "12+7-٣",
    "3/(7-7)",
    "3/0",
    "-3+12+7",
    "x" * 10**6,
    "1" * 10**6,
    "<answer>" * 10**5,
    "</answer>" * 10**5,
    "</answer>12+7-3<answer>",
    "<answer></answer>12+7-3",
    "__import__('os')",
    "\x00",
    "\ud800",
    "012+7-3",
    "12 + 7 - 3 or so",
)


@pytest.fixture(params=["countdown", "sudoku", "tracking"])
def task(request):
    return TASKS[request.param]


# ---- Examples


def test_splits_share_no_countdown_pair_and_no_sudoku_grid():
    pairs = [{(*sorted(e["numbers"]), e["target"]) for e in COUNTDOWN.load(s)} for s in SPLITS]
    assert [len(p) for p in pairs] == [len(COUNTDOWN.load(s)) for s in SPLITS]  # no pair twice
    grids = [{e["solution"] for e in SUDOKU.load(s)} for s in SPLITS]
    for a, b in itertools.combinations(range(3), 2):
        assert not pairs[a] & pairs[b] and not grids[a] & grids[b]


@pytest.mark.parametrize("name", [name for name in TASKS if name.startswith("tracking")])
def test_splits_share_no_question_of_state_tracking(name):
    words = [{TASKS[name].question(e) for e in TASKS[name].load(s)} for s in SPLITS]
    assert [len(w) for w in words] == [len(TASKS[name].load(s)) for s in SPLITS]  # none twice
    assert not words[0] & words[1] and not words[0] & words[2] and not words[1] & words[2]


def test_enough_distinct_questions_and_plain_examples(task):
    assert len({task.question(e) for e in task.load("test")}) >= 500
    assert len(task.load("train")) > 4000 and len(task.load("validation")) == 500
    assert json.loads(json.dumps(task.load("test"))) == task.load("test")


def test_loading_is_deterministic_across_processes_and_leaves_the_global_generator(task):
    state = random.getstate()
    type(task)().load("validation")
    assert random.getstate() == state
    names = "('countdown', 'sudoku', 'tracking')"
    code = f"import json, tasks; print(json.dumps([tasks.TASKS[name].load('test') for name in {names}]))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    assert task.load("test") in json.loads(out)
    task.load("test").clear()  # the list is the caller's own
    assert task.load("test")


def test_unknown_split_is_refused_in_one_line(task):
    with pytest.raises(ValueError, match="^unknown split 'dev': .*$"):
        task.load("dev")


def test_every_solution_is_correct_and_fits(task):
    rng = random.Random(1)
    for split in SPLITS:
        for example in task.load(split)[:500]:
            answer = task.solution(example, rng)
            assert len(answer) <= task.completion_length and task.is_correct(answer, example)
            assert task.parse_question(task.question(example)) == example


def test_solutions_cover_every_order_of_the_terms():
    drawn = {COUNTDOWN.solution(GAME, random.Random(seed)) for seed in range(99)}
    assert drawn == {"12+7-3", "7+12-3", "12-3+7", "7-3+12"}


def test_every_puzzle_has_exactly_one_solution():
    assert len(set(all_grids())) == 288

    def count(cells):  # brute force: fill the first empty cell, look at all twelve units
        units = [[4 * i + j for j in range(4)] for i in range(4)]
        units += [*zip(*units), *([i, i + 1, i + 4, i + 5] for i in (0, 2, 8, 10))]
        for unit in units:
            filled = [cells[i] for i in unit if cells[i] != "0"]
            if len(set(filled)) < len(filled):
                return 0
        return sum(count(cells.replace("0", d, 1)) for d in "1234") if "0" in cells else 1

    for example in random.Random(2).sample(SUDOKU.load("train") + SUDOKU.load("test"), 60):
        assert count(example["puzzle"]) == 1 and count(example["solution"]) == 1
        assert all(p in ("0", s) for p, s in zip(example["puzzle"], example["solution"]))
        assert 6 <= example["puzzle"].count("0") <= 12


# ---- Questions


def test_a_typed_question_may_be_spaced_freely():
    assert COUNTDOWN.parse_question("  3  12 7=16 ") == GAME
    for text in (" 0310200404001043\n", "a31d2fg4i4kl1n43", "0310 2004 0400 1043", ".31. 2..4 .4.. 1.43"):
        assert SUDOKU.parse_question(text) == GRID
    assert COUNTDOWN.messages(GAME) == [{"role": "user", "content": "03 07 12=16"}]  # the rules are left to be learnt


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("countdown", t)
        for t in (
            "3 12 = 16",
            "3 12 7 5 = 16",
            "0 12 7 = 16",
            "3 12 21 = 16",
            "3 12 -7 = 16",
            "3 12 7 = 0",
            "3 12 7 16",
            "3 12 7 = 99",
            "٣ 12 7 = 16",
            "3 12 7 = " + "9" * 5000,
            "a\nb",
            "",
        )
    ]
    + [
        ("sudoku", t)
        for t in (
            "0310 2004 0400 104",
            "0310 2004 0400 10435",
            "0310 2004 0400 1045",
            "3310 2004 0400 1043",
            "0000 0000 0000 0000",
            "4312 2134 3421 1243",
            "٣310 2004 0400 1043",
            "a\nb",
            "",
        )
    ]
    + [
        ("tracking", t)
        for t in ("2abcadbc", "2abcadbcaa", "5abcadbca", "2abcadbce", "٣abcadbca", "abcadbca2", "a\nb", "")
    ],
)
def test_a_malformed_question_is_refused_in_one_line_with_a_valid_one(name, text):
    with pytest.raises(ValueError) as error:
        TASKS[name].parse_question(text)
    message = str(error.value)
    assert "\n" not in message and len(message) < 250
    assert TASKS[name].parse_question(message.split("'")[-2])


# ---- Rewards


def test_a_tracked_state_depends_on_every_letter_and_their_order():
    answer = TRACKING.solution({"start": 2, "letters": "abcadbca"}, None)
    state, states = 2, []
    for letter in "abcadbca":  # one table look-up after another
        state = int(TRACKING.moves[letter][state])
        states.append(str(state))
    assert answer == "".join(states)
    assert all(sorted(move) == sorted(TRACKING.STATES) for move in TRACKING.moves.values())
    last = {TRACKING.solution({"start": s, "letters": w}, None)[-1] for s in range(5) for w in ("abcadbca", "bacadbca")}
    assert last == set(TRACKING.STATES)
    moved = [[TRACKING.solution({"start": s, "letters": w}, None)[1] for s in range(5)] for w in ("ab", "ba")]
    assert moved[0] != moved[1]  # they do not commute


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("14320214", True),
        ("00000004", True),
        ("14320210", False),
        ("1432021", False),
        ("143202144", False),
        ("14320 14", False),
    ],
)
def test_tracking_rewards_the_last_state_alone(answer, right):
    example = {"start": 2, "letters": "abcadbca"}
    assert TRACKING.is_correct(answer, example) is right and TRACKING.reward(answer, example) == float(right)


def test_the_answer_stands_in_the_last_complete_pair_of_tags():
    assert extract_answer(" 12+7-3\n") == "12+7-3"
    assert extract_answer("<answer>1</answer> or <answer>\n 2 </answer> so <answer>3") == "2"
    assert extract_answer("<answer>1 <answer>2</answer></answer>") == "2"


@pytest.mark.parametrize(
    ("answer", "plain", "chat"),
    [
        ("12+7-3", 3, 3),  # form is that of an equation
        ("12+7-3=16", 3, 4),
        ("(7 - 3) + 12\n = 16", 3, 4),
        ("12+7-3=17", 0, 2 / 3),  # a wrong statement is not correct
        ("12+7+3", 0, 0),
        ("12+7+3=16", 0, 1),  # the form credit believes what is stated
        ("12*7/3-12=16", 0, 2 / 3),  # worth 16, but uses 12 twice
        ("1+1=x", 0, 1 / 3),
        ("12+7-", 0, 0),
    ],
)
def test_countdown_reward(answer, plain, chat):
    for completion in (answer, f"<think>3+12</think><answer> {answer} </answer>"):
        assert COUNTDOWN.reward(completion, GAME) == pytest.approx(plain)
        assert words.TASKS["countdown"].reward(completion, GAME) == pytest.approx(chat)
        for task in (COUNTDOWN, words.TASKS["countdown"]):
            assert task.is_correct(completion, GAME) == (plain == 3)


@pytest.mark.parametrize(
    ("answer", "plain", "chat"),
    [
        ("4312213434211243", 1, 4),
        ("| 4 | 3 | 1 | 2 |\n| 2,1,3,4 |\n 3421 / 1243", 1, 4),
        ("4312213434211244", 15 / 32, 3 + 0.25),  # the 8 blanks right, a clue changed
        ("1312213434211243", 15 / 32, 3 * 7 / 8 + 0.75),  # a blank wrong, clues kept
        ("2314213434211243", 14 / 32, 3 * 6 / 8 + 1),  # two blanks exchanged
        ("43122134342112", 14 / 32, 3),  # without its last two cells, both clues: no form
        ("43122134342112431", 0, 0),  # a cell too many is not a grid
    ],
)
def test_sudoku_reward(answer, plain, chat):
    assert SUDOKU.reward(answer, GRID) == pytest.approx(plain)
    assert words.TASKS["sudoku"].reward(answer, GRID) == pytest.approx(chat)
    for task in (SUDOKU, words.TASKS["sudoku"]):
        assert task.is_correct(answer, GRID) == (plain == 1)


def test_hostile_completions_earn_nothing_and_cost_nothing():
    start = time.perf_counter()
    for text, tasks in itertools.product(HOSTILE, (TASKS, words.TASKS)):
        for completion in (text, f"<answer>{text}</answer>"):
            # For the target behind an equals sign, as the paper has it.
            form = 1 / 3 if tasks is words.TASKS and text == "=16" else 0
            assert tasks["countdown"].reward(completion, GAME) == form, completion[:40]
            assert tasks["sudoku"].reward(completion, GRID) == 0, completion[:40]
    assert time.perf_counter() - start < 1


def oracle(text):
    """The value by Python's own grammar, walked and never run; None where ours must refuse."""
    apply = {ast.Add: operator.add, ast.Sub: operator.sub}
    apply |= {ast.Mult: operator.mul, ast.Div: operator.truediv}

    def walk(node):
        if isinstance(node, ast.BinOp):
            return apply[type(node.op)](walk(node.left), walk(node.right))
        return Fraction(node.value)  # AttributeError for whatever is not a number

    try:
        return walk(ast.parse(text, mode="eval").body)
    except (SyntaxError, KeyError, AttributeError, ZeroDivisionError):
        return None


def test_the_parser_agrees_with_pythons_own():
    rng = random.Random(3)

    def grow(depth):
        if depth == 0 or rng.random() < 0.2:
            return str(rng.randint(0, 20))
        text = f"{grow(depth - 1)}{rng.choice('+-*/')}{grow(depth - 1)}"
        return f"({text})" if rng.random() < 0.5 else text

    texts = [grow(3) for _ in range(1500)]
    texts += ["".join(rng.choices("123+-*/()", k=rng.randint(1, 8))) for _ in range(1500)]
    values = [evaluate(text) for text in texts]
    assert values == [oracle(text) for text in texts]
    assert sum(value is not None for value in values) > 1000


# ---- GSM8K, MATH and what instruction-tuned models are asked -----------------------------------


def is_correct(name, completion, answer):
    return words.TASKS[name].is_correct(completion, {"question": "?", "answer": answer})


@pytest.mark.parametrize(
    "completion, answer, verdict",
    [
        ("<think>16-3-4=9</think><answer>\\boxed{18}</answer>", "18", True),
        ("<answer>$18.00</answer>", "18", True),
        ("<answer>18 dollars a day.</answer>", "18", True),
        ("<answer>1,234</answer>", "1234", True),
        ("<answer>1234</answer>", "1,234", True),
        ("<answer>1,234</answer>", "1", False),
        ("<answer>-3</answer>", "3", False),
        ("<answer>\\frac{36}{2}</answer>", "18", True),
        ("so she has 9 left and makes 18", "18", True),
        ("<answer>18 or 20</answer>", "18", False),
        ("<answer>18, I think</answer>", "18", True),
        ("Answer: 18", "18", True),
        ("9 * 2 = 18", "18", True),
        ("<answer>\\boxed 18</answer>", "18", True),
        ("<answer>1/2</answer>", "2", False),
        ("<answer>\\frac{36}{2}</answer>", "2", False),
        ("<answer>2^3</answer>", "3", False),
        ("<answer>1e3</answer>", "3", False),
        ("<answer>10-5</answer>", "-5", False),
        ("<answer>12:30</answer>", "30", False),
        ("<answer></answer>18", "18", False),
        ("", "18", False),
    ],
)
def test_gsm8k_answers_are_read_as_a_person_reads_them(completion, answer, verdict):
    assert is_correct("gsm8k", completion, answer) == verdict


@pytest.mark.parametrize(
    "result, answer, verdict",
    [
        ("\\dfrac{14}{3}", "\\frac{14}{3}", True),
        ("14/3", "\\frac{14}{3}", True),
        ("3\\sqrt{13}", "\\sqrt{117}", True),
        ("(3,\\pi/2)", "\\left( 3, \\frac{\\pi}{2} \\right)", True),
        ("-q+p", "p - q", True),
        ("Evelyn", "\\text{Evelyn}", True),
        ("4.67", "\\frac{14}{3}", False),
        ("x^3", "3", False),
        ("2x", "2", False),
    ],
)
def test_math_answers_are_compared_as_mathematics(result, answer, verdict):
    assert is_correct("math", f"<answer>\\boxed{{{result}}}</answer>", answer) == verdict


def test_form_earns_half_a_point_for_each_pair_of_tags():
    example = {"question": "?", "answer": "5"}
    for completion, form in (
        ("<think>2+3</think><answer>5</answer>", 1.0),
        ("<answer>5</answer>", 0.5),
        ("<think>5", 0.0),
        ("</think>5<think>", 0.0),
    ):
        assert words.TASKS["gsm8k"].reward(completion, example) == 3.0 + form
        assert words.TASKS["gsm8k"].reward(completion, example | {"answer": "6"}) == form
        assert words.TASKS["gsm8k"].is_correct(completion, example)


@pytest.mark.parametrize("answer", ["9^{9^{9^{9}}}", "(" * 199, "\ud800", "{" * 150])
def test_hostile_mathematics_is_wrong_within_seconds_and_does_no_harm(answer):
    start = time.perf_counter()
    assert not is_correct("math", f"<answer>{answer}</answer>", "3")
    assert time.perf_counter() - start < 20  # the judge's limit, and a new judge after it
    assert is_correct("math", "<answer>\\frac{6}{2}</answer>", "3")


def test_a_megabyte_of_text_costs_milliseconds():
    for text in ("x" * 10**6, "\\boxed{" * 10**5, "<answer>" * 10**5, "1," * 10**6):
        start = time.perf_counter()
        assert not is_correct("gsm8k", text, "3") and not is_correct("math", text, "3")
        assert time.perf_counter() - start < 1


def test_instruction_tuned_models_get_a_system_prompt_with_the_format_and_larger_numbers():
    for name, task in words.TASKS.items():
        example = {"question": "?", "answer": "5"} if name in ("gsm8k", "math") else task.load("test")[0]
        messages = task.messages(example)
        assert messages[0]["role"] == "system" and "<think>" in messages[0]["content"]
        assert "<answer>" in messages[0]["content"]
        assert messages[-1] == {"role": "user", "content": task.question(example)}
        if name in ("countdown", "sudoku"):  # what a run suggests to ask
            assert task.parse_question(" ".join(task.question(example).split())) == example
    countdown, sudoku = words.TASKS["countdown"], words.TASKS["sudoku"]
    assert max(max(e["numbers"]) for e in countdown.load("test")) == 99 and len(countdown.load("train")) == 20000
    assert all(set(e["puzzle"]) <= set("01234") for e in sudoku.load("test")) and len(sudoku.SHOTS) == 3
    assert all(solutions(puzzle) == solutions(solution) for puzzle, solution in sudoku.SHOTS.items())


def test_every_countdown_question_for_chat_has_an_answer():
    def values(numbers):
        if len(numbers) == 1:
            return {numbers[0]}
        found = set()
        for i, j in itertools.permutations(range(len(numbers)), 2):
            rest = [x for k, x in enumerate(numbers) if k not in (i, j)]
            a, b = numbers[i], numbers[j]
            for value in [a + b, a - b, a * b] + ([a / b] if b else []):
                found |= values([*rest, value])
        return found

    for example in words.TASKS["countdown"].load("test")[:200]:
        assert example["target"] in values([Fraction(number) for number in example["numbers"]])


def test_csv_keeps_the_leading_zeros_of_a_puzzle_and_parquet_that_lost_them_gets_them_back(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    example = next(e for e in SUDOKU.load("test") if e["puzzle"].startswith("0"))
    (tmp_path / "a.csv").write_text(f"Puzzle,Solution\n{example['puzzle']},{example['solution']}\n")
    columns = {"Puzzle": [int(example["puzzle"])], "Solution": [int(example["solution"])]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    for name in ("a.csv", "a.parquet"):
        assert words.TASKS["sudoku"].read(str(tmp_path / name)) == [example]


def test_a_data_file_is_divided_without_sharing_a_question(tmp_path):
    rows = [{"question": f"{i % 60}?", "answer": f"#### {i}"} for i in range(100)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts = [words.TASKS["gsm8k"].load(split, str(tmp_path / "a.jsonl")) for split in SPLITS]
    questions = [{example["question"] for example in part} for part in parts]
    assert sum(map(len, parts)) == 100 and len(set.union(*questions)) == sum(map(len, questions)) == 60
    assert all(questions)
    with pytest.raises(ValueError, match="^unknown split 'dev': .*$"):
        words.TASKS["gsm8k"].load("dev", str(tmp_path / "a.jsonl"))


def test_math_trains_on_the_hubs_problems_without_those_of_the_test_and_without_the_hardest(monkeypatch):
    def problem(name, level="Level 2", solution="so it is $\\boxed{2}$."):
        return {"problem": name, "level": level, "type": "Algebra", "solution": solution}

    train = [problem(f"p{i}") for i in range(300)]
    train += [problem("hard", "Level 5"), problem("odd", "Level ?"), problem("none", solution="2"), problem("tested")]
    train += [problem("bare", solution="is $\\boxed 2$.")]
    hub = {
        "qwedsacf/competition_math": train,
        "HuggingFaceH4/MATH-500": [{"problem": "tested", "answer": "2", "level": 3, "solution": ""}],
    }
    load_dataset = types.SimpleNamespace(load_dataset=lambda name, *_, **__: hub[name])
    monkeypatch.setitem(sys.modules, "datasets", load_dataset)
    task = type(words.TASKS["math"])()
    found = {example["question"] for split in ("train", "validation") for example in task.load(split)}
    assert found == {f"p{i}" for i in range(300)} | {"bare"} and len(task.load("validation")) == 200
    assert [example["question"] for example in task.load("test")] == ["tested"]
