"""What surrounds the lesson, one room each; a reader may skip it. Nothing here imports train or experiments."""

import importlib


def in_one_line(text, most=None):
    """The beginning of what a library or a person says, without its line breaks: `most` characters, or all."""
    return " ".join(str(text).split())[:most]


def package(name, purpose):
    """A package that not everybody has. Raises ValueError with what to do where it is missing."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        root = name.partition(".")[0]
        raise ValueError(f"{purpose} needs {root}: pip install {root}") from error
