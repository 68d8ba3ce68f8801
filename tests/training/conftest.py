"""What all tests of training share."""

import pytest

from training import cache


@pytest.fixture(autouse=True)
def _decoded_images_elsewhere(monkeypatch, tmp_path_factory):
    """Tests decode folders that nobody reads again: not into the project's data."""
    monkeypatch.setattr(cache, "FOLDER", str(tmp_path_factory.getbasetemp() / "decoded"))
