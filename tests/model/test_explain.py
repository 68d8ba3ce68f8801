"""Laws of readings, contributions, evidence and shares, on numbers worked out by hand and at random."""

import numpy as np
import pytest

from model.explain import contributions, evidence, readings, shares, softmax


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
