"""From the bytes of any image to the network's uint8 input, by the card's rule. No torch here.

Training, evaluation, export and the server call these functions and no others, so that a picture gives the same pixels
everywhere.
"""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageFile, TiffImagePlugin, UnidentifiedImageError

from model.contract import InputSpec, InterflowError
from model.jpeg import PlainJpeg

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Opened by name, because Pillow would hand others to outside programs (EPS to Ghostscript)."""

DEFAULT_MAX_PIXELS = 50_000_000
MOST_PIXELS = 178_000_000
"""Pillow itself refuses an image of more."""
MOST_SIDE = 65_535
"""As in a JPEG. Resizing takes memory by the side, too: 1 x 49,000,000 pixels took 1.7 GB."""
MOST_SCANS = 100
"""Of a JPEG; libtiff's limit, too, and encoders write up to 15. Each goes through all pixels again: in a few megabytes
are enough for hours."""
MOST_RUN_LENGTH = 4_000_000
"""Pixels, and bytes, of a run-length encoded BMP: Pillow decodes it in Python, 0.35 s for a megabyte, and 0.1 s for a
megapixel of a few bytes."""

MARGIN = 2
"""A JPEG is decoded at no less than this many times the input's size, and resized from there. On photographs of 0.2 to
1 megapixels the input then differs from that of a full decoding by 0.3 grey levels in the mean, at most 18 (32 or 64
pixels a side); with 1 by 0.9, at most 27. The same bytes give the same pixels, here and in training."""

Box = tuple[float, float, float, float]
"""A part of an image: left, top, right and bottom in pixels, which may be fractions."""


class Seen(NamedTuple):
    """What of an upright image the network's input shows, as fractions of its width and height.

    All of it is (0, 0, 1, 1); where the input was padded, it reaches beyond.
    """

    left: float
    top: float
    right: float
    bottom: float


_TURNS: dict[int, tuple[Image.Transpose | None, tuple[int, int, int, int]]] = {
    1: (None, (0, 1, 2, 3)),
    2: (Image.Transpose.FLIP_LEFT_RIGHT, (2, 1, 0, 3)),
    3: (Image.Transpose.ROTATE_180, (2, 3, 0, 1)),
    4: (Image.Transpose.FLIP_TOP_BOTTOM, (0, 3, 2, 1)),
    5: (Image.Transpose.TRANSPOSE, (1, 0, 3, 2)),
    6: (Image.Transpose.ROTATE_270, (3, 0, 1, 2)),
    7: (Image.Transpose.TRANSVERSE, (3, 2, 1, 0)),
    8: (Image.Transpose.ROTATE_90, (1, 2, 3, 0)),
}
"""By EXIF orientation: how an image is turned to be shown, and which of its stored edges (left, top, right, bottom) are
then its left, top, right and bottom ones."""

_TILE_WIDTH, _TILE_LENGTH = 322, 323
_STRIP_PIXELS = 1_000_000
_LARGE_JPEG = 4096
_BLOCK = 1 << 20
"""Of bytes, what a decoder is given at a time. Between two blocks it needs Python again, for which it may have to wait:
in Pillow's, of 64 kB, a busy server decoded a megapixel in three pieces, and answered 5 % fewer requests."""
_ADVICE = "Make it smaller; a server's limit is INTERFLOW_MAX_PIXELS."
_SIXTEEN_TO_EIGHT_BITS = [(sample + 128) // 257 for sample in range(65536)]


class ImageError(InterflowError):
    """Bytes that are no image we can read."""


class ImageTooLargeError(ImageError):
    """An image of more pixels than allowed; found in its header, before any pixel is decoded."""


def open_image(source: bytes | Path, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """Read an image's header, and no pixel of it. Of a path the file stays open: close it, or use it in a `with`.

    Raises:
        ImageTooLargeError: more than `max_pixels`, width * height.
        ImageError: not an image of `FORMATS`, or damaged.
    """
    with _refused(max_pixels):
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
        if isinstance(source, bytes):  # reading a small file in so large a block takes longer
            image.decodermaxblock = _BLOCK
        try:
            _require_sane(image, max_pixels)
        except Exception:
            image.close()
            raise
        return image


def _require_sane(image: ImageFile.ImageFile, max_pixels: int) -> None:
    """Refuse what would take more memory or time than its pixels deserve."""
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    width, height = image.size
    # a TIFF's tiles are decoded whole, however little of them the image shows
    held = max(width, tags.get(_TILE_WIDTH, 0)) * max(height, tags.get(_TILE_LENGTH, 0))
    if held > max_pixels:
        raise ImageTooLargeError(
            f"the image is {width}x{height} ({held / 1e6:.1f} MP{'' if held == width * height else ' in tiles'}); "
            f"the limit is {max_pixels / 1e6:g} MP. {_ADVICE}"
        )
    if max(width, height) > MOST_SIDE:
        raise ImageTooLargeError(f"the image is {width}x{height}; the limit is {MOST_SIDE} pixels a side.")
    if any(tile.codec_name == "bmp_rle" for tile in image.tile) and image.fp is not None:
        position = image.fp.tell()
        size = image.fp.seek(0, io.SEEK_END)
        image.fp.seek(position)
        if max(held, size) > MOST_RUN_LENGTH:
            raise ImageTooLargeError(
                f"the BMP is run-length encoded ({held / 1e6:.1f} MP in {size} bytes); the limit of those is "
                f"{MOST_RUN_LENGTH / 1e6:g} MP and {MOST_RUN_LENGTH} bytes. Save it uncompressed, or as PNG."
            )
    if image.format in ("JPEG", "MPO") and image.fp is not None:
        position = image.fp.tell()
        image.fp.seek(0)
        scans = _scans(image.fp.read())
        image.fp.seek(position)
        if scans > MOST_SCANS:
            raise ImageError(f"the JPEG has {scans} scans; the limit is {MOST_SCANS}. Save it anew.")


def decode_image(image: Image.Image, channels: int) -> Image.Image:
    """Decode the first frame, upright, in 8 bits.

    EXIF orientation is applied, transparency laid over white, 16-bit samples scaled to 8, float samples read as 0..1
    (as 0..255 where one exceeds 1), and every other mode converted; colour profiles are ignored.

    Args:
        image: as `open_image` gave it; not to be used again.
        channels: 1 for grey ("L"), 3 for "RGB".

    Raises:
        ImageError: damaged.
    """
    with _refused():
        image.load()
        return _upright(image, channels, _orientation(image))


def _upright(image: Image.Image, channels: int, orientation: int) -> Image.Image:
    """A decoded image as it is shown, in 8 bits."""
    turn, _ = _TURNS[orientation]
    return _eight_bit(image if turn is None else image.transpose(turn), "L" if channels == 1 else "RGB")


def _scans(jpeg: bytes) -> int:
    """Its markers FF DA, which compressed pixels never hold.

    In a large file in pairs of bytes, ten times as fast as `bytes.count`; in a small one numpy is the slower.
    """
    if len(jpeg) < _LARGE_JPEG:
        return jpeg.count(b"\xff\xda")
    pairs = (np.frombuffer(jpeg, "<u2", (len(jpeg) - start) // 2, start) for start in (0, 1))
    return sum(int(np.count_nonzero(pair == 0xDAFF)) for pair in pairs)


@contextlib.contextmanager
def _refused(max_pixels: int = MOST_PIXELS) -> Iterator[None]:
    """Whatever Pillow raises, as an `ImageError`."""
    try:
        yield
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLargeError(
            f"the image has more pixels than the limit of {max_pixels / 1e6:g} MP. {_ADVICE}"
        ) from error
    except UnidentifiedImageError as error:
        raise ImageError(f"not an image that can be read; expected one of {', '.join(FORMATS)}.") from error
    except FileNotFoundError:
        raise
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        raise ImageError(f"the image is damaged and cannot be decoded ({error}).") from error


def to_input(image: Image.Image, spec: InputSpec, box: Box | None = None) -> np.ndarray:
    """Bring a decoded image to the network's size.

    `crop` takes the largest centred part of the input's proportions, `pad` fits the whole image and fills with black,
    `squash` stretches. An image that has the input's size already passes unchanged by each.

    Args:
        image: upright, in 8 bits.
        spec: size and rule.
        box: what of the image counts; all of it by default.

    Returns:
        uint8 (height, width, channels), 0-255.
    """
    size = (spec.width, spec.height)
    resample = Image.Resampling[spec.interpolation.upper()]
    box = box or (0, 0, *image.size)
    width, height = box[2] - box[0], box[3] - box[1]
    if image.size == size:
        fitted = image
    elif spec.resize == "crop":
        kept_width, kept_height = _kept(width, height, spec)
        left, top = box[0] + (width - kept_width) / 2, box[1] + (height - kept_height) / 2
        fitted = image.resize(
            size, resample, (left, top, min(left + kept_width, box[2]), min(top + kept_height, box[3]))
        )
    elif spec.resize == "pad":
        left, top, inner_width, inner_height = _inside(width, height, spec)
        fitted = Image.new(image.mode, size)
        fitted.paste(image.resize((inner_width, inner_height), resample, box), (left, top))
    else:
        fitted = image.resize(size, resample, box)
    return np.asarray(fitted, np.uint8).reshape(spec.height, spec.width, spec.channels)


def seen(width: float, height: float, spec: InputSpec) -> Seen:
    """What of an upright image of this size `to_input` shows the network: where a place in its input lies there."""
    if spec.resize == "crop":
        kept_width, kept_height = _kept(width, height, spec)
        left, top = (1 - kept_width / width) / 2, (1 - kept_height / height) / 2
        return Seen(left, top, 1 - left, 1 - top)
    if spec.resize == "pad":
        left, top, inner_width, inner_height = _inside(width, height, spec)
        return Seen(
            -left / inner_width,
            -top / inner_height,
            (spec.width - left) / inner_width,
            (spec.height - top) / inner_height,
        )
    return Seen(0, 0, 1, 1)


def _kept(width: float, height: float, spec: InputSpec) -> tuple[float, float]:
    """Width and height of what `crop` leaves of an image."""
    return min(width, height * spec.width / spec.height), min(height, width * spec.height / spec.width)


def _inside(width: float, height: float, spec: InputSpec) -> tuple[int, int, int, int]:
    """Left, top, width and height of an image in the input that `pad` makes of it, in the input's pixels."""
    scale = min(spec.width / width, spec.height / height)
    inner_width, inner_height = max(1, round(width * scale)), max(1, round(height * scale))
    return (spec.width - inner_width) // 2, (spec.height - inner_height) // 2, inner_width, inner_height


def read_input(source: bytes | Path, spec: InputSpec, max_pixels: int = DEFAULT_MAX_PIXELS) -> np.ndarray:
    """Open, decode and resize: uint8 (height, width, channels).

    A JPEG larger than `MARGIN` inputs by the factor 2, 4 or 8 is decoded smaller by it, which is several times as fast.

    Raises:
        ImageTooLargeError, ImageError: as `open_image` and `decode_image`.
    """
    return read_input_and_seen(source, spec, max_pixels)[0]


def read_input_and_seen(
    source: bytes | Path, spec: InputSpec, max_pixels: int = DEFAULT_MAX_PIXELS
) -> tuple[np.ndarray, Seen]:
    """As `read_input`, and what of the upright image the input shows."""
    found = _read_input(source, spec, max_pixels, None)
    assert found is not None, "it was decoded, whatever its size"  # noqa: S101 - as no limit was given
    return found


def read_small_input(source: bytes, spec: InputSpec, small: int, max_pixels: int) -> np.ndarray | None:
    """As `read_input`; None of an image of more than `small` pixels, none of which is decoded then."""
    found = _read_input(source, spec, max_pixels, small)
    return None if found is None else found[0]


def read_picture(source: bytes | Path, side: int, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """Open and decode an image to be shown: upright, in RGB, its longer side brought to `side` pixels.

    Smaller ones are enlarged without smoothing, so that their pixels stay to be seen.

    Raises:
        ImageError, ImageTooLargeError: as `open_image` and `decode_image`.
    """
    with open_image(source, max_pixels) as image:
        upright, box = _decode_at_least(image, 3, side)
    width, height = box[2] - box[0], box[3] - box[1]
    scale = side / max(width, height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return upright.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS, box)


def _read_input(
    source: bytes | Path, spec: InputSpec, max_pixels: int, small: int | None
) -> tuple[np.ndarray, Seen] | None:
    """None of an image of more than `small` pixels."""
    side = MARGIN * max(spec.width, spec.height)
    decoded = None
    jpeg = PlainJpeg.read(source) if isinstance(source, bytes) else None
    if jpeg is not None:
        if small is not None and jpeg.width * jpeg.height > small:
            return None
        decoded = _plainly_at_least(jpeg, spec.channels, side, max_pixels)
    if decoded is None:
        with open_image(source, max_pixels) as image:
            if small is not None and image.width * image.height > small:
                return None
            decoded = _decode_at_least(image, spec.channels, side)
    upright, box = decoded
    return to_input(upright, spec, box), seen(box[2] - box[0], box[3] - box[1], spec)


def _plainly_at_least(jpeg: PlainJpeg, channels: int, side: int, max_pixels: int) -> tuple[Image.Image, Box] | None:
    """As `_decode_at_least`; None of what is to be refused, perhaps: the reason is Pillow's to tell, or ours of it."""
    if jpeg.width * jpeg.height > max_pixels or _scans(jpeg.source) > MOST_SCANS:
        return None
    shrink = jpeg.shrink(side)
    image = jpeg.decode(shrink)
    if image is None:
        return None
    box = (0, 0, jpeg.width / shrink, jpeg.height / shrink)
    return _upright(image, channels, jpeg.orientation), _shown(box, image.size, jpeg.orientation)


def _decode_at_least(image: Image.Image, channels: int, side: int) -> tuple[Image.Image, Box]:
    """As `decode_image`, and what of the result counts. A large JPEG is decoded smaller by 2, 4 or 8, but so that its
    shorter side keeps `side` pixels."""
    with _refused():
        drafted = image.draft(None, (side, side)) if min(image.size) >= 2 * side else None  # None of what is no JPEG
        box = None if drafted is None else _shown(drafted[1], image.size, _orientation(image))
    upright = decode_image(image, channels)
    return upright, box or (0, 0, *upright.size)


def _orientation(image: Image.Image) -> int:
    """Of 1 to 8; 1 where EXIF is damaged, which the pixels need not be."""
    with contextlib.suppress(Exception):  # Pillow raises almost anything on damaged EXIF
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        if orientation in _TURNS:
            return int(orientation)
    return 1


def _shown(box: Box, size: tuple[int, int], orientation: int) -> Box:
    """A part of an image of this size as it is stored, in the image as it is shown."""
    _, edges = _TURNS[orientation]
    width, height = size if edges[0] in (0, 2) else size[::-1]
    beyond = (box[0], box[1], size[0] - box[2], size[1] - box[3])
    left, top, right, bottom = (beyond[edge] for edge in edges)
    return left, top, width - right, height - bottom


def _eight_bit(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits, which some files hold in 32
        image = image.convert("I").point(_SIXTEEN_TO_EIGHT_BITS, "L")
    elif image.mode == "F":
        samples = np.array(image)  # worked on in place: a small file may unpack to hundreds of megabytes
        np.nan_to_num(samples, copy=False)
        if samples.max() <= 1:
            samples *= 255
        image = Image.fromarray(np.clip(samples, 0, 255, out=samples).round(out=samples).astype(np.uint8))
    elif image.mode == "LAB":
        to_rgb = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
        image = ImageCms.applyTransform(image, to_rgb) or image
    elif image.has_transparency_data:
        if image.mode == "La":  # premultiplied grey converts to nothing but LA
            image = image.convert("LA")
        image = _over_white(image)
    return image if image.mode == mode else image.convert(mode)


def _over_white(image: Image.Image) -> Image.Image:
    """Transparency laid over white, a strip at a time: at once would take four times the image's memory."""
    shown = Image.new("RGB", image.size)
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        shown.paste(Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip), (0, top))
    return shown
