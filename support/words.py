"""Tasks in words, for instruction-tuned models: a system message explains, the model may reason first and gives its
answer in <answer> tags. Rewards are the AGRPO paper's: 3.0 for a correct answer, and up to 1.0 for its form.

    task       question                                 completion
    countdown  "Numbers: 12, 3, 7\\nTarget: 16"         "<think>12 + 7 = ...</think><answer>12+7-3=16</answer>"
    sudoku     "Puzzle: 0310200404001043"               "<answer>4312213434211243</answer>"
    gsm8k      "Janet's ducks lay 16 eggs per day..."   "<answer>\\boxed{18}</answer>"
    math       "Convert the point $(0,3)$..."           "<answer>\\boxed{(3, \\frac{\\pi}{2})}</answer>"

Questions are generated (countdown, sudoku), fetched from the hub (gsm8k, math), or read from a local file (all four).
"""

import contextlib
import functools
import itertools
import json
import random
import re
from fractions import Fraction
from numbers import Number

from agrpo import require
from support.data import hub_rows, place, read_rows, to_examples
from support.judge import JUDGE
from support.runs import say
from tasks import ALLOWED, OPERATORS, SEED, Countdown, Sudoku, Task, all_grids, extract_answer, part_of, tagged

MAX_RESULT_LENGTH = 200  # characters of a mathematical result: of a longer one the end is kept


class InWords:
    """What a task in words adds to a Task: a system message, and data files whose rows _from_row makes examples."""

    def _split_of_file(self, split, data):
        """About a tenth of a file for testing, a twentieth for validation, the rest for training, as each key alone
        decides: a row more moves no other. Only where nothing falls to a part does the next in line stand in: in a
        longer file it may go back to training, but none that was trained on is ever held out."""
        examples = self.read(data)
        places = {key: place(f"{SEED} {json.dumps(key)}") for key in map(self.key, examples)}
        fallen = [sum(a <= p < b for p in places.values()) for a, b in ((0, 0.1), (0.1, 0.15))]
        tests, validations = (max(1, number) for number in fallen)
        require(len(places) > tests + validations, f"{data}: {len(places)} different questions are too few to divide")
        if split == "train" and not all(fallen):  # once a run
            few = f"{data}: of {len(places)} questions {fallen[0]} fall to testing, {fallen[1]} to validation"
            say(f"{few}; another stands in where it is none: add questions")
        chosen = set(part_of(sorted(places, key=places.get), split, tests, validations))
        return [example for example in examples if self.key(example) in chosen]

    def read(self, path):
        """All examples of a local JSONL, CSV or parquet file. A malformed row raises ValueError with file and line."""
        examples = to_examples(read_rows(path), self._from_row)
        require(examples, f"{path} holds no questions")
        return examples

    def messages(self, example):
        return [{"role": "system", "content": self.system}, *super().messages(example)]


# ---------------------------------------------------------- the games, as instruction-tuned models are asked them
class ChatCountdown(InWords, Countdown):
    """Countdown with numbers up to 99, targets up to 100 and all four operations."""

    MAX_NUMBER, NUM_TRAIN = 99, 20000
    system = (
        "You play a number game. A question gives some numbers and the target. Build an arithmetic expression that is "
        "worth exactly the target, with each of the numbers used once and no other number. You may use +, -, *, / and "
        "parentheses.\n"
        "Work it out between <think> and </think>. Then give the expression, an equals sign and the target between "
        "<answer> and </answer>, and nothing else there. For the numbers 2, 9, 4 and the target 7 a good reply is:\n"
        "<think>9 + 2 = 11 and 11 - 4 = 7.</think>\n<answer>9+2-4=7</answer>"
    )

    @functools.cache  # noqa: B019 (a task lives as long as the process)
    def _examples(self):
        rng, examples = random.Random(SEED), {}
        while len(examples) < self.NUM_TRAIN + self.NUM_VALIDATION + self.NUM_TEST:
            numbers = rng.choices(range(1, self.MAX_NUMBER + 1), k=3)
            a, b, c = map(Fraction, rng.sample(numbers, 3))
            first, second = rng.choices([*OPERATORS[0].values(), *OPERATORS[1].values()], k=2)
            with contextlib.suppress(ZeroDivisionError):
                value = second(first(a, b), c) if rng.random() < 0.5 else first(a, second(b, c))
                if value.denominator == 1 and 1 <= value <= 100:
                    # One target per multiset: here the splits share no multiset either.
                    examples.setdefault(tuple(sorted(numbers)), {"numbers": numbers, "target": int(value)})
        return list(examples.values())

    def question(self, example):
        return f"Numbers: {', '.join(map(str, example['numbers']))}\nTarget: {example['target']}"

    def parse_question(self, text):
        numbers = [int(number) for number in re.findall("[0-9]{1,9}", text)]
        require(len(numbers) > 2, f"{text[:40]!r} is not numbers and a target; a valid question is '3 12 7 = 16'")
        return {"numbers": numbers[:-1], "target": numbers[-1]}

    def _from_row(self, row):
        """Columns nums and target, or input ("30,100,93") and output."""
        numbers, target = (row["nums"], row["target"]) if "nums" in row else (row["input"], row["output"])
        whole = re.fullmatch(r"[0-9,;\s\[\]]+", str(numbers)) and re.fullmatch("-?[0-9]+", str(target))
        require(whole, f"{str(numbers)[:40]!r} and {str(target)[:40]!r} are not whole numbers and a target")
        return {"numbers": [int(number) for number in re.findall("[0-9]+", str(numbers))], "target": int(target)}

    def reward(self, completion, example):
        """3.0 if correct, and credit for the form of an equation, so that 12+7-3=16 earns 4: a third each for nothing
        but allowed characters left of the equals sign, for the right numbers there, for the target right of it."""
        left, equals, right = extract_answer(completion).partition("=")
        allowed = bool(re.fullmatch(ALLOWED, left, re.ASCII))
        stated = right.strip() == str(example["target"])
        form = (allowed + self._uses_the_numbers(left, example) + stated) / 3 if equals else 0.0
        return super().reward(completion, example) + form


