"""The environments: a prompt goes in, a completion comes out, a reward is computed. No torch here.

    task       question (what the tiny model reads)    completion                      reward if correct
    countdown  "03 07 12=16"                           "12+7-3"                        3.0
    sudoku     "a31d2fg4i4kl1n43" (letters: empty)     "4312213434211243"              1.0
    gsm8k      "Janet's ducks lay 16 eggs per day..."  "<answer>18</answer>"           3.0
    math       "Convert the point $(0,3)$..."          "<answer>\\boxed{5}</answer>"   3.0

TASKS holds the tasks as the tiny character-level model reads them: the bare question. CHAT_TASKS holds them for an
instruction-tuned model: a system message explains, the model may reason first, gives its answer in <answer> tags, and
chat=True adds credit for form. A completion is hostile input: it is bounded and parsed, never evaluated, and what
does not parse earns no more than credit for form.

    task = TASKS["countdown"]
    example = task.load("test")[0]
    task.question(example), task.reward("12+7-3", example), task.is_correct("12+7-3", example)
"""

import csv
import functools
import itertools
import json
import logging
import operator
import os
import random
import re
import select
import signal
import subprocess
import sys
from fractions import Fraction

SEED = 2510  # of every split: two runs, and two machines, see the same examples
SPLITS = ("train", "validation", "test")
MAX_ANSWER_LENGTH = 100  # also bounds the parser's recursion, at three calls per character


def tagged(completion):
    """What stands in the last complete pair of <answer> tags, or the whole completion without one.

    The last pair, because reasoning may quote the format or try an answer before it commits.
    Found with rfind: a lazy regular expression takes quadratic time on many opening tags.
    """
    start = completion.rfind("<answer>", 0, max(completion.rfind("</answer>"), 0))
    return completion if start < 0 else completion[start + len("<answer>") :].partition("</answer>")[0]


def extract_answer(completion):
    """The answer, or "", which no task rewards, where it is too long to be one."""
    answer = tagged(completion).strip()
    return answer if len(answer) <= MAX_ANSWER_LENGTH else ""


