"""Data sets: real images through the server's own functions, splits that hold, and clear refusals."""

import os
import shutil
import signal
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from model.contract import InterflowError
from model.images import read_input
from training import folders, splits
from training.data import NAMED_SETS, load_data
from training.recipe import Recipe, resolve_recipe
from training.splits import FolderImages


@pytest.fixture(scope="module")
def folder(tmp_path_factory, photographs):
    """Tiles of real photographs as a folder set: three classes, train and test."""
    root = tmp_path_factory.mktemp("photos")
    for label, name in (("astronaut", "astronaut.png"), ("cat", "chelsea.png"), ("coffee", "coffee.png")):
        with Image.open(photographs[name]) as opened:
            photo = opened.convert("RGB")
        for i in range(14):
            part = root / ("train" if i < 10 else "test") / label
            part.mkdir(parents=True, exist_ok=True)
            photo.crop((20 * i, 10 * i, 20 * i + 90, 10 * i + 60)).save(
                part / f"{i:02}.{('png', 'jpg', 'webp')[i % 3]}"
            )
    return root


def recipe(root, **settings):
    return Recipe(**{"data": str(root), "image_size": 24, "workers": 0} | settings)


def test_digits_are_the_1797_scans_in_fixed_splits():
    one, other = (load_data(resolve_recipe("digits", {"seed": seed})) for seed in (0, 1))
    assert len(one.train) + len(one.val) + len(one.test) == 1797
    assert len(one.test) == pytest.approx(0.2 * 1797, abs=10)
    assert torch.equal(one.test.images, other.test.images)
    assert torch.equal(one.train.labels, other.train.labels)
    assert one.classes == tuple("0123456789")
    assert one.train.images.shape[1:] == (32, 32, 1)
    keys = [{bytes(image.numpy()) for image in split.images} for split in (one.train, one.val, one.test)]
    assert not keys[0] & keys[2]
    assert not keys[1] & keys[2]


def test_held_out_parts_are_stratified(folder):
    loaded = load_data(recipe(folder, val_fraction=0.3))
    assert loaded.val.labels.bincount().tolist() == [3, 3, 3]
    assert loaded.train.labels.bincount().tolist() == [7, 7, 7]
    assert loaded.test.labels.bincount().tolist() == [4, 4, 4]
    everything = load_data(recipe(folder, val_fraction=0))
    assert everything.val is None
    assert len(everything.train) == 30


