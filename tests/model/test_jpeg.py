"""JPEGs read without Pillow: the pixels that Pillow gives, or left to it."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from model.contract import InputSpec
from model.images import ImageError, ImageTooLargeError, read_input, read_small_input
from model.jpeg import PlainJpeg


@pytest.fixture(scope="module")
def cat(photographs):
    with Image.open(photographs["chelsea.png"]) as image:
        return image.convert("RGB")


def spec(channels=3, side=20, resize="crop"):
    return InputSpec(
        height=side, width=side, channels=channels, mean=(0,) * channels, std=(1,) * channels, resize=resize,
        interpolation="bilinear",
    )  # fmt: skip


def encode(image, **options):
    with io.BytesIO() as file:
        image.save(file, "JPEG", **options)
        return file.getvalue()


def exif(orientation=None):
    tags = Image.Exif()
    tags[0x010E] = "a cat"
    if orientation is not None:
        tags[0x0112] = orientation
    return tags


def by_pillow(content, rule, tmp_path):
    """A path is read by Pillow."""
    file = tmp_path / "image.jpg"
    file.write_bytes(content)
    return read_input(file, rule)


def xmp(orientation):
    return (
        f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="{orientation}"/></rdf:RDF>'
        f"</x:xmpmeta>"
    ).encode()


@pytest.mark.parametrize("size", [(32, 32), (1, 1), (45, 31), (83, 80), (163, 161), (407, 330), (640, 1003)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quality": 30, "subsampling": 0},
        {"subsampling": 1, "optimize": True},
        {"subsampling": 2, "progressive": True},
        {"quality": 95, "restart_marker_rows": 1},
        {"comment": b"a comment, in a segment of its own", "dpi": (300, 300)},
    ],
)
@pytest.mark.parametrize("grey", [False, True])
def test_the_pixels_are_pillows(cat, tmp_path, size, options, grey):
    picture = cat.resize(size).convert("L" if grey else "RGB")
    content = encode(picture, **options)
    assert PlainJpeg.read(content) is not None
    for channels in (1, 3):
        for resize in ("crop", "pad"):
            rule = spec(channels, resize=resize)
            np.testing.assert_array_equal(read_input(content, rule), by_pillow(content, rule, tmp_path))


@pytest.mark.parametrize("orientation", [None, *range(10)])
@pytest.mark.parametrize("size", [(61, 40), (503, 347)])
def test_what_exif_turns_is_turned(cat, tmp_path, orientation, size):
    content = encode(cat.resize(size), exif=exif(orientation))
    assert PlainJpeg.read(content) is not None
    np.testing.assert_array_equal(read_input(content, spec()), by_pillow(content, spec(), tmp_path))


def test_exif_goes_before_xmp_which_is_left_to_pillow(cat, tmp_path):
    picture = cat.resize((61, 40))
    both = encode(picture, exif=exif(6), xmp=xmp(3))
    only_xmp = encode(picture, xmp=xmp(3))
    assert PlainJpeg.read(both).orientation == 6
    assert PlainJpeg.read(only_xmp) is None
    as_stored = read_input(encode(picture), spec(side=40))
    for content, upright in ((both, False), (only_xmp, False), (encode(picture), True)):
        pixels = read_input(content, spec(side=40))
        np.testing.assert_array_equal(pixels, by_pillow(content, spec(side=40), tmp_path))
        assert np.array_equal(pixels, as_stored) is upright


def first_scan(content):
    return content.index(b"\xff\xda")


@pytest.mark.parametrize(
    "change",
    [
        lambda plain: b"",
        lambda plain: plain[:2],
        lambda plain: plain[: first_scan(plain)],
        lambda plain: b"\x89PNG" + plain[4:],
        lambda plain: plain[:2] + b"\xff" + plain[2:],  # padding, which is allowed
        lambda plain: plain[:2] + b"\xff\xe1" + struct.pack(">H", 10) + b"Exif\0\0II" + plain[2:],  # cut off
    ],
)
def test_what_is_out_of_the_ordinary_is_left_to_pillow(cat, tmp_path, change):
    content = change(encode(cat.resize((61, 40))))
    assert PlainJpeg.read(content) is None
    try:
        expected = by_pillow(content, spec(), tmp_path)
    except ImageError:
        with pytest.raises(ImageError):
            read_input(content, spec())
    else:
        np.testing.assert_array_equal(read_input(content, spec()), expected)


def test_inks_are_left_to_pillow(cat, tmp_path):
    content = encode(cat.resize((61, 40)).convert("CMYK"))
    assert PlainJpeg.read(content) is None
    np.testing.assert_array_equal(read_input(content, spec()), by_pillow(content, spec(), tmp_path))


def test_damage_is_what_pillow_says_it_is(cat, tmp_path):
    """Cut off and mutated in any place: the same pixels, or refused by both."""
    random = np.random.default_rng(0)
    wholes = [encode(cat.resize((90, 60)), progressive=progressive, exif=exif(6)) for progressive in (False, True)]
    refused = read = 0
    for turn in range(300):
        damaged = bytearray(wholes[turn % 2])
        if turn % 3 == 0:
            del damaged[random.integers(len(damaged)) :]
        for _ in range(random.integers(0, 3)):
            damaged[random.integers(len(damaged))] = random.integers(256)
        content = bytes(damaged)
        try:
            expected = by_pillow(content, spec(), tmp_path)
        except ImageError:
            refused += 1
            with pytest.raises(ImageError):
                read_input(content, spec())
        else:
            read += 1
            np.testing.assert_array_equal(read_input(content, spec()), expected)
    assert refused > 30
    assert read > 30


def test_limits_hold(cat):
    content = encode(cat.resize((61, 40)))
    with pytest.raises(ImageTooLargeError, match="61x40"):
        read_input(content, spec(), 61 * 40 - 1)
    assert read_input(content, spec(), 61 * 40).shape == (20, 20, 3)
    assert read_small_input(content, spec(), 61 * 40 - 1, 10**6) is None
    np.testing.assert_array_equal(read_small_input(content, spec(), 61 * 40, 10**6), read_input(content, spec()))
    scan = content[first_scan(content) : -2]
    with pytest.raises(ImageError, match="101 scans"):
        read_input(content[: first_scan(content)] + 101 * scan + content[-2:], spec())
