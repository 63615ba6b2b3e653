"""The environments of the tiny model: a prompt goes in, a completion comes out, a reward is computed. No torch here.

    game       question                            completion            reward if correct
    countdown  "03 07 12=16"                       "12+7-3"              3.0
    sudoku     "a31d2fg4i4kl1n43" (letters: empty) "4312213434211243"    1.0
    tracking   "2abcadbca"                         "14320214"            1.0

The model reads the bare question and writes the bare answer. What instruction-tuned models are asked, the same games
in words included, is in support/words.py. A completion is hostile input: it is bounded and parsed, never evaluated, and
what does not parse is worth nothing.

    task = TASKS["countdown"]
    example = task.load("test")[0]
    task.question(example), task.reward("12+7-3", example), task.is_correct("12+7-3", example)
"""

import functools
import itertools
import operator
import random
import re
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


def part_of(shuffled, split, tests, validations):
    """The items of a split: the first are for testing, the next for validation, all others for training."""
    held_out = tests + validations
    return {"test": shuffled[:tests], "validation": shuffled[tests:held_out], "train": shuffled[held_out:]}[split]


class Task:
    """What the tasks share. Each adds, for its examples (plain dicts, as JSON has them),

    _split(split)                     all examples of a split, the same on every machine
    _split_of_file(split, data)       the same of a file's own questions (tasks in words alone)
    question(example) -> text         what the model reads; parse_question(text) -> example is its inverse
    key(example)                      hashable: what the same question is known by, for keeping it out of training
    solution(example, rng) -> text    a correct answer, for supervised training (games alone)
    reward(completion, example)       a float
    is_correct(completion, example)   a bool: what is reported as accuracy, whatever the reward
    """

    def load(self, split, data=""):
        """The examples of a split, in a list of the caller's own. Raises ValueError for an unknown one."""
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
        return list(self._split_of_file(split, data) if data else self._split(split))

    def messages(self, example):
        """The prompt as a chat. Of a game it is the question alone: the tiny model learnt the rules from answers."""
        return [{"role": "user", "content": self.question(example)}]

    def prepare(self):
        """Start, or miss, whatever judging answers needs, before hours are spent on them. Games need nothing."""


# ----------------------------------------------------------------------------------------------- Countdown
ALLOWED = r"[0-9+\-*/()\s]+"
# One row per precedence, what binds loosest first.
OPERATORS = ({"+": operator.add, "-": operator.sub}, {"*": operator.mul, "/": operator.truediv})


def evaluate(expression):
    """The exact value of an arithmetic expression, a Fraction, or None where there is none.

    Integers in ASCII digits without leading zeros, + - * / and parentheses. There is no unary minus: a sign in front
    would make a number that was not given. Python's own eval would hang on 9**9**9**9; here a second star in a row
    is an operator without an operand.
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

    Two digits each, in ascending order: with every digit in a fixed place the tiny model learnt more in the same
    time than from "12 3 7 = 16" (docs/laboratory.md).

    Every target can be reached with + and - alone; an answer may use * / and parentheses too. The splits share no
    pair of multiset and target, though they do share multisets.
    """

    MAX_NUMBER = 20
    NUM_TEST, NUM_VALIDATION = 1000, 500  # all other pairs are for training
    completion_length = 8  # three numbers of two digits, two operators

    def _split(self, split):
        return part_of(self._examples(), split, self.NUM_TEST, self.NUM_VALIDATION)

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
        """Whether it is "12+7-3" or "12+7-3=16"; a wrong right-hand side makes it wrong."""
        left, equals, right = extract_answer(completion).partition("=")
        stated = not equals or right.strip() == str(example["target"])
        return stated and self._uses_the_numbers(left, example) and evaluate(left) == example["target"]

    def _uses_the_numbers(self, expression, example):
        return sorted(map(int, re.findall("[0-9]+", expression))) == sorted(example["numbers"])

    def reward(self, completion, example):
        """3.0 if correct. Nothing for its form: credit for that taught the tiny model to write 11111111."""
        return 3.0 * self.is_correct(completion, example)


def _sums(numbers):
    """{"12+7-3": 16, ...}: every order of three numbers, every + and -, no sign in front."""
    return {
        f"{a}{'+-'[s < 0]}{b}{'+-'[r < 0]}{c}": a + s * b + r * c
        for a, b, c in itertools.permutations(numbers)
        for s, r in itertools.product((1, -1), repeat=2)
    }


