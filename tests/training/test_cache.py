"""Decoded images are kept, found again, and never mistaken for others."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from training import cache, folders
from training.data import load_data
from training.recipe import Recipe

FOLDER = ".decoded"


@pytest.fixture(autouse=True)
def _in_its_place(_decoded_images_elsewhere, monkeypatch):
    monkeypatch.setattr(cache, "FOLDER", FOLDER)


@pytest.fixture
def root(tmp_path, photographs):
    with Image.open(photographs["chelsea.png"]) as image:
        for label, left in (("left", 0), ("right", 200)):
            for i in range(10):
                path = tmp_path / "set" / label / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                image.crop((left + i, i, left + i + 40, i + 40)).save(path)
    return tmp_path / "set"


def load(root, **settings):
    return load_data(Recipe(data=str(root), data_dir=root.parent, image_size=16, workers=0, **settings))


def decoding(monkeypatch):
    """A list that grows with every image file that is decoded."""
    decoded, whole = [], folders.read_file
    monkeypatch.setattr(folders, "read_file", lambda *arguments: decoded.append(arguments) or whole(*arguments))
    return decoded


def kept(root):
    return list((root.parent / FOLDER).glob("*"))


def assert_equal(a, b):
    for one, other in ((a.train, b.train), (a.val, b.val), (a.test, b.test)):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
    assert (a.spec, a.classes, a.fingerprint) == (b.spec, b.classes, b.fingerprint)


def test_the_second_time_nothing_is_decoded(root, monkeypatch):
    decoded = decoding(monkeypatch)
    first = load(root)
    assert len(decoded) == 20
    second = load(root)
    assert len(decoded) == 20
    assert_equal(first, second)
    assert_equal(first, load(root, cache=False))
    assert len(decoded) == 40


def other_pixels(root):
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(root / "left" / "3.png")


def another_image(root):
    (root / "left" / "3.png").rename(root / "left" / "33.png")


def another_class(root):
    (root / "left" / "3.png").rename(root / "right" / "33.png")


def newer(root):
    os.utime(root / "left" / "3.png", ns=(0, 0))


@pytest.mark.parametrize("change", [other_pixels, another_image, another_class, newer])
def test_any_change_is_noticed_and_replaces_what_was_kept(root, monkeypatch, change):
    load(root)
    change(root)
    decoded = decoding(monkeypatch)
    assert_equal(load(root), load(root, cache=False))
    assert len(decoded) == 40
    assert len(kept(root)) == 1
    load(root)
    assert len(decoded) == 40


def test_another_way_to_decode_is_not_this_one(root, monkeypatch):
    load(root)
    monkeypatch.setattr(cache, "DECODING", 0)
    decoded = decoding(monkeypatch)
    load(root)
    assert len(decoded) == 20


def test_other_sizes_and_folders_are_kept_beside(root, monkeypatch):
    load(root)
    load_data(Recipe(data=str(root), data_dir=root.parent, image_size=8, workers=0))
    assert len(kept(root)) == 2
    assert load(root).size == (16, 16)


def test_what_a_killed_process_left_is_removed_and_what_another_is_writing_is_not(root):
    load(root)
    (path,) = kept(root)
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    left, written, foreign = (
        path.with_name(name)
        for name in (f".{path.stem}-{ended.pid}.safetensors", f".{path.stem}-1.safetensors", f".other-{ended.pid}.txt")
    )
    for file in (left, written, foreign):
        file.write_bytes(b"half")
    other_pixels(root)
    load(root)
    assert sorted(kept(root)) == sorted([path, written, foreign])


@pytest.mark.parametrize("damage", [lambda whole: whole[:-7], lambda whole: b"", lambda whole: b"\xff" * 100])
def test_a_damaged_cache_is_written_anew(root, monkeypatch, damage):
    first = load(root)
    (path,) = kept(root)
    path.write_bytes(damage(path.read_bytes()))
    assert_equal(first, load(root))
    decoded = decoding(monkeypatch)
    load(root)
    assert not decoded


def test_without_room_it_goes_on(root, capsys):
    (root.parent / FOLDER).write_text("in the way")
    load(root)
    assert "could not be kept" in capsys.readouterr().out


def test_a_set_with_damaged_images_is_not_kept(root):
    (root / "left" / "3.png").write_bytes(b"no image")
    assert load(root, skip_bad_images=True).skipped == 1
    assert not (root.parent / FOLDER).exists()
