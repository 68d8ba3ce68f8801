"""Table II of the paper, against its own description."""

import pytest

from model.contract import InterflowError
from model.methods import METHODS, find_method


def test_the_eleven_methods_are_those_of_table_ii():
    assert list(METHODS) == ["normal", "S0", "S1", "S2", "S3", "S4", "S5", "S6", "S7", "S8", "S9"]
    kinds = ["hard", "branch", "branch", "class", "class"]
    assert [METHODS[f"S{i}"].attention for i in range(10)] == kinds * 2
    assert [METHODS[f"S{i}"].branches for i in range(10)] == [4] * 5 + [7] * 5
    assert [METHODS[f"S{i}"].initial_weights is None for i in range(10)] == [False, True, False, True, False] * 2
    assert [METHODS[f"S{i}"].learned for i in range(10)] == [False, True, True, True, True] * 2


@pytest.mark.parametrize("method", [m for m in METHODS.values() if m.initial_weights])
def test_fixed_weights_are_those_of_the_paper(method):
    expected = {1: (1,), 4: (0.1, 0.2, 0.3, 0.4), 7: (0.1, 0.1, 0.1, 0.1, 0.2, 0.2, 0.2)}
    assert method.initial_weights == expected[method.branches]


def test_names_are_found_in_any_case_and_unknown_ones_are_answered_with_the_list():
    assert find_method("s3") is METHODS["S3"]
    assert find_method("Normal") is METHODS["normal"]
    with pytest.raises(InterflowError, match=r"'S10'.*S0, S1"):
        find_method("S10")
