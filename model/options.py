"""Checks of the options that networks take: they come from command lines and cards, with any value that YAML can say.

All raise InterflowError, in a sentence with the option's name, what was given and what was expected.
"""

from typing import Any

from model.contract import InterflowError


def require_count(name: str, value: Any) -> None:
    """A whole number from 1."""
    if type(value) is not int or value < 1:  # True is an int, too
        raise InterflowError(f"{name} {value!r}: expected a whole number from 1 up.")


def require_flag(name: str, value: Any) -> None:
    """True or false, and no text, which would count as true."""
    if not isinstance(value, bool):
        raise InterflowError(f"{name} {value!r}: expected true or false.")


def require_rate(name: str, value: Any) -> None:
    """A probability below 1."""
    if type(value) not in (int, float) or not 0 <= value < 1:
        raise InterflowError(f"{name} {value!r}: expected a probability from 0 up to less than 1.")


def require_stages(value: Any, count: int) -> None:
    """Numbers of a network's stages, counted from 1."""
    if not isinstance(value, list | tuple) or any(type(stage) is not int or not 1 <= stage <= count for stage in value):
        raise InterflowError(f"stages {value!r}: expected a list of numbers from 1 to {count}, such as stages=[1].")
