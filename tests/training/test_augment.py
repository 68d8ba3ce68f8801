"""Augmentation: per image, in range, and a pure function of its generator."""

import pytest
import torch
from torch.nn import functional

from training.augment import augment, random_crop
from training.data import load_data
from training.recipe import Recipe, resolve_recipe


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def images():
    return load_data(resolve_recipe("digits", {})).train.images[:64]


def test_a_crop_is_a_window_of_the_image_padded_with_zeros(images):
    padding = 3
    cropped = random_crop(images, padding, seeded())
    assert cropped.shape == images.shape
    assert cropped.dtype == torch.uint8
    places = set()
    for image, crop in zip(images, cropped, strict=True):
        padded = functional.pad(image, (0, 0, padding, padding, padding, padding))
        windows = {
            (top, left): padded[top : top + 32, left : left + 32]
            for top in range(2 * padding + 1)
            for left in range(2 * padding + 1)
        }
        found = [place for place, window in windows.items() if torch.equal(window, crop)]
        assert found
        places.update(found)
    assert len(places) > 20  # each image its own place, over the whole range
    assert {top for top, _ in places} == {left for _, left in places} == set(range(7))


def test_a_set_that_asks_for_nothing_is_left_alone(images):
    assert augment(images, Recipe(), seeded()) is images


@pytest.mark.parametrize(
    ("settings", "changed"),
    [({"flip": 1}, lambda images: images.flip(2)), ({"invert": 1}, lambda images: 255 - images)],
)
def test_mirrored_and_negative(images, settings, changed):
    assert torch.equal(augment(images, Recipe(**settings), seeded()), changed(images))
    half = augment(images, Recipe(**dict.fromkeys(settings, 0.5)), seeded())
    count = sum(torch.equal(a, b) for a, b in zip(half, images, strict=True))
    assert 16 < count < 48
    either = [torch.equal(h, i) or torch.equal(h, c) for h, i, c in zip(half, images, changed(images), strict=True)]
    assert all(either)


def test_the_generator_alone_decides(images):
    recipe = Recipe(crop_padding=4, flip=0.5, invert=0.5)
    once, again, other = (augment(images, recipe, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