class Task:
    """What the tasks share. Each adds questions, rewards, system, and how a row of a data file becomes an example."""

    def load(self, split, data=None):
        """The examples of a split, plain dicts in a list of the caller's own; of the file `data` if there is one."""
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
        return self._part(split, data) if data else list(self._split(split))

    def read(self, path):
        """All examples of a local JSONL, CSV or parquet file. A malformed row raises ValueError with file and line."""
        examples = [self._checked(row, where) for where, row in read_rows(path)]
        if not examples:
            raise ValueError(f"{path} holds no questions")
        return examples

    def prepare(self):
        """Start, or miss, whatever judging answers needs, before hours are spent on them."""

    def _checked(self, row, where):
        try:
            return self._from_row(row)
        except KeyError as error:
            raise ValueError(f"{where}: there is no column {error} among {', '.join(map(str, row))}") from error
        except (ArithmeticError, AttributeError, TypeError, ValueError, IndexError) as error:
            raise ValueError(f"{where}: {error}") from error

    def _part(self, split, data):
        """A tenth of a file for testing, a twentieth for validation, the rest for training, by key: no key in two."""
        examples = self.read(data)
        keys = sorted({self.key(example) for example in examples})
        random.Random(SEED).shuffle(keys)
        tests, validations = max(1, len(keys) // 10), max(1, len(keys) // 20)
        if len(keys) <= tests + validations:
            raise ValueError(f"{data}: {len(keys)} different questions are too few to train, validate and test on")
        start, stop = {
            "test": (0, tests),
            "validation": (tests, tests + validations),
            "train": (tests + validations, None),
        }[split]
        chosen = set(keys[start:stop])
        return [example for example in examples if self.key(example) in chosen]

    def messages(self, example):
        """The prompt as a chat; the tiny model's template renders the user's message alone."""
        question = {"role": "user", "content": self.question(example)}
        return [{"role": "system", "content": self.system}, question]


def read_rows(path):
    """(where, row) for each row of a local file; where is "file:line". Values of a CSV file stay text."""
    name = os.path.basename(path)
    try:
        if path.endswith((".jsonl", ".json")):
            with open(path, encoding="utf-8-sig") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield f"{name}:{number}", _json_row(line, f"{name}:{number}")
        elif path.endswith(".csv"):  # no guessing of types: a puzzle's leading zeros are part of it
            with open(path, encoding="utf-8-sig", newline="") as file:
                rows = csv.DictReader(file)
                for row in rows:
                    yield f"{name}:{rows.line_num}", row
        elif path.endswith(".parquet"):
            for number, row in enumerate(_parquet_rows(path), 1):
                yield f"{name}, row {number}", row
        else:
            raise ValueError(f"{path}: a data file ends in .jsonl, .csv or .parquet")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _json_row(line, where):
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: not a JSON object")
    return row


def _parquet_rows(path):
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import read_table
    except ModuleNotFoundError as error:
        raise ValueError("parquet files need pyarrow: pip install datasets") from error
    try:
        return read_table(path).to_pylist()
    except ArrowInvalid as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


# ---- Countdown ---------------------------------------------------------------------------------

ALLOWED = r"[0-9+\-*/()\s]+"
# One row per precedence, what binds loosest first.
OPERATORS = (
    {"+": operator.add, "-": operator.sub},
    {"*": operator.mul, "/": operator.truediv},
)


def evaluate(expression):
    """The exact value of an arithmetic expression, a Fraction, or None where there is none.

    Integers in ASCII digits without leading zeros, + - * / and parentheses. There is no unary
    minus: a sign in front would make a number that was not given. Python's own eval would hang
    on 9**9**9**9; here a second star in a row is an operator without an operand.
    """
    if not re.fullmatch(ALLOWED, expression, re.ASCII) or len(expression) > MAX_ANSWER_LENGTH:
        return None
    tokens = re.findall(r"0|[1-9][0-9]*|\S", expression)[::-1]  # reversed: pop() takes the front
    try:
        value = _parse(tokens)
    except (IndexError, ValueError, ZeroDivisionError):
        return None
    return None if tokens else value


def _parse(tokens, level=0):
    """Consume a sum (level 0), a product (1) or an operand (2) from the front; its value."""
    if level < len(OPERATORS):
        value = _parse(tokens, level + 1)
        while tokens and tokens[-1] in OPERATORS[level]:  # left to right: 9-3-2 is (9-3)-2
            apply = OPERATORS[level][tokens.pop()]
            value = apply(value, _parse(tokens, level + 1))
        return value
    token = tokens.pop()  # IndexError where the expression ends too early
    if token != "(":
        return Fraction(int(token))  # ValueError where an operator stands in an operand's place
    value = _parse(tokens)
    if tokens.pop() != ")":
        raise ValueError("a parenthesis is not closed")
    return value


class Countdown(Task):
    """Reach the target using each of three numbers exactly once.

    {"numbers": [3, 7, 12], "target": 16}   "03 07 12=16"   ->   "12+7-3"

    Two digits each, in ascending order: with every digit in a fixed place the tiny model learnt
    more in the same time than from "12 3 7 = 16" (README, what did not work).

    Every target can be reached with + and - alone; an answer may use * / and parentheses too.
    The splits share no pair of multiset and target, though they do share multisets.
    """

    MAX_NUMBER = 20
    NUM_TEST, NUM_VALIDATION = 1000, 500  # all other pairs are for training
    completion_length = 8  # three numbers of two digits, two operators
    rules = (
        "You play a number game. {asked}. Build an arithmetic expression that is worth exactly the target, with each "
        "of the numbers used once and no other number. You may use +, -, *, / and parentheses.\n"
        "Work it out between <think> and </think>. Then give the expression, an equals sign and the target between "
        "<answer> and </answer>, and nothing else there. For the numbers 2, 9, 4 and the target 7 a good reply is:\n"
        "<think>9 + 2 = 11 and 11 - 4 = 7.</think>\n<answer>9+2-4=7</answer>"
    )
    system = rules.format(asked="A question `a b c=t` gives three numbers and then the target t")

    def _split(self, split):
        held_out = self.NUM_TEST + self.NUM_VALIDATION
        start, stop = {
            "test": (0, self.NUM_TEST),
            "validation": (self.NUM_TEST, held_out),
            "train": (held_out, None),
        }[split]
        return self._examples()[start:stop]

    @functools.cache  # noqa: B019 (a task lives as long as the process)
    def _examples(self):
        multisets = itertools.combinations_with_replacement(range(1, self.MAX_NUMBER + 1), 3)
        pairs = [(m, t) for m in multisets for t in sorted(set(_sums(m).values())) if t > 0]
        random.Random(SEED).shuffle(pairs)
        return [{"numbers": list(m), "target": t} for m, t in pairs]

    def question(self, example):
        *numbers, target = (f"{number:02d}" for number in [*example["numbers"], example["target"]])
        return f"{' '.join(numbers)}={target}"

    def key(self, example):
        return tuple(sorted(example["numbers"]))

    def _from_row(self, row):
        """Columns nums and target, or input ("30,100,93") and output."""
        numbers, target = (row["nums"], row["target"]) if "nums" in row else (row["input"], row["output"])
        if not re.fullmatch(r"[0-9,;\s\[\]]+", str(numbers)) or not re.fullmatch("-?[0-9]+", str(target)):
            raise ValueError(f"{str(numbers)[:40]!r} and {str(target)[:40]!r} are not whole numbers and a target")
        return {"numbers": [int(number) for number in re.findall("[0-9]+", str(numbers))], "target": int(target)}

    def parse_question(self, text):
        """The inverse of question, for one typed by a user."""
        form = r"\s*(\d{1,9})\s+(\d{1,9})\s+(\d{1,9})\s*=\s*(\d{1,9})\s*"
        match = re.fullmatch(form, text, re.ASCII)
        *numbers, target = map(int, match.groups()) if match else [0]
        if not numbers or not all(1 <= number <= self.MAX_NUMBER for number in numbers):
            problem = f"is not three numbers from 1 to {self.MAX_NUMBER}, '=' and a target"
        elif target < 1 or target not in _sums(numbers).values():
            problem = "has a target that is not positive or that + and - cannot reach"
        else:
            return {"numbers": sorted(numbers), "target": target}
        raise ValueError(f"{text[:40]!r} {problem}; a valid question is '3 12 7 = 16'")

    def solution(self, example, rng):
        """A correct answer, drawn uniformly from the valid sums in every order of their terms."""
        sums = _sums(example["numbers"])
        return rng.choice([sum_ for sum_, value in sums.items() if value == example["target"]])

    def is_correct(self, completion, example):
        return self.reward(completion, example) == 3.0

    def reward(self, completion, example, chat=False):
        """3.0 if correct, "12+7-3" or "12+7-3=16"; a wrong right-hand side makes it wrong.

        chat=True adds the AGRPO paper's credit for the form of an equation: a third each for nothing but
        allowed characters left of the equals sign, for the right numbers there, for the target right of
        it, so that 12+7-3=16 earns 4. The tiny model goes without: it taught it to write 11111111.
        """
        left, equals, right = extract_answer(completion).partition("=")
        right_numbers = sorted(map(int, re.findall("[0-9]+", left))) == sorted(example["numbers"])
        stated = right.strip() == str(example["target"])
        correct = right_numbers and evaluate(left) == example["target"] and (stated or not equals)
        allowed = bool(re.fullmatch(ALLOWED, left, re.ASCII))
        form = (allowed + right_numbers + stated) / 3 if chat and equals else 0.0
        return 3.0 * correct + form


class ChatCountdown(Countdown):
    """Countdown as instruction-tuned models are asked it: numbers up to 99, targets up to 100, all four operations."""

    MAX_NUMBER, NUM_TRAIN = 99, 20000
    system = Countdown.rules.format(asked="A question gives some numbers and the target")

    @functools.cache  # noqa: B019
    def _examples(self):
        rng, examples = random.Random(SEED), {}
        while len(examples) < self.NUM_TRAIN + self.NUM_VALIDATION + self.NUM_TEST:
            numbers = rng.choices(range(1, self.MAX_NUMBER + 1), k=3)
            value = _random_value(numbers, rng)
            if value.denominator == 1 and 1 <= value <= 100:
                # One target per multiset: here the splits share no multiset either.
                examples.setdefault(tuple(sorted(numbers)), {"numbers": numbers, "target": int(value)})
        return list(examples.values())

    def question(self, example):
        return f"Numbers: {', '.join(map(str, example['numbers']))}\nTarget: {example['target']}"

    def parse_question(self, text):
        numbers = [int(number) for number in re.findall("[0-9]{1,9}", text)]
        if len(numbers) < 3:
            raise ValueError(f"{text[:40]!r} is not numbers and a target; a valid question is '3 12 7 = 16'")
        return {"numbers": numbers[:-1], "target": numbers[-1]}


def _random_value(numbers, rng):
    """The value of a random expression with each of three numbers once; 0 where it would divide by zero."""
    a, b, c = map(Fraction, rng.sample(numbers, 3))
    first, second = rng.choices([*OPERATORS[0].values(), *OPERATORS[1].values()], k=2)
    try:
        return second(first(a, b), c) if rng.random() < 0.5 else first(a, second(b, c))
    except ZeroDivisionError:
        return Fraction(0)


def _sums(numbers):
    """{"12+7-3": 16, ...}: every order of three numbers, every + and -, no sign in front."""
    return {
        f"{a}{'+-'[s < 0]}{b}{'+-'[r < 0]}{c}": a + s * b + r * c
        for a, b, c in itertools.permutations(numbers)
        for s, r in itertools.product((1, -1), repeat=2)
    }


# ---- Sudoku 4x4 --------------------------------------------------------------------------------


@functools.cache
def all_grids():
    """The 288 complete grids, each a string of 16 digits read row by row."""

    def clash(a, b):  # two cells in one row, column or 2x2 box
        return a // 4 == b // 4 or a % 4 == b % 4 or (a // 8, a % 4 // 2) == (b // 8, b % 4 // 2)

    grids = [""]
    for cell in range(16):  # all valid first cells, one more each time
        peers = [earlier for earlier in range(cell) if clash(earlier, cell)]
        grids = [g + d for g in grids for d in "1234" if all(g[peer] != d for peer in peers)]
    return grids


@functools.cache
def _grids_with(cell, digit):
    """Bit mask over all_grids(): those that have this digit in this cell."""
    return sum(1 << i for i, grid in enumerate(all_grids()) if digit in ("0", grid[cell]))


def solutions(puzzle):
    """Bit mask over all_grids(): those that agree with the clues. Masks make 10^5 checks cheap."""
    return functools.reduce(operator.and_, map(_grids_with, range(16), puzzle))


class Sudoku(Task):
    """Fill a 4x4 grid so that every row, column and 2x2 box holds 1 to 4; one solution each.

    {"puzzle": "0310200404001043", "solution": "4312213434211243"}
    "a31d2fg4i4kl1n43"   ->   "4312213434211243"

    An empty cell shows its own letter, a to p. RoPE knows distances only: the letter tells the
    cell of the answer that looks back at it where in the grid it is. With a 0 for every blank the
    base model learnt half as fast.

    The splits share no solution grid. White space and | , ; / - may stand between the digits of
    an answer; they are skipped and do not count as cells.
    """

    MIN_BLANKS, MAX_BLANKS = 6, 12  # 12 is the most that leaves a single solution
    completion_length = 16
    rules = (
        "You solve small Sudoku puzzles. A question is a 4x4 grid, written as its four rows from top to bottom; "
        "{asked}. Fill the empty cells so that each row, each column and each 2x2 corner box contains 1, 2, 3 and 4 "
        "once. The given digits stay where they are.\n"
        "Work it out between <think> and </think>. Then write all 16 digits of the full grid, row after row, between "
        "<answer> and </answer>, and nothing else there."
    )
    system = rules.format(asked="a digit from 1 to 4 is given, a letter marks an empty cell")

    @functools.cache  # noqa: B019
    def _split(self, split):
        grids = random.Random(SEED).sample(all_grids(), len(all_grids()))
        grids, size = {
            "train": (grids[:200], 20000),
            "validation": (grids[200:228], 500),
            "test": (grids[228:], 1000),
        }[split]
        rng = random.Random(f"{SEED} {split}")  # its own, so that a split loads without the others
        puzzles = {}  # by puzzle: none comes twice, which costs train some of its scarce 12 blanks
        while len(puzzles) < size:
            example = self._blank_out(rng.choice(grids), rng)
            puzzles[example["puzzle"]] = example
        return list(puzzles.values())

    def question(self, example):
        return "".join(letter if c == "0" else c for letter, c in zip("abcdefghijklmnop", example["puzzle"]))

    def key(self, example):
        return example["solution"]

    def _from_row(self, row):
        """Columns Puzzle and Solution: 16 digits, 0 for an empty cell; a number has lost its leading zeros."""
        puzzle, solution = (str(row[name]).strip().zfill(16) for name in ("Puzzle", "Solution"))
        if not re.fullmatch("[0-4]{16}", puzzle) or "0" not in puzzle or solution not in all_grids():
            raise ValueError(f"{puzzle[:20]!r} and {solution[:20]!r} are not a 4x4 puzzle and its full grid")
        if any(p not in ("0", s) for p, s in zip(puzzle, solution)):
            raise ValueError(f"the solution {solution} contradicts the puzzle {puzzle}")
        return {"puzzle": puzzle, "solution": solution}

    def parse_question(self, text):
        """The inverse of question, for one typed by a user."""
        puzzle = re.sub("[a-p.]", "0", _without_separators(text))
        if not re.fullmatch("[0-4]{16}", puzzle) or "0" not in puzzle:
            problem = "is not 16 cells, 1 to 4 or 0 for empty, with one empty"
        elif (found := solutions(puzzle)).bit_count() != 1:
            problem = f"has {found.bit_count()} solutions, not one"
        else:
            return {"puzzle": puzzle, "solution": all_grids()[found.bit_length() - 1]}
        raise ValueError(f"{text[:40]!r} {problem}; a valid question is '0310 2004 0400 1043'")

    def _blank_out(self, grid, rng):
        """An example of this grid: random blanks, redrawn until they leave one solution."""
        # The number is drawn once: redrawing it too would leave few puzzles with many blanks.
        blanks = rng.randint(self.MIN_BLANKS, self.MAX_BLANKS)
        clues = [_grids_with(cell, digit) for cell, digit in enumerate(grid)]
        left = 0
        while left.bit_count() != 1:  # grids that agree with all clues that are left
            empty = set(rng.sample(range(16), blanks))
            left = functools.reduce(operator.and_, [clue for cell, clue in enumerate(clues) if cell not in empty])
        puzzle = "".join("0" if cell in empty else digit for cell, digit in enumerate(grid))
        return {"puzzle": puzzle, "solution": grid}

    def solution(self, example, rng):
        return example["solution"]  # the only one: rng has nothing to choose

    def is_correct(self, completion, example):
        return self._cells(completion) == example["solution"]

    def reward(self, completion, example, chat=False):
        """Half the share of all 16 cells that are right, half for the exact solution: 0 to 1.

        The clues count as cells here: rewarded on the blanks alone, the tiny model let the clues
        drift, and exact solutions fell from 20% to 2%. With chat=True it is the AGRPO paper's
        reward: 3.0 times the share of the blanks that are right, plus up to 1.0 for form.
        """
        cells, puzzle, solution = self._cells(completion), example["puzzle"], example["solution"]
        if not chat:
            share = sum(map(operator.eq, cells, solution)) / 16
            return 0.5 * share + 0.5 * (cells == solution)
        right = sum(c == s for c, s, p in zip(cells, solution, puzzle) if p == "0")
        return 3.0 * right / puzzle.count("0") + self._form(cells, puzzle)

    def _form(self, cells, puzzle):
        """A quarter for 16 cells, a quarter for each digit four times, a half for all clues."""
        if len(cells) != 16:
            return 0.0
        balanced = all(cells.count(digit) == 4 for digit in "1234")
        return 0.25 + 0.25 * balanced + 0.5 * all(p in ("0", c) for c, p in zip(cells, puzzle))

    def _cells(self, completion):
        """The answer's digits; "" for more than 16, or for anything but digits and separators."""
        cells = _without_separators(extract_answer(completion))
        return cells if re.fullmatch("[0-9]{1,16}", cells) else ""


class ChatSudoku(Sudoku):
    """Sudoku as instruction-tuned models are asked it: 0 for an empty cell, after three solved examples."""

    system = Sudoku.rules.format(asked="0 marks an empty cell")
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


def _without_separators(text):
    return re.sub(r"[\s|,;/-]+", "", text)


# ---- GSM8K and MATH ----------------------------------------------------------------------------


class GSM8K(Task):
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
            return self._hub(*self.TEST)
        examples = self._training_examples()
        random.Random(SEED).shuffle(examples)
        return examples[: self.NUM_VALIDATION] if split == "validation" else examples[self.NUM_VALIDATION :]

    def _training_examples(self):
        return self._hub(*self.TRAIN)

    def _hub(self, repository, name, split, wanted=lambda row: True):
        """The examples of a data set on the hub, where there is a network, out of its `wanted` rows."""
        try:
            from datasets import load_dataset
        except ModuleNotFoundError as error:
            raise ValueError("questions from the hub need datasets: pip install datasets; or --data PATH") from error
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it would tell of every retry
        try:
            rows = load_dataset(repository, name, split=split)
        except Exception as error:  # its own kinds differ between releases
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"the hub did not give {repository}; a local file can take its place: --data PATH ({reason})"
            ) from error
        return [self._checked(row, f"{repository}, row {n}") for n, row in enumerate(rows, 1) if wanted(row)]

    def _from_row(self, row):
        """Columns question and answer, whose last line is "#### 18"."""
        _, found, answer = row["answer"].rpartition("####")
        if not found or _number(answer) is None:
            raise ValueError(f"the answer does not end in #### and a number: {row['answer'][-40:]!r}")
        return {"question": _text(row["question"]), "answer": answer.strip()}

    def prepare(self):
        JUDGE.start()

    def key(self, example):
        return example["question"]

    def question(self, example):
        return example["question"]

    def parse_question(self, text):
        """A question typed by a user; nobody knows the answer."""
        return {"question": text, "answer": None}

    def is_correct(self, completion, example):
        """The last number of the answer counts, or what math-verify makes of it: "18", "$18.00", "18 dollars"."""
        answer, gold = _result(completion), example["answer"]
        last = _last_number(answer)
        return last == _number(gold) if last is not None else equivalent(answer, gold)

    def reward(self, completion, example, chat=False):
        """3.0 if correct; chat=True adds the AGRPO paper's 0.5 for a pair of <think> tags and 0.5 for <answer> tags."""
        form = sum(0 <= completion.find(f"<{tag}>") < completion.rfind(f"</{tag}>") for tag in ("think", "answer"))
        return 3.0 * self.is_correct(completion, example) + 0.5 * form * chat


