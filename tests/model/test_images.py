"""Every kind of image Pillow opens, to the same upright 8-bit pixels; by the card's rule, to the network's size."""

import io
import itertools
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageDraw

from model import images
from model.contract import InputSpec
from model.images import ImageError, ImageTooLargeError, open_image, read_input, to_input


def spec(size=(20, 10), channels=3, resize="crop", interpolation="bilinear"):
    return InputSpec(
        height=size[0], width=size[1], channels=channels, mean=(0,) * channels, std=(1,) * channels,
        resize=resize, interpolation=interpolation,
    )  # fmt: skip


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def cat(photographs):
    with Image.open(photographs["chelsea.png"]) as image:
        return image.convert("RGB")


def decode_image(data, channels, max_pixels=images.DEFAULT_MAX_PIXELS):
    return images.decode_image(open_image(data, max_pixels), channels)


def difference(image, other):
    return np.abs(np.asarray(image).astype(int) - np.asarray(other).astype(int)).mean()


@pytest.mark.parametrize(
    ("kind", "options", "loss"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("WEBP", {"quality": 90}, 4),
        ("JPEG", {"quality": 95}, 4),
        ("JPEG", {"quality": 95, "progressive": True}, 4),
        ("GIF", {}, 12),
    ],
)
def test_every_format_gives_the_photograph(cat, kind, options, loss):
    decoded = decode_image(encode(cat, kind, **options), 3)
    assert decoded.mode == "RGB"
    assert decoded.size == cat.size
    assert difference(decoded, cat) <= loss


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_honoured(cat, orientation, kind):
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }.get(orientation)  # fmt: skip
    stored = cat if undo is None else cat.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode_image(encode(stored, kind, exif=exif), 3)
    assert decoded.size == cat.size
    assert difference(decoded, cat) < 5


def test_grey_palette_and_one_bit_become_what_the_network_reads(cat):
    grey = cat.convert("L")
    for image in (grey, cat.convert("P"), cat.convert("1")):
        assert decode_image(encode(image), 3).mode == "RGB"
        assert decode_image(encode(image), 1).mode == "L"
    assert difference(decode_image(encode(grey), 1), grey) == 0
    assert difference(decode_image(encode(cat), 1), grey) == 0
    palette = cat.convert("P")
    assert difference(decode_image(encode(palette), 3), palette.convert("RGB")) == 0


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_over_white(mode):
    image = Image.new(mode, (4, 4), (0,) * len(mode))  # black, and wholly transparent
    image.paste((0,) * (len(mode) - 1) + (255,), (0, 0, 2, 4))  # black, opaque
    image.paste((0,) * (len(mode) - 1) + (102,), (3, 0, 4, 4))  # black, 40 %
    row = np.asarray(decode_image(encode(image), 1))[0].tolist()
    assert row == [0, 0, 255, 153]


def test_transparent_palette_entries_and_colour_keys_are_laid_over_white():
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 0, 0, 0])
    palette.putpixel((1, 0), 1)
    assert np.asarray(decode_image(encode(palette, transparency=1), 3)).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    keyed = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    assert np.asarray(decode_image(encode(keyed, transparency=(4, 5, 6)), 3)).tolist() == [[[1, 2, 3], [255, 255, 255]]]


def test_sixteen_bits_are_scaled_to_eight_not_cut(cat):
    grey = np.asarray(cat.convert("L"))
    sixteen = Image.fromarray(grey.astype(np.uint16) * 257)
    assert sixteen.mode == "I;16"
    for kind in ("PNG", "TIFF"):
        assert difference(decode_image(encode(sixteen, kind), 1), grey) == 0
    thirty_two = Image.fromarray(grey.astype(np.int32) * 257)
    assert difference(decode_image(encode(thirty_two, "TIFF"), 1), grey) == 0


def test_float_samples_are_read_as_fractions_or_as_bytes(cat):
    grey = np.asarray(cat.convert("L"))
    for samples in (grey / 255, grey.astype(float)):
        tiff = encode(Image.fromarray(samples.astype(np.float32)), "TIFF")
        assert difference(decode_image(tiff, 1), grey) == 0
    with_gaps = np.array([[np.nan, np.inf, -np.inf, 0.5]], np.float32)
    assert decode_image(encode(Image.fromarray(with_gaps), "TIFF"), 1).size == (4, 1)


