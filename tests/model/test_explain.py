"""Laws of readings, contributions, evidence and shares, on numbers worked out by hand and at random."""

import numpy as np
import pytest

from model.explain import (
    WHOLE,
    contribution_maps,
    contributions,
    density,
    evidence,
    evidence_maps,
    fused_map,
    readings,
    shares,
    softmax,
    spread,
)


@pytest.fixture
def random():
    return np.random.default_rng(0)


def test_by_hand():
    # one image, two branches, three classes
    branch_logits = np.array([[[2.0, 0.0, 1.0], [1.0, -1.0, 3.0]]])
    weights = np.array([[1.0, 1.0, 1.0], [-2.0, -2.0, -2.0]])
    parts = contributions(branch_logits, weights)
    assert parts.tolist() == [[[2, 0, 1], [-2, 2, -6]]]
    assert parts.sum(axis=1).tolist() == [[0, 2, -5]]  # the answer is class 1
    assert evidence(parts).tolist() == [[[1, -1, 0], [0, 4, -4]]]
    assert shares(parts, np.array([1])).tolist() == [[0.2, 0.8]]
    # the second branch is upside down: with its scale's sign it believes in class 1
    believed = readings(branch_logits, np.array([[1.0] * 3, [-2.0] * 3]))
    assert believed.argmax(axis=2).tolist() == [[0, 1]]
    assert believed[0, 1, 1] == pytest.approx(1 / (1 + np.exp(-4) + np.exp(-8)))


def test_shares_sum_to_one_and_are_equal_without_evidence(random):
    parts = random.normal(size=(6, 4, 10))
    parts[2] = 3.0  # the same for every class: no evidence
    found = shares(parts, parts.sum(axis=1).argmax(axis=1))
    np.testing.assert_allclose(found.sum(axis=1), 1)
    assert found[2].tolist() == [0.25] * 4


def test_flips_rescalings_and_class_constants_change_nothing_a_user_sees(random):
    branch_logits, weights = random.normal(size=(8, 3, 5)), random.normal(size=(3, 5))
    scales = weights * 1.7
    answers = contributions(branch_logits, weights).sum(axis=1).argmax(axis=1)
    for factor in (-1.0, 7.0, -0.01):
        other_logits, other_weights, other_scales = branch_logits.copy(), weights.copy(), scales.copy()
        other_logits[:, 1] *= factor
        other_weights[1] /= factor
        other_scales[1] /= factor
        np.testing.assert_allclose(readings(other_logits, other_scales), readings(branch_logits, scales))
        np.testing.assert_allclose(
            shares(contributions(other_logits, other_weights), answers),
            shares(contributions(branch_logits, weights), answers),
        )
    parts = contributions(branch_logits, weights)
    np.testing.assert_allclose(evidence(parts + random.normal(size=(8, 3, 1))), evidence(parts), atol=1e-12)


def test_softmax_holds_at_any_size():
    assert softmax(np.array([1e4, 0.0, -1e4], np.float32)).tolist() == [1, 0, 0]
    np.testing.assert_allclose(softmax(np.array([[0.0, np.log(3)]])), [[0.25, 0.75]])


# Maps


@pytest.fixture
def maps(random):
    """Contribution maps of 4 images and 5 classes, of stages with grids of 8 x 6, 4 x 3 and 1 x 1."""
    return [random.normal(size=(4, 5, *grid)) for grid in ((8, 6), (4, 3), (1, 1))]


def sums(stages):
    return np.stack([values.sum(axis=(-2, -1)) for values in stages], axis=-2)


def test_maps_by_hand():
    # one image, one branch, two classes on a grid of 1 x 2
    (found,) = contribution_maps([np.array([[[[2.0, 4.0]], [[1.0, -1.0]]]])], np.array([[[-1.0, 3.0]]]))
    assert found.tolist() == [[[[-1, -2]], [[1.5, -1.5]]]]
    (evident,) = evidence_maps([found])
    assert evident.tolist() == [[[[-1.25, -0.25]], [[1.25, 0.25]]]]