class MATH(GSM8K):
    """Competition mathematics; the answer is LaTeX. {"question": "Convert the point $(0,3)$...", "answer": "(3, 0)"}"""

    TRAIN = ("qwedsacf/competition_math", None, "train")
    TEST = ("HuggingFaceH4/MATH-500", None, "test")
    MAX_LEVEL = 4  # of 5, in training: beyond it LLaDA is almost never right, and nothing is learnt

    def _training_examples(self):
        tests = {example["question"] for example in self._split("test")}
        # A few of its solutions box no answer. A row without a solution is wanted: it is malformed and says so.
        examples = self._hub(*self.TRAIN, wanted=lambda row: "solution" not in row or _boxed(row["solution"]))
        return [e for e in examples if e["question"] not in tests and e["level"] <= self.MAX_LEVEL]

    def _from_row(self, row):
        """Columns problem, and answer, or a solution with a \\boxed answer; level is a number or "Level 3"."""
        answer = row["answer"] if "answer" in row else _boxed(row["solution"])
        if not answer:
            raise ValueError("there is no answer, and no \\boxed one in the solution")
        level = re.findall("[0-9]", str(row.get("level", "")))
        return {"question": _text(row["problem"]), "answer": str(answer), "level": int(level[0]) if level else 9}

    def is_correct(self, completion, example):
        return equivalent(_result(completion), example["answer"])