def test_cmyk_and_lab_become_rgb(cat):
    assert difference(decode_image(encode(cat.convert("CMYK"), "JPEG", quality=95), 3), cat) < 6
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    assert difference(decode_image(encode(ImageCms.applyTransform(cat, to_lab), "TIFF"), 3), cat) < 6


def test_the_first_frame_of_an_animation_counts(cat):
    small = cat.resize((30, 20))
    gif = encode(small, "GIF", save_all=True, append_images=[Image.new("RGB", small.size, "red")])
    assert difference(decode_image(gif, 3), small) < 12


def test_an_image_of_the_inputs_size_passes_unchanged_by_every_rule(cat):
    image = cat.resize((10, 20))
    for rule in ("crop", "pad", "squash"):
        assert np.array_equal(to_input(image, spec(resize=rule)), np.asarray(image))


def test_crop_takes_the_middle_pad_keeps_all_and_squash_stretches():
    thirds = Image.new("L", (90, 30))  # black, white, grey
    thirds.paste(255, (30, 0, 60, 30))
    thirds.paste(100, (60, 0, 90, 30))

    def fitted(rule):
        return to_input(thirds, spec((30, 30), 1, rule, "nearest"))[..., 0]

    assert (fitted("crop") == 255).all()
    assert fitted("squash")[0].tolist() == [0] * 10 + [255] * 10 + [100] * 10
    padded = fitted("pad")
    assert (padded[:10] == 0).all()
    assert padded[15].tolist() == [0] * 10 + [255] * 10 + [100] * 10
    assert (padded[20:] == 0).all()


@pytest.mark.parametrize("rule", ["crop", "pad", "squash"])
@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (1, 1), (3, 2)])
def test_extreme_shapes_fit_without_growing_in_between(rule, size):
    out = to_input(Image.new("RGB", size, "white"), spec((32, 32), 3, rule))
    assert out.shape == (32, 32, 3)
    assert out.dtype == np.uint8
    assert out.max() == 255


def test_the_pixel_limit_is_checked_before_decoding(cat):
    whole = encode(cat)
    half = whole[: len(whole) // 2]  # could not be decoded: only the header is looked at
    with pytest.raises(ImageTooLargeError, match=r"451x300 \(0.1 MP\); the limit is 0.1 MP"):
        decode_image(half, 3, max_pixels=100_000)
    with pytest.raises(ImageError, match="damaged"):
        decode_image(half, 3)
    assert decode_image(whole, 3, max_pixels=451 * 300).size == (451, 300)


@pytest.mark.parametrize("side", [20_000, 60_000, 2**31 - 1])
def test_a_file_that_claims_a_gigantic_image_is_too_large(side):
    small = encode(Image.new("1", (8, 8)))
    header = b"IHDR" + side.to_bytes(4, "big") * 2 + small[24:29]
    with pytest.raises(ImageTooLargeError):
        decode_image(small[:12] + header + zlib.crc32(header).to_bytes(4, "big") + small[33:], 3)


def run_length_bmp(image, more=b""):
    """A picture of 256 greys as runs of equal pixels, row by row from below, and whatever comes behind its end."""
    content = b""
    for row in np.asarray(image)[::-1].tolist():
        for grey, run in itertools.groupby(row):
            whole, rest = divmod(len(list(run)), 255)
            content += bytes([255, grey]) * whole + bytes([rest, grey]) * (rest > 0)
        content += b"\0\0"
    content += b"\0\1" + more
    header = struct.pack("<IiiHHIIiiII", 40, *image.size, 1, 8, 1, len(content), 0, 0, 256, 0)
    palette = b"".join(bytes([grey, grey, grey, 0]) for grey in range(256))
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 14 + 40 + 1024) + header + palette + content


def test_run_length_encoded_bmps_have_a_limit_of_their_own(cat):
    """Pillow decodes them in Python: one of 28 kB and 49 megapixels took five seconds."""
    grey = cat.convert("L")
    assert difference(decode_image(run_length_bmp(grey), 1), grey) == 0
    assert decode_image(run_length_bmp(Image.new("L", (2000, 2000), 7)), 1).getextrema() == (7, 7)
    for refused in (run_length_bmp(Image.new("L", (2001, 2000))), run_length_bmp(grey, more=bytes(4_000_000))):
        with pytest.raises(
            ImageTooLargeError, match=r"run-length encoded .* the limit of those is 4 MP and 4000000 bytes"
        ):
            open_image(refused)
    assert open_image(encode(Image.new("L", (2001, 2000)), "BMP")).size == (2001, 2000)


