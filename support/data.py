"""Questions from local files and from the hub. A row is a dict; the task says, by from_row(row), what example it makes.
Whatever is wrong with a file or a row is a ValueError of one line that says where."""

import csv
import hashlib
import json
import logging
import os

from agrpo import require
from support import package
from support.runs import failing_as, say


def place(text):
    """A number in [0, 1) that the text alone decides, on every machine."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 16**8


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def say_if_changed(path, digest):
    """One line if a file is not what it was when a run began, by its sha256 in config.json."""
    if path and (now := sha256(path)) != digest:
        then = digest or "unknown"
        say(f"{path} has changed since the run began (sha256 {now}, then {then}): it held out other questions, perhaps")


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


def hub_rows(repository, name, split):
    """(where, row) for each row of a data set on the hub, where there is a network."""
    datasets = package("datasets", "this task without --data PATH")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it would tell of every retry
    with failing_as(f"the hub did not give {repository} (a local file can take its place: --data PATH)"):
        rows = datasets.load_dataset(repository, name, split=split)
    return ((f"{repository}, row {number}", row) for number, row in enumerate(rows, 1))


def read_rows(path):
    """(where, row) for each row of a local file; where is "file:line". Values of a CSV file stay text."""
    name, kind = os.path.basename(path), os.path.splitext(path)[1]
    require(kind in (".jsonl", ".json", ".csv", ".parquet"), f"{path}: a data file ends in .jsonl, .csv or .parquet")
    try:
        if kind == ".parquet":
            rows = package("pyarrow.parquet", "a parquet file").read_table(path).to_pylist()
            yield from ((f"{name}, row {number}", row) for number, row in enumerate(rows, 1))
            return
        with open(path, encoding="utf-8-sig", newline="") as file:
            if kind == ".csv":  # no guessing of types: a puzzle's leading zeros are part of it
                rows = csv.DictReader(file)
                yield from ((f"{name}:{rows.line_num}", row) for row in rows)
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    with failing_as(f"{name}:{number}: not JSON"):
                        row = json.loads(line)
                    require(isinstance(row, dict), f"{name}:{number}: not a JSON object")
                    yield f"{name}:{number}", row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