def _text(value):
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"the question is {value!r}, not a text")
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
    """What the completion says the result is: the last \\boxed, or else the answer, of which the end is kept."""
    answer = tagged(completion)
    boxed = _boxed(answer)
    return (answer if boxed is None else boxed).strip()[-2 * MAX_ANSWER_LENGTH :]


def _boxed(text):
    """The content of the last \\boxed{...}, or None."""
    start = text.rfind("\\boxed")
    if start < 0:
        return None
    if bare := re.match(r"\\boxed\s+([^\s{}$]+)", text[start:]):  # "\\boxed 2", as some solutions have it
        return bare.group(1)
    depth = 0
    for i in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : i] if text[i] == "}" else None
    return None


def _number(text):
    """The exact value of "1,234", "$18.00", "-3", "5%", as a person reads it; None for anything else."""
    text = re.sub(r"\\?[$%]|\s|\\[!,]|\.$", "", text)
    grouped = re.fullmatch(r"-?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?|-?[0-9]+(\.[0-9]+)?|-?\.[0-9]+", text, re.ASCII)
    return Fraction(text.replace(",", "")) if grouped else None


def equivalent(answer, gold):
    """Whether two mathematical expressions are the same. Numbers are compared exactly, the rest by math-verify."""
    if not answer or len(answer) > 2 * MAX_ANSWER_LENGTH:
        return False
    if "".join(answer.split()) == "".join(gold.split()):
        return True
    a, b = _number(answer), _number(gold)
    if a is not None and b is not None:
        return a == b
    return JUDGE.equivalent(gold, answer)