# ---------------------------------------------------------------------------------------------- Sudoku 4x4
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
    """Fill a 4x4 grid so that every row, column and 2x2 box holds 1 to 4. A puzzle has one solution.

    {"puzzle": "0310200404001043", "solution": "4312213434211243"}
    "a31d2fg4i4kl1n43"   ->   "4312213434211243"

    An empty cell shows its own letter, a to p. RoPE knows distances only: the letter tells the cell of the answer
    that looks back at it where in the grid it is. With a 0 for every blank the base model learnt half as fast.

    The splits share no solution grid. White space and | , ; / - may stand between the digits of an answer; they are
    skipped and do not count as cells.
    """

    MIN_BLANKS, MAX_BLANKS = 6, 12  # 12 is the most that leaves a single solution
    completion_length = 16

    @functools.cache  # noqa: B019
    def _split(self, split):
        first, last, size = {"train": (0, 200, 20000), "validation": (200, 228, 500), "test": (228, 288, 1000)}[split]
        grids = random.Random(SEED).sample(all_grids(), 288)[first:last]
        rng = random.Random(f"{SEED} {split}")  # its own, so that a split loads without the others
        solution_of = {}  # by puzzle: none comes twice, which costs train some of its scarce 12 blanks
        while len(solution_of) < size:
            grid = rng.choice(grids)
            solution_of[self._blank_out(grid, rng)] = grid
        return [{"puzzle": puzzle, "solution": grid} for puzzle, grid in solution_of.items()]

    def question(self, example):
        return "".join(letter if c == "0" else c for letter, c in zip("abcdefghijklmnop", example["puzzle"]))

    def key(self, example):
        return example["solution"]

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
        """A puzzle of this grid: random blanks, redrawn until they leave one solution."""
        # Their number is drawn once: redrawing it too would leave few puzzles with many blanks.
        blanks, puzzle = rng.randint(self.MIN_BLANKS, self.MAX_BLANKS), ""
        while not puzzle or solutions(puzzle).bit_count() != 1:
            empty = set(rng.sample(range(16), blanks))
            puzzle = "".join("0" if cell in empty else digit for cell, digit in enumerate(grid))
        return puzzle

    def solution(self, example, rng):
        return example["solution"]  # the only one: rng has nothing to choose

    def is_correct(self, completion, example):
        return self._cells(completion) == example["solution"]

    def reward(self, completion, example):
        """Half the share of all 16 cells that are right, half for the exact solution: 0 to 1.

        The clues count as cells here: rewarded on the blanks alone, the tiny model let the clues drift, and exact
        solutions fell from 20% to 2%.
        """
        cells, solution = self._cells(completion), example["solution"]
        share = sum(map(operator.eq, cells, solution)) / 16
        return 0.5 * share + 0.5 * (cells == solution)

    def _cells(self, completion):
        """The answer's digits; "" for more than 16, or for anything but digits and separators."""
        cells = _without_separators(extract_answer(completion))
        return cells if re.fullmatch("[0-9]{1,16}", cells) else ""


def _without_separators(text):
    return re.sub(r"[\s|,;/-]+", "", text)


# ------------------------------------------------------------------------------------------ state tracking
class Tracking(Task):
    """Follow a state through letters, each a fixed permutation that moves all five states; write it after every letter.

    {"start": 2, "letters": "abcadbca"}   "2abcadbca"   ->   "14320214"

    The permutations do not commute, so the last state depends on every letter and on their order. Written one token at
    a time, each digit is one look at the letter and the digit before it; a single pass would have to compose them all.
    That is what reasoning step by step is, at its smallest. The splits share no question.
    """

    STATES, LETTERS = "01234", "abcd"

    def __init__(self, length=8):
        self.completion_length = length
        rng = random.Random(SEED)
        moves = [m for m in map("".join, itertools.permutations(self.STATES)) if all(map(operator.ne, m, self.STATES))]
        self.moves = dict(zip(self.LETTERS, rng.sample(moves, len(self.LETTERS))))

    @functools.cache  # noqa: B019
    def _split(self, split):
        total = len(self.STATES) * len(self.LETTERS) ** self.completion_length
        tests = min(1000, total // 5)
        numbers = random.Random(SEED).sample(range(total), min(total, 20000 + tests + tests // 2))
        return [self._example(number) for number in part_of(numbers, split, tests, tests // 2)]

    def _example(self, number):
        """The number's digits in base 4 are the letters, what is left is the start."""
        letters = ""
        for _ in range(self.completion_length):
            number, letter = divmod(number, len(self.LETTERS))
            letters += self.LETTERS[letter]
        return {"start": number, "letters": letters}

    def question(self, example):
        return f"{example['start']}{example['letters']}"

    def key(self, example):
        return self.question(example)

    def parse_question(self, text):
        """The inverse of question, for one typed by a user."""
        found = re.fullmatch(f"([{self.STATES}])([{self.LETTERS}]{{{self.completion_length}}})", text.replace(" ", ""))
        if not found:
            sample = self.question(self.load("test")[0])
            raise ValueError(f"{text[:40]!r} is not a start state and letters; a valid question is {sample!r}")
        return {"start": int(found[1]), "letters": found[2]}

    def solution(self, example, rng):
        """The states after each letter; there is one answer, and rng has nothing to choose."""
        states = itertools.accumulate(
            example["letters"], lambda state, letter: self.moves[letter][int(state)], initial=str(example["start"])
        )
        return "".join(states)[1:]

    def is_correct(self, completion, example):
        """A state for every letter, of which the last is right: how it was reached is not judged."""
        answer = extract_answer(completion)
        whole = re.fullmatch(f"[{self.STATES}]{{{self.completion_length}}}", answer)
        return bool(whole) and answer[-1] == self.solution(example, None)[-1]

    def reward(self, completion, example):
        return 1.0 * self.is_correct(completion, example)


TASKS = {"countdown": Countdown(), "sudoku": Sudoku(), "tracking": Tracking(8)}
TASKS |= {f"tracking-{length}": Tracking(length) for length in (4, 12, 16)}  # for the laboratory