def test_images_are_those_the_server_would_see(folder):
    loaded = load_data(recipe(folder, val_fraction=0, resize="pad"))
    paths = sorted((folder / "train").rglob("*.*"))
    expected = np.stack([read_input(path, loaded.spec) for path in paths])
    assert np.array_equal(loaded.train.images.numpy(), expected)
    pixels = expected.reshape(-1, 3) / 255
    np.testing.assert_allclose(loaded.spec.mean, pixels.mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(loaded.spec.std, pixels.std(axis=0), rtol=1e-9)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_set_too_large_for_memory_gives_the_same_batches(folder, monkeypatch, workers):
    small = load_data(recipe(folder))
    monkeypatch.setattr(folders, "IN_MEMORY_BYTES", 0)
    large = load_data(recipe(folder, workers=workers))
    assert isinstance(large.train.images, FolderImages)
    assert large.spec == small.spec
    order = [torch.tensor([5, 0, 3]), torch.tensor([8])]
    state = torch.get_rng_state()
    batches = list(large.train.batches(order, workers))
    assert torch.equal(torch.get_rng_state(), state)  # or a resumed run would differ
    for (images, labels), (expected, expected_labels) in zip(batches, small.train.batches(order, 0), strict=True):
        assert torch.equal(images, expected)
        assert torch.equal(labels, expected_labels)


def test_a_folder_without_splits_has_test_held_out(folder, tmp_path):
    shutil.copytree(folder / "train", tmp_path / "flat")
    loaded = load_data(recipe(tmp_path / "flat"))
    assert loaded.test.labels.bincount().tolist() == [2, 2, 2]
    assert loaded.val.labels.bincount().tolist() == [1, 1, 1]
    assert loaded.name == "flat"


def test_a_named_set_is_read_from_its_folder_grey_as_it_is(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "mnist")
    loaded = load_data(Recipe(data="mnist", data_dir=tmp_path, workers=0))
    assert loaded.train.images.shape[1:] == (28, 28, 1)
    assert loaded.classes == ("astronaut", "cat", "coffee")


def test_numbered_folders_of_a_named_set_get_its_names(tmp_path, folder):
    for part in ("train", "test"):
        for digit in range(10):
            shutil.copytree(folder / part / "cat", tmp_path / "fashion_mnist" / part / str(digit))
    loaded = load_data(Recipe(data="fashion_mnist", data_dir=tmp_path, workers=0))
    assert loaded.classes[9] == "Ankle boot"


@pytest.mark.parametrize("name", NAMED_SETS)
def test_a_set_that_cannot_be_downloaded_says_where_to_put_it(name, tmp_path, monkeypatch):
    def no_network(*_args, **_options):
        raise URLError("no network")

    monkeypatch.setattr(torchvision.datasets, NAMED_SETS[name].torchvision, no_network)
    with pytest.raises(InterflowError, match=rf"{name}.*no network.*Unpack it as .*{name}"):
        load_data(Recipe(data=name, data_dir=tmp_path))


def test_a_downloaded_set_is_taken_as_torchvision_has_it(monkeypatch, tmp_path):
    class Downloaded:
        classes = ("a", "b")

        def __init__(self, root, split, download):
            assert (root, download) == (tmp_path, True)
            count = {"train": 40, "test": 20}[split]
            self.data = np.random.default_rng(0).integers(0, 256, (count, 3, 32, 32), np.uint8)
            self.labels = np.arange(count) % 10

    monkeypatch.setattr(torchvision.datasets, "SVHN", Downloaded)
    loaded = load_data(Recipe(data="svhn", data_dir=tmp_path, val_fraction=0))
    assert np.array_equal(loaded.train.images.numpy(), Downloaded(tmp_path, "train", True).data.transpose(0, 2, 3, 1))


def test_a_damaged_image_is_named_or_skipped_and_counted(folder, tmp_path):
    root = tmp_path / "set"
    shutil.copytree(folder, root)
    damaged = root / "train" / "cat" / "05.webp"
    damaged.write_bytes(damaged.read_bytes()[:100])
    (root / "test" / "coffee" / "zz.png").write_text("no image")
    with pytest.raises(InterflowError, match=r"05\.webp.*1 of 30 images.*--skip-bad-images"):
        load_data(recipe(root))
    loaded = load_data(recipe(root, skip_bad_images=True, val_fraction=0))
    assert loaded.skipped == 2
    assert loaded.train.labels.bincount().tolist() == [10, 9, 10]
    assert loaded.test.labels.bincount().tolist() == [4, 4, 4]


def test_names_are_torchvisions():
    for name in ("mnist", "kmnist", "fashion_mnist"):  # the others learn theirs from the download
        theirs = getattr(torchvision.datasets, NAMED_SETS[name].torchvision).classes
        assert [label.split(" - ")[0] for label in theirs] == list(NAMED_SETS[name].classes)  # mnist's are "0 - zero"


def test_a_test_split_that_skipping_empties_is_refused(folder, tmp_path):
    root = tmp_path / "set"
    shutil.copytree(folder, root)
    for path in (root / "test" / "cat").iterdir():
        path.write_text("no image")
    with pytest.raises(InterflowError, match="class cat has no readable image in test"):
        load_data(recipe(root, skip_bad_images=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_breaks_during_training_is_named_in_one_line(folder, tmp_path, monkeypatch, workers):
    root = tmp_path / "set"
    shutil.copytree(folder, root)
    monkeypatch.setattr(folders, "IN_MEMORY_BYTES", 0)
    loaded = load_data(recipe(root, val_fraction=0))
    loaded.train.images.paths[3].write_bytes(b"gone")
    with pytest.raises(InterflowError, match=r"03\.png: not an image") as error:
        list(loaded.train.in_order(8, workers))
    assert "\n" not in str(error.value)


def test_a_channel_that_never_varies_is_no_reason_to_refuse(folder, tmp_path):
    root = tmp_path / "green"
    shutil.copytree(folder, root)
    for path in root.rglob("*.*"):
        with Image.open(path) as image:
            green = Image.merge("RGB", (Image.new("L", image.size), image.convert("L"), Image.new("L", image.size)))
        green.save(path, "PNG")  # without loss, whatever its name says
    spec = load_data(recipe(root)).spec
    assert (spec.mean[0], spec.std[0]) == (0, 1)
    assert 0 < spec.std[1] < 1


@pytest.mark.parametrize(("name", "expected"), [("фото", "images"), ("_a b!", "a-b"), ("v1.2", "v1.2")])
def test_a_folder_of_any_name_gives_a_name_that_a_model_may_have(folder, tmp_path, name, expected):
    shutil.copytree(folder, tmp_path / name)
    assert load_data(recipe(tmp_path / name)).name == expected


def test_holding_out_never_takes_all(folder):
    loaded = load_data(recipe(folder, val_fraction=0.99))
    assert loaded.train.labels.bincount().tolist() == [1, 1, 1]


def test_what_is_no_image_file_is_passed_over(folder, tmp_path):
    root = tmp_path / "set"
    shutil.copytree(folder, root)
    (root / "train" / "cat" / "._00.png").write_text("left behind by another system")
    (root / "train" / "cat" / "folder.png").mkdir()
    os.mkfifo(root / "train" / "cat" / "pipe.png")
    (root / "train" / "cat" / "notes.txt").write_text("no image")
    assert load_data(recipe(root)).train.labels.bincount().tolist() == [9, 9, 9]


def test_a_class_may_be_called_train(folder, tmp_path):
    shutil.copytree(folder / "train" / "cat", tmp_path / "set" / "train")
    shutil.copytree(folder / "train" / "coffee", tmp_path / "set" / "plane")
    assert load_data(recipe(tmp_path / "set")).classes == ("plane", "train")


def test_a_named_set_needs_both_its_parts(folder, tmp_path):
    shutil.copytree(folder / "train", tmp_path / "cifar10" / "train")
    with pytest.raises(InterflowError, match="train/ but no test/"):
        load_data(Recipe(data="cifar10", data_dir=tmp_path))


def test_a_worker_that_dies_is_one_sentence(folder, monkeypatch):
    monkeypatch.setattr(folders, "IN_MEMORY_BYTES", 0)
    loaded = load_data(recipe(folder))
    monkeypatch.setattr(splits, "read_file", lambda path, spec: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(InterflowError, match="process that reads images has died"):
        list(loaded.train.in_order(8, workers=1))


def _one_class(root):
    shutil.rmtree(root / "train" / "cat")
    shutil.rmtree(root / "train" / "coffee")


def _no_class(root):
    shutil.rmtree(root / "train")
    (root / "train").mkdir()


def _no_class_in_either(root):
    for part in ("train", "test"):
        for path in (root / part).rglob("*.*"):
            path.rename(root / part / f"{path.parent.name}-{path.name}")
        for folder in ("astronaut", "cat", "coffee"):
            (root / part / folder).rmdir()


def _empty_class(root):
    for path in (root / "train" / "cat").iterdir():
        path.unlink()


def _other_classes(root):
    (root / "test" / "cat").rename(root / "test" / "dog")


def _a_single_image(root):
    for path in sorted((root / "train" / "cat").iterdir())[1:]:
        path.unlink()


def _one_colour(root):
    for path in root.rglob("*.*"):
        Image.new("RGB", (30, 30), "grey").save(path.with_suffix(".png"))
        if path.suffix != ".png":
            path.unlink()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (shutil.rmtree, "no such folder.*name of a set"),
        (_one_class, "the one class astronaut.*two or more"),
        (_no_class, "train: no images"),
        (
            _no_class_in_either,
            "has test/ and train/ but no class folders in them; expected one folder of images for each",
        ),
        (_empty_class, "cat: no images"),
        (_other_classes, "only one of them has cat, dog"),
        (_a_single_image, "class cat is down to 1 readable images"),
        (_one_colour, "one colour"),
    ],
)
def test_a_folder_one_cannot_train_on_says_why(folder, tmp_path, harm, message):
    root = tmp_path / "set"
    shutil.copytree(folder, root)
    harm(root)
    with pytest.raises(InterflowError, match=message):
        load_data(recipe(root))


@pytest.mark.parametrize("in_memory", [0, 2**30])
def test_the_fingerprint_sees_a_changed_pixel(folder, tmp_path, monkeypatch, in_memory):
    root = tmp_path / "set"
    shutil.copytree(folder, root)
    before = load_data(recipe(root)).fingerprint
    assert load_data(recipe(root, seed=5)).fingerprint == before
    monkeypatch.setattr(folders, "IN_MEMORY_BYTES", in_memory)
    assert load_data(recipe(root)).fingerprint == before
    path = root / "train" / "cat" / "00.png"
    with Image.open(path) as image:
        image.putpixel((45, 30), (1, 2, 3))
        image.save(path)
    assert load_data(recipe(root)).fingerprint != before