@pytest.mark.parametrize("data", [b"", b"\x00", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"<svg/>" * 50])
def test_what_is_no_image_is_said_to_be_none(data):
    with pytest.raises(ImageError, match="expected one of JPEG, PNG"):
        decode_image(data, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_damaged_files_raise_our_error_and_no_other(cat, kind):
    whole = encode(cat.resize((60, 40)), kind)
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole[: random.integers(1, len(whole) + 1)])
        for _ in range(random.integers(0, 20)):
            damaged[random.integers(len(damaged))] = random.integers(256)
        try:
            read_input(bytes(damaged), spec())
        except ImageError:
            refused += 1
    assert refused > 30


def test_bytes_and_path_give_the_same_pixels(photographs):
    path = photographs["rocket.jpg"]
    assert np.array_equal(read_input(path, spec()), read_input(path.read_bytes(), spec()))
    with pytest.raises(FileNotFoundError):
        read_input(path.with_name("no-such.png"), spec())


# JPEGs, decoded at a smaller scale


def fully(data, rule):
    """As if no JPEG were ever decoded at a smaller scale."""
    return to_input(decode_image(data, rule.channels), rule)


@pytest.mark.parametrize("name", ["astronaut.png", "chelsea.png", "rocket.jpg"])
@pytest.mark.parametrize("rule", ["crop", "pad", "squash"])
@pytest.mark.parametrize("options", [{"quality": 90}, {"quality": 90, "progressive": True, "subsampling": 0}])
@pytest.mark.parametrize("size", [(1152, 896), (999, 667)])
def test_a_large_jpeg_gives_nearly_the_pixels_of_its_full_decoding(photographs, name, rule, options, size):
    with Image.open(photographs[name]) as photograph:
        data = encode(photograph.convert("RGB").resize(size), "JPEG", **options)
    for channels in (1, 3):
        small = spec((32, 32), channels, rule)
        apart = np.abs(read_input(data, small).astype(int) - fully(data, small))
        assert apart.mean() < 1
        assert apart.max() <= 20
        assert apart.any()  # or it was decoded in full


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("rule", ["crop", "pad", "squash"])
def test_a_large_jpeg_is_shown_upright_to_the_pixel(cat, orientation, rule):
    """Sides that no scale divides: what lies beyond the picture's edge must be left out on the side it is shown on."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(cat.resize((1003, 747)), "JPEG", quality=95, exif=exif)
    small = spec((40, 24), 3, rule)
    apart = np.abs(read_input(data, small).astype(int) - fully(data, small))
    assert apart.mean() < 0.5


@pytest.mark.parametrize("size", [(1152, 896), (127, 127), (128, 128), (5000, 40)])
def test_no_jpeg_is_decoded_below_what_the_input_needs(monkeypatch, cat, size):
    seen = []
    resize = Image.Image.resize

    def look(self, *arguments, **named):
        seen.append(self.size)
        return resize(self, *arguments, **named)

    data = encode(cat.resize(size), "JPEG")
    monkeypatch.setattr(Image.Image, "resize", look)
    read_input(data, spec((32, 32)))
    ((width, height),) = seen
    scale = size[0] / width
    assert min(width, height) >= images.MARGIN * 32 or scale == 1
    assert (scale > 1.5) == (min(size) >= 2 * images.MARGIN * 32)


def test_other_formats_and_small_jpegs_are_decoded_in_full(cat):
    for kind, size in (("PNG", (1152, 896)), ("WEBP", (1152, 896)), ("JPEG", (127, 127))):
        data = encode(cat.resize(size), kind)
        assert np.array_equal(read_input(data, spec((32, 32))), fully(data, spec((32, 32))))


def test_the_same_bytes_give_the_same_pixels(cat):
    data = encode(cat.resize((1152, 896)), "JPEG")
    first = read_input(data, spec((32, 32)))
    assert all(np.array_equal(first, read_input(data, spec((32, 32)))) for _ in range(3))


def test_only_the_header_is_read_before_the_limit_is_checked(cat):
    whole = encode(cat)
    image = open_image(whole[: len(whole) // 2])
    assert image.size == (451, 300)
    with pytest.raises(ImageError, match="damaged"):
        images.decode_image(image, 3)


# What of an image the network saw, and the image as it is shown


def painted(cat, size, marker, orientation=1):
    """The photograph in grey, a white disc at a place (fractions of width and height), stored turned."""
    width, height = size
    image = cat.resize(size).point(lambda value: value // 3)
    x, y, radius = marker[0] * width, marker[1] * height, 0.06 * min(size)
    ImageDraw.Draw(image).ellipse((x - radius, y - radius, x + radius, y + radius), "white")
    turn = {6: Image.Transpose.ROTATE_90, 3: Image.Transpose.ROTATE_180, 5: Image.Transpose.TRANSPOSE}.get(orientation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image if turn is None else image.transpose(turn), "JPEG", quality=95, exif=exif)


@pytest.mark.parametrize("size", [(451, 300), (300, 451), (1301, 700), (700, 1301), (200, 200), (90, 40)])
@pytest.mark.parametrize("rule", ["crop", "pad", "squash"])
@pytest.mark.parametrize("input_size", [(64, 64), (40, 72)])
@pytest.mark.parametrize("orientation", [1, 3, 5, 6])
def test_a_place_in_the_input_is_found_again_in_the_image(cat, size, rule, input_size, orientation):
    """Small and large, so that some JPEGs are decoded at a smaller scale."""
    marker = (0.4, 0.55)
    data = painted(cat, size, marker, orientation)
    pixels, seen = images.read_input_and_seen(data, spec(input_size, 1, rule))
    assert np.array_equal(pixels, read_input(data, spec(input_size, 1, rule)))
    rows, columns = np.nonzero(pixels[..., 0] > 128)
    height, width = input_size
    found = (
        seen.left + (columns.mean() + 0.5) / width * (seen.right - seen.left),
        seen.top + (rows.mean() + 0.5) / height * (seen.bottom - seen.top),
    )
    one_pixel = max((seen.right - seen.left) / width, (seen.bottom - seen.top) / height)
    assert found == pytest.approx(marker, abs=0.75 * one_pixel)


def test_what_the_rules_show():
    assert images.seen(400, 300, spec((30, 30), resize="squash")) == (0, 0, 1, 1)
    assert images.seen(400, 300, spec((30, 30), resize="crop")) == pytest.approx((0.125, 0, 0.875, 1))
    assert images.seen(300, 400, spec((30, 60), resize="crop")) == pytest.approx((0, 0.3125, 1, 0.6875))
    assert images.seen(400, 200, spec((40, 40), resize="pad")) == pytest.approx((0, -0.5, 1, 1.5))
    assert images.seen(200, 400, spec((40, 40), resize="pad")) == pytest.approx((-0.5, 0, 1.5, 1))
    for rule in ("crop", "pad", "squash"):
        assert images.seen(60, 30, spec((30, 60), resize=rule)) == (0, 0, 1, 1)


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (1, 1), (3, 2)])
def test_the_border_of_a_padded_input_lies_outside_the_image(size):
    pixels, seen = images.read_input_and_seen(encode(Image.new("L", size, 255)), spec((32, 32), 1, "pad"))
    places = (np.arange(32) + 0.5) / 32
    across = seen.left + places * (seen.right - seen.left)
    down = seen.top + places * (seen.bottom - seen.top)
    inside = np.logical_and.outer((down > 0) & (down < 1), (across > 0) & (across < 1))
    assert np.array_equal(pixels[..., 0] > 0, inside)


@pytest.mark.parametrize(("size", "shown"), [((451, 300), (256, 170)), ((1000, 3000), (85, 256)), ((8, 4), (256, 128))])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_picture_is_shown_whole_and_at_the_size_asked_for(cat, size, shown, kind):
    picture = images.read_picture(encode(cat.resize(size), kind, quality=95), 256)
    assert (picture.mode, picture.size) == ("RGB", shown)
    assert difference(picture, cat.resize(size).resize(shown)) < 8


def test_a_picture_is_upright_and_bounded(cat):
    data = painted(cat, (1301, 700), (0.2, 0.7), orientation=6)
    bright = np.asarray(images.read_picture(data, 200).convert("L")) > 200
    rows, columns = np.nonzero(bright)
    height, width = bright.shape
    assert (columns.mean() / width, rows.mean() / height) == pytest.approx((0.2, 0.7), abs=0.02)
    for size in ((1, 5000), (5000, 1), (1, 1)):
        assert max(images.read_picture(encode(Image.new("1", size)), 64).size) == 64
    with pytest.raises(ImageTooLargeError):
        images.read_picture(encode(cat), 64, max_pixels=1000)
