"""The training benchmark measures what it says: real steps of both loops, and the network's arithmetic."""

import pytest
import torch

from benchmarks.training import flops_per_image, matrix_rate, measure, ours, plain
from training.data import load_data
from training.recipe import resolve_recipe

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def recipe():
    return resolve_recipe("paper", {"data": "digits", "image_size": "32", "width": "0.0625", "workers": "0"})


@pytest.fixture(scope="module")
def data(recipe):
    return load_data(recipe)


def test_the_arithmetic_is_that_of_the_convolutions_and_heads(recipe, data):
    """3 x 3 convolutions of 4 to 32 channels at 32 to 2 pixels, by hand; the first needs no gradient of its input."""
    channels = [1, 4, 4, 8, 8, 16, 16, 16, 32, 32, 32, 32, 32, 32]
    sides = [32, 32, 16, 16, 8, 8, 8, 4, 4, 4, 2, 2, 2]
    forward = [2 * 9 * i * o * s * s for i, o, s in zip(channels, channels[1:], sides, strict=False)]
    heads = [2 * c * 10 * s * s for c, s in ((16, 8), (32, 4), (32, 2), (32, 2))]
    assert flops_per_image(data, recipe) == 3 * (sum(forward) + sum(heads)) - forward[0]


def test_variants_take_turns_and_train(recipe, data):
    order = []
    variants = [plain(data, recipe, CPU), ours("eager", data, recipe, CPU), ours("two", data, recipe, CPU, runs=2)]
    for variant in variants:
        whole = variant.run
        variant.run = lambda steps, whole=whole, name=variant.name: order.append((name, steps)) or whole(steps)
    seconds = measure(variants, warm_up=1, steps=2, rounds=2)
    assert order == [(name, steps) for steps in (1, 2, 2) for name in ("plain", "eager", "two")]
    assert {name: len(values) for name, values in seconds.items()} == {"plain": 2, "eager": 2, "two": 2}
    assert all(value > 0 for values in seconds.values() for value in values)


def test_the_chips_rate_is_that_of_a_matrix_product(recipe):
    assert 1e8 < matrix_rate(recipe, CPU, seconds=0.2) < 1e14