class Judge:
    """math-verify in a process of its own, killed when it thinks for too long: its parser computes what it reads,
    9^{9^{9^9}} included, and no timeout inside the process stops that. A killed judgement counts as wrong.

    Its limit is in CPU seconds, kept by the kernel: a busy machine changes no verdict, and an orphan ends too."""

    CPU_SECONDS, WALL_SECONDS, BYTES = 2, 120, 4 * 2**30

    def __init__(self):
        self.process = None

    def equivalent(self, gold, answer):
        self.start()
        try:
            self.process.stdin.write(json.dumps([gold, answer]) + "\n")
            self.process.stdin.flush()
            verdict = self._line()
        except BrokenPipeError:
            verdict = ""
        if verdict not in ("True\n", "False\n"):
            self.close()
        return verdict == "True\n"

    def start(self):
        """Make sure that the process runs. Raises ValueError where math-verify is missing."""
        if self.process is not None and self.process.poll() is None:
            return
        command = [sys.executable, "-c", "import tasks; tasks.judge()"]
        folder = os.path.dirname(os.path.abspath(__file__))
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        # A session of its own: Ctrl-C is meant for the run, and must not turn a right answer into a wrong one.
        self.process = subprocess.Popen(
            command, cwd=folder, stdin=pipe, stdout=pipe, stderr=null, text=True, start_new_session=True
        )
        if self._line() != "ready\n":
            self.close()
            raise ValueError("this task needs math-verify: pip install math-verify")

    def _line(self):
        """The next line that the process writes, "" if it ends or is stuck."""
        ready = select.select([self.process.stdout], [], [], self.WALL_SECONDS)[0]
        return self.process.stdout.readline() if ready else ""

    def close(self):
        self.process.kill()
        self.process.communicate()
        self.process = None


def judge():
    """The judge's process: pairs of expressions in, verdicts out, a line each, until its input ends."""
    import resource

    from math_verify import parse, verify

    resource.setrlimit(resource.RLIMIT_AS, (Judge.BYTES, Judge.BYTES))
    verify(parse(r"$\frac{x}{2} + 2x$"), parse("$0$"))  # what it imports at its first use takes a second or two
    print("ready", flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, Judge.CPU_SECONDS)  # then SIGPROF, which ends the process
        try:
            gold, answer = (parse(f"${text}$", parsing_timeout=None) for text in json.loads(line))
            print(verify(gold, answer, timeout_seconds=None), flush=True)
        except Exception:
            print(False, flush=True)


JUDGE = Judge()

_WORDS = {"gsm8k": GSM8K(), "math": MATH()}  # the same for every model
TASKS = {"countdown": Countdown(), "sudoku": Sudoku()} | _WORDS
CHAT_TASKS = {"countdown": ChatCountdown(), "sudoku": ChatSudoku()} | _WORDS