class ChatSudoku(InWords, Sudoku):
    """Sudoku with 0 for an empty cell, after three solved examples."""

    system = (
        "You solve small Sudoku puzzles. A question is a 4x4 grid, written as its four rows from top to bottom; 0 "
        "marks an empty cell. Fill the empty cells so that each row, each column and each 2x2 corner box contains 1, "
        "2, 3 and 4 once. The given digits stay where they are.\n"
        "Work it out between <think> and </think>. Then write all 16 digits of the full grid, row after row, between "
        "<answer> and </answer>, and nothing else there."
    )
    # Their grids occur in neither of the test files that the AGRPO and d1 repositories publish.
    SHOTS = {
        "0041003040030024": "2341143242133124",
        "0002024330010100": "4312124334212134",
        "4210300400420000": "4213312413422431",
    }

    def question(self, example):
        return f"Puzzle: {example['puzzle']}"

    def parse_question(self, text):
        return super().parse_question(text.removeprefix("Puzzle:"))

    def messages(self, example):
        system, question = super().messages(example)
        shots = []
        for puzzle, solution in self.SHOTS.items():
            rows = ", ".join(solution[i : i + 4] for i in range(0, 16, 4))
            reply = f"<think>The rows of the full grid are {rows}.</think>\n<answer>{solution}</answer>"
            shots += [{"role": "user", "content": f"Puzzle: {puzzle}"}, {"role": "assistant", "content": reply}]
        return [system, *shots, question]

    def _from_row(self, row):
        """Columns Puzzle and Solution: 16 digits, 0 for an empty cell; a number has lost its leading zeros."""
        puzzle, solution = (str(row[name]).strip().zfill(16) for name in ("Puzzle", "Solution"))
        known = re.fullmatch("[0-4]{16}", puzzle) and "0" in puzzle and solution in all_grids()
        require(known, f"{puzzle[:20]!r} and {solution[:20]!r} are not a 4x4 puzzle and its full grid")
        agree = all(p in ("0", s) for p, s in zip(puzzle, solution))
        require(agree, f"the solution {solution} contradicts the puzzle {puzzle}")
        return {"puzzle": puzzle, "solution": solution}

    def reward(self, completion, example):
        """3.0 times the share of the blanks that are right, and credit for form: a quarter for 16 cells, and if it has
        them a quarter for each digit four times and a half for all clues."""
        cells, puzzle = self._cells(completion), example["puzzle"]
        right = sum(c == s for c, s, p in zip(cells, example["solution"], puzzle) if p == "0")
        balanced = all(cells.count(digit) == 4 for digit in "1234")
        clues = all(p in ("0", c) for c, p in zip(cells, puzzle))
        form = 0.25 + 0.25 * balanced + 0.5 * clues if len(cells) == 16 else 0.0
        return 3.0 * right / puzzle.count("0") + form


# ------------------------------------------------------------------------------------------ GSM8K and MATH
class GSM8K(InWords, Task):
    """Grade-school mathematics in words; the answer is a number. {"question": "Janet's ducks...", "answer": "18"}"""

    TRAIN, TEST = ("openai/gsm8k", "main", "train"), ("madrylab/gsm8k-platinum", None, "test")
    NUM_VALIDATION = 200  # held out of the training questions
    system = (
        "You solve mathematical problems. Reason step by step between <think> and </think>. Then give the final result "
        "alone, in the form \\boxed{result}, between <answer> and </answer>, as in:\n"
        "<think>3 boxes of 4 pens are 12 pens.</think>\n<answer>\\boxed{12}</answer>"
    )

    @functools.cache  # noqa: B019
    def _split(self, split):
        if split == "test":
            return to_examples(hub_rows(*self.TEST), self._from_row)
        examples = self._training_examples()
        random.Random(SEED).shuffle(examples)
        return part_of(examples, split, 0, self.NUM_VALIDATION)

    def _training_examples(self):
        return to_examples(hub_rows(*self.TRAIN), self._from_row)

    def _from_row(self, row):
        """Columns question and answer, whose last line is "#### 18"."""
        require(isinstance(row["answer"], str), f"the answer is {row['answer']!r}, not a text that ends in #### 18")
        _, found, answer = row["answer"].rpartition("####")
        ends = found and _number(answer) is not None
        require(ends, f"the answer does not end in #### and a number: {row['answer'][-40:]!r}")
        return {"question": _text(row["question"]), "answer": answer.strip()}

    def prepare(self):
        JUDGE.start()

    def question(self, example):
        return example["question"]

    key = question

    def parse_question(self, text):
        """A question typed by a user; nobody knows the answer."""
        return {"question": text, "answer": None}

    def is_correct(self, completion, example):
        """The last number of the answer counts, or what math-verify makes of it: "18", "$18.00", "18 dollars"."""
        answer, gold = _result(completion), example["answer"]
        last = _last_number(answer)
        return last == _number(gold) if last is not None else equivalent(answer, gold)

    def reward(self, completion, example):
        """3.0 if correct, and 0.5 for a pair of <think> tags and 0.5 for a pair of <answer> tags."""
        form = sum(0 <= completion.find(f"<{tag}>") < completion.rfind(f"</{tag}>") for tag in ("think", "answer"))
        return 3.0 * self.is_correct(completion, example) + 0.5 * form


