"""The confusion matrix is drawn for few classes and for many, and its colours are the shares of the rows."""

import numpy as np
import pytest
from PIL import Image

from training.plots import plot_confusion


@pytest.mark.parametrize("classes", [2, 31, 130])
def test_it_is_drawn_whatever_the_number_of_classes_and_their_names(classes, tmp_path):
    counts = np.eye(classes, dtype=np.int64) * 5
    counts[0] = np.roll(counts[0], 1)  # a class that is never answered
    plot_confusion(counts, tuple(f"${i} " + "long" * 30 for i in range(classes)), tmp_path / "confusion.png")
    with Image.open(tmp_path / "confusion.png") as picture:
        picture.load()
        assert max(picture.size) < 3000
        assert min(picture.size) > 300


def test_rows_are_the_true_classes_and_rare_ones_are_coloured_like_common_ones(tmp_path):
    """Class 0, common, is always taken for class 1; class 1, rare, is always recognised."""
    plot_confusion(np.array([[0, 1000], [0, 3]]), ("common", "rare"), tmp_path / "confusion.png")
    with Image.open(tmp_path / "confusion.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    dark = (pixels == [8, 48, 107]).all(axis=2)  # the end of the scale: 100 %
    columns, rows = (np.flatnonzero(dark.sum(axis=axis) > 50) for axis in (0, 1))
    assert np.ptp(rows) == pytest.approx(2 * np.ptp(columns), rel=0.05)  # the answer "rare", in both rows