def test_maps_sum_to_contributions_and_evidence(random):
    branch_maps = [random.normal(size=(3, 5, *grid)) for grid in ((8, 6), (4, 4))]
    branch_logits = np.stack([values.mean(axis=(2, 3)) for values in branch_maps], axis=1)
    per_image, shared = random.normal(size=(3, 2, 5)), random.normal(size=(2, 5))
    for weights in (per_image, shared):
        found = contribution_maps(branch_maps, weights)
        np.testing.assert_allclose(sums(found), contributions(branch_logits, weights))
        np.testing.assert_allclose(sums(evidence_maps(found)), evidence(contributions(branch_logits, weights)))
    one = contribution_maps([values[1] for values in branch_maps], per_image[1])  # without the dimension of images
    for values, of_all in zip(one, contribution_maps(branch_maps, per_image), strict=True):
        np.testing.assert_array_equal(values, of_all[1])


def test_no_map_of_evidence_changes_when_a_branch_is_turned_and_scaled_or_all_classes_are_moved(random):
    branch_maps, weights = [random.normal(size=(2, 5, 4, 3))], random.normal(size=(1, 5))
    found = evidence_maps(contribution_maps(branch_maps, weights))
    turned = evidence_maps(contribution_maps([-7 * branch_maps[0]], weights / -7))
    moved = evidence_maps(
        [values + random.normal(size=(2, 1, 4, 3)) for values in contribution_maps(branch_maps, weights)]
    )
    np.testing.assert_allclose(turned, found)
    np.testing.assert_allclose(moved, found)


@pytest.mark.parametrize("size", [(8, 6), (64, 48), (7, 31), (3, 2), (1, 1), (1, 200)])
@pytest.mark.parametrize("box", [WHOLE, (0.1, 0.3, 0.75, 0.9), (0.0, 0.25, 1.0, 0.75)])
def test_on_an_images_grid_each_stage_keeps_its_sum(maps, size, box):
    placed = [spread(values, size, box) for values in maps]
    np.testing.assert_allclose(sums(placed), sums(maps))
    np.testing.assert_allclose(sums([fused_map(maps, size, box)])[..., 0, :], sums(maps).sum(axis=-2))
    seen = [density(values, box) for values in placed]
    for values, of_stage in zip(seen, placed, strict=True):
        assert np.array_equal(np.isnan(values), np.isnan(seen[0]))
        assert (of_stage[np.isnan(values)] == 0).all()


def test_the_mean_density_over_what_was_seen_is_the_sum(maps):
    for box in (WHOLE, (0.25, 0, 0.75, 1), (0, 0.125, 0.5, 1)):  # whole pixels: all count the same
        for values in maps:
            seen = density(spread(values, (16, 24), box), box)
            np.testing.assert_allclose(np.nanmean(seen, axis=(-2, -1)), values.sum(axis=(-2, -1)))


def test_interpolation_goes_from_cell_to_cell_and_never_beyond(maps):
    for values in maps:
        cells = values.shape[-2] * values.shape[-1]
        seen = density(spread(values, (160, 120)))
        assert (seen.max(axis=(-2, -1)) <= values.max(axis=(-2, -1)) * cells + 1e-9).all()
        assert (seen.min(axis=(-2, -1)) >= values.min(axis=(-2, -1)) * cells - 1e-9).all()
    ramp = density(spread(np.array([[0.0, 1.0]]), (1, 8)))[0]  # cells of density 0 and 2, with middles at 2 and 6
    np.testing.assert_allclose(ramp, [0, 0, 0.25, 0.75, 1.25, 1.75, 2, 2])


def test_a_cell_is_where_the_network_saw_it():
    cell = np.zeros((4, 4))
    cell[0, 3] = 1  # top right
    box = (0.5, 0.0, 1.0, 0.5)  # of the image's top right quarter
    placed = spread(cell, (80, 80), box)
    row, column = np.unravel_index(placed.argmax(), placed.shape)
    assert (row, column) == (pytest.approx(2.5, abs=3), pytest.approx(77.5, abs=3))
    assert (placed[40:] == 0).all()
    assert (placed[:, :40] == 0).all()
    assert np.isnan(density(placed, box))[40:].all()


def test_what_lies_in_the_padding_is_not_on_the_image():
    """An image of 2 x 1 in a square input: the map's upper and lower quarter lie outside."""
    values = np.arange(16.0).reshape(4, 4)
    placed = spread(values, (100, 200), (0, -0.5, 1, 1.5))
    assert not np.isnan(density(placed, (0, -0.5, 1, 1.5))).any()
    blocky = values[1:3].sum()
    assert placed.sum() == pytest.approx(blocky)  # so smooth a map loses above what it gains below
    assert placed.sum() != pytest.approx(values.sum())