class MATH(GSM8K):
    """Competition mathematics; the answer is LaTeX. {"question": "Convert the point $(0,3)$...", "answer": "(3, 0)"}"""

    TRAIN = ("qwedsacf/competition_math", None, "train")
    TEST = ("HuggingFaceH4/MATH-500", None, "test")
    MAX_LEVEL = 4  # of 5, in training: beyond it LLaDA is almost never right, and nothing is learnt

    def _training_examples(self):
        tests = {example["question"] for example in self._split("test")}
        # A few of its solutions box no answer. A row without a solution stays: it is malformed and says so.
        rows = ((w, row) for w, row in hub_rows(*self.TRAIN) if "solution" not in row or _boxed(row["solution"]))
        examples = to_examples(rows, self._from_row)
        return [e for e in examples if e["question"] not in tests and e["level"] <= self.MAX_LEVEL]

    def _from_row(self, row):
        """Columns problem, and answer, or a solution with a \\boxed answer; level is a number or "Level 3"."""
        answer = row["answer"] if "answer" in row else _boxed(row["solution"])
        known = isinstance(answer, str | Number) and str(answer).strip() not in ("", "nan")  # of an empty cell
        require(known and not isinstance(answer, bool), "there is no answer, and no \\boxed one in the solution")
        level = re.findall("[0-9]", str(row.get("level", "")))
        return {"question": _text(row["problem"]), "answer": str(answer), "level": int(level[0]) if level else 9}

    def is_correct(self, completion, example):
        return equivalent(_result(completion), example["answer"])


def _text(value):
    require(isinstance(value, str) and value.strip(), f"the question is {value!r}, not a text")
    return value


def _last_number(text):
    """The last number of an answer in words, None where it is part of an expression (1/2, 2^3, 10-5, 12:30, 1e3)."""
    text = re.sub(r"\\?[$%]|\\[!,]", "", text)
    numbers = list(re.finditer(r"-?(?:[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?|\.[0-9]+)", text, re.ASCII))
    if not numbers:
        return None
    before, after = text[: numbers[-1].start()], text[numbers[-1].end() :]
    if re.search(r"([/^{*+]|[0-9)][:e]?|[0-9)]\s*-)\s*$", before) or re.match(r"\s*[/^}*+]", after):
        return None
    return _number(numbers[-1].group())


def _result(completion):
    """What the completion says the result is: the last \\boxed, or else the answer."""
    answer = tagged(completion)
    boxed = _boxed(answer)
    return (answer if boxed is None else boxed).strip()[-MAX_RESULT_LENGTH:]


def _boxed(text):
    """The content of the last \\boxed{...}, or None."""
    _, found, rest = text.rpartition("\\boxed")
    if not found:
        return None
    if bare := re.match(r"\s+([^\s{}$]+)", rest):  # "\\boxed 2", as some solutions have it
        return bare.group(1)
    depths = list(itertools.accumulate((c == "{") - (c == "}") for c in rest))
    return rest[1 : depths.index(0)] if rest.startswith("{") and 0 in depths else None


def _number(text):
    """The exact value of "1,234", "$18.00", "-3", "5%", as a person reads it; None for anything else."""
    text = re.sub(r"\\?[$%]|\s|\\[!,]|\.$", "", text)
    grouped = re.fullmatch(r"-?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?|-?[0-9]+(\.[0-9]+)?|-?\.[0-9]+", text, re.ASCII)
    return Fraction(text.replace(",", "")) if grouped else None


def equivalent(answer, gold):
    """Whether two mathematical expressions are the same. Numbers are compared exactly, the rest by math-verify."""
    values = _number(answer), _number(gold)
    if None not in values:
        return values[0] == values[1]
    same = "".join(answer.split()) == "".join(gold.split())
    return answer != "" and (same or JUDGE.equivalent(gold, answer))


TASKS = {"countdown": ChatCountdown(), "sudoku": ChatSudoku(), "gsm8k": GSM8K(), "math": MATH()}
