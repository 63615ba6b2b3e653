"""Questions from local files and from the hub. A row is a dict; the task says, by from_row(row), what example it makes.
Whatever is wrong with a file or a row is a ValueError of one line that says where."""

import csv
import json
import logging
import os
import random

from agrpo import require
from support import in_one_line, package
from tasks import SEED, part_of


def to_examples(rows, from_row):
    """The examples of (where, row) pairs; where is named in the error of a malformed row."""
    examples = []
    for where, row in rows:
        try:
            examples.append(from_row(row))
        except KeyError as error:
            raise ValueError(f"{where}: there is no column {error} among {', '.join(map(str, row))}") from error
        except (ArithmeticError, AttributeError, TypeError, ValueError, IndexError) as error:
            raise ValueError(f"{where}: {error}") from error
    return examples


def part_of_file(path, examples, key, split):
    """A tenth of a file for testing, a twentieth for validation, the rest for training, by key: no key in two."""
    keys = sorted({key(example) for example in examples})
    random.Random(SEED).shuffle(keys)
    tests, validations = max(1, len(keys) // 10), max(1, len(keys) // 20)
    enough = len(keys) > tests + validations
    require(enough, f"{path}: {len(keys)} different questions are too few to train, validate and test on")
    chosen = set(part_of(keys, split, tests, validations))
    return [example for example in examples if key(example) in chosen]


def hub_rows(repository, name, split):
    """(where, row) for each row of a data set on the hub, where there is a network."""
    datasets = package("datasets", "this task without --data PATH")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it would tell of every retry
    try:
        rows = datasets.load_dataset(repository, name, split=split)
    except Exception as error:  # its own kinds differ between releases
        problem = f"the hub did not give {repository}; a local file can take its place: --data PATH"
        raise ValueError(f"{problem} ({in_one_line(error, 200)})") from error
    return ((f"{repository}, row {number}", row) for number, row in enumerate(rows, 1))


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
            rows = package("pyarrow.parquet", "a parquet file").read_table(path).to_pylist()
            yield from ((f"{name}, row {number}", row) for number, row in enumerate(rows, 1))
        else:
            raise ValueError(f"{path}: a data file ends in .jsonl, .csv or .parquet")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _json_row(line, where):
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    require(isinstance(row, dict), f"{where}: not a JSON object")
    return row
