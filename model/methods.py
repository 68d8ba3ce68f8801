"""The methods of Interflow's Table II, as data."""

from dataclasses import dataclass
from typing import Literal

from model.contract import InterflowError

Attention = Literal["none", "hard", "branch", "class"]


@dataclass(frozen=True)
class Method:
    """How many branches, and how they are fused (Interflow, Table II).

    Attributes:
        name: as the paper writes it, "Normal" in lower case.
        attention: "none" (one branch, W = 1), "hard" (weights fixed by hand), "branch" (one learned weight per
            branch) or "class" (one learned weight per branch and class).
        branches: taps of the backbone; a very deep backbone has its own number (Table VI).
        initial_weights: one per branch, or None for random ones.
    """

    name: str
    attention: Attention
    branches: int
    initial_weights: tuple[float, ...] | None

    @property
    def learned(self) -> bool:
        """Whether training moves the weights."""
        return self.attention in ("branch", "class")


_FOUR = (0.1, 0.2, 0.3, 0.4)
_SEVEN = (0.1, 0.1, 0.1, 0.1, 0.2, 0.2, 0.2)

METHODS = {
    method.name: method
    for method in (
        Method("normal", "none", 1, (1.0,)),
        Method("S0", "hard", 4, _FOUR),
        Method("S1", "branch", 4, None),
        Method("S2", "branch", 4, _FOUR),
        Method("S3", "class", 4, None),
        Method("S4", "class", 4, _FOUR),
        Method("S5", "hard", 7, _SEVEN),
        Method("S6", "branch", 7, None),
        Method("S7", "branch", 7, _SEVEN),
        Method("S8", "class", 7, None),
        Method("S9", "class", 7, _SEVEN),
    )
}


def find_method(name: str) -> Method:
    """The method of that name, in any case.

    Raises:
        InterflowError: no such method.
    """
    for method in METHODS.values():
        if method.name.lower() == name.lower():
            return method
    raise InterflowError(f"method {name!r} is unknown; choose one of {', '.join(METHODS)}.")
