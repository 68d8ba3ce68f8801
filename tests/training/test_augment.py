"""Draws: each epoch its own, from seed and epoch alone. Augmentation: per image, as drawn, and in range."""

import pytest
import torch
from torch.nn import functional

from training.augment import Draws, augment, crop, draw_epoch
from training.data import load_data
from training.recipe import Recipe, resolve_recipe

MEAN_COLOUR = torch.tensor([77], dtype=torch.uint8)


@pytest.fixture(scope="module")
def images():
    return load_data(resolve_recipe("digits", {})).train.images[:64]


def drawn(recipe, seed=0, count=64):
    """Draws for images 0 to count - 1, in their order."""
    rows = draw_epoch(torch.zeros(count, dtype=torch.long), (32, 32), recipe.model_copy(update={"seed": seed}), 0)
    return Draws(*rows[rows[:, 0].argsort()].unbind(1))


def augmented(images, recipe, seed=0):
    return augment(images, drawn(recipe, seed), recipe, MEAN_COLOUR)


def test_a_crop_is_a_window_of_the_image_padded_with_zeros(images):
    padding = 3
    draws = drawn(Recipe(crop_padding=padding))
    cropped = crop(images, padding, draws.top, draws.left)
    assert cropped.shape == images.shape
    assert cropped.dtype == torch.uint8
    places = set()
    for image, window, top, left in zip(images, cropped, draws.top.tolist(), draws.left.tolist(), strict=True):
        padded = functional.pad(image, (0, 0, padding, padding, padding, padding))
        assert torch.equal(window, padded[top : top + 32, left : left + 32])
        places.add((top, left))
    assert len(places) > 20  # each image its own place, over the whole range
    assert {top for top, _ in places} == {left for _, left in places} == set(range(7))


def test_a_set_that_asks_for_nothing_is_left_alone(images):
    assert augmented(images, Recipe()) is images


@pytest.mark.parametrize(
    ("settings", "changed"),
    [({"flip": 1}, lambda images: images.flip(2)), ({"invert": 1}, lambda images: 255 - images)],
)
def test_mirrored_and_negative(images, settings, changed):
    assert torch.equal(augmented(images, Recipe(**settings)), changed(images))
    half = augmented(images, Recipe(**dict.fromkeys(settings, 0.5)))
    count = sum(torch.equal(a, b) for a, b in zip(half, images, strict=True))
    assert 16 < count < 48
    either = [torch.equal(h, i) or torch.equal(h, c) for h, i, c in zip(half, images, changed(images), strict=True)]
    assert all(either)


def test_what_is_cut_out_is_one_square_of_the_given_colour_and_may_reach_over_the_edge(images):
    recipe, sizes = Recipe(cutout=6), set()
    holes = augmented(torch.full_like(images, 5), recipe) == 77
    for hole, row, column in zip(holes[..., 0], *drawn(recipe)[-2:], strict=True):
        rows, columns = hole.any(1).nonzero().flatten().tolist(), hole.any(0).nonzero().flatten().tolist()
        assert rows == [i for i in range(32) if -3 <= i - row < 3]
        assert columns == [i for i in range(32) if -3 <= i - column < 3]
        assert hole.sum() == len(rows) * len(columns)
        sizes.add(int(hole.sum()))
    assert max(sizes) == 36
    assert min(sizes) < 36


def test_the_seed_and_the_epoch_alone_decide():
    recipe, labels = Recipe(crop_padding=4, flip=0.5, invert=0.5, seed=1), torch.arange(100) % 5
    torch.manual_seed(3)
    once = draw_epoch(labels, (32, 32), recipe, 4)
    torch.manual_seed(4)
    assert torch.equal(once, draw_epoch(labels, (32, 32), recipe, 4))
    for other in (recipe, 5), (recipe.model_copy(update={"seed": 2}), 4):
        assert not torch.equal(once, draw_epoch(labels, (32, 32), *other))


def test_an_epoch_takes_every_image_once():
    rows = draw_epoch(torch.zeros(1000, dtype=torch.long), (8, 8), Recipe(), 0)
    assert sorted(rows[:, 0].tolist()) == list(range(1000))
    assert rows[:, 0].tolist() != list(range(1000))


def test_the_balanced_sampler_draws_a_rare_class_as_often_as_a_common_one():
    labels = torch.tensor([0] * 9000 + [1] * 900 + [2] * 100)
    rows = draw_epoch(labels, (8, 8), Recipe(balance="sampler"), 0)
    counts = labels[rows[:, 0]].bincount()
    assert len(rows) == 10000
    assert ((counts - 10000 / 3).abs() < 5 * (10000 * 2 / 9) ** 0.5).all()  # five standard deviations
    assert len(set(rows[:, 0].tolist()) & set(range(9900, 10000))) == 100  # all of the rare ones are seen
