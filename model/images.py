"""From the bytes of any image to the network's uint8 input, by the card's rule. No torch here.

Training, evaluation, export and the server call these functions and no others, so that a picture gives the same pixels
everywhere.
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from model.contract import InputSpec, InterflowError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Opened by name, because Pillow would hand others to outside programs (EPS to Ghostscript)."""

DEFAULT_MAX_PIXELS = 50_000_000
MOST_PIXELS = 178_000_000
"""Pillow itself refuses an image of more."""

_ADVICE = "Make it smaller; a server's limit is INTERFLOW_MAX_PIXELS."
_SIXTEEN_TO_EIGHT_BITS = [(sample + 128) // 257 for sample in range(65536)]


class ImageError(InterflowError):
    """Bytes that are no image we can read."""


class ImageTooLargeError(ImageError):
    """An image of more pixels than allowed; found in its header, before any pixel is decoded."""


def decode_image(source: bytes | Path, channels: int, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """Decode the first frame, upright, in 8 bits.

    EXIF orientation is applied, transparency laid over white, 16-bit samples scaled to 8, float samples read as 0..1
    (as 0..255 where one exceeds 1), and every other mode converted; colour profiles are ignored.

    Args:
        source: an encoded image, or the path of one.
        channels: 1 for grey ("L"), 3 for "RGB".
        max_pixels: width * height allowed.

    Raises:
        ImageTooLargeError: more than `max_pixels`.
        ImageError: not an image of `FORMATS`, or damaged.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageTooLargeError(
                    f"the image is {width}x{height} ({width * height / 1e6:.1f} MP); "
                    f"the limit is {max_pixels / 1e6:g} MP. {_ADVICE}"
                )
            return _eight_bit(ImageOps.exif_transpose(image), "L" if channels == 1 else "RGB")
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


def to_input(image: Image.Image, spec: InputSpec) -> np.ndarray:
    """Bring a decoded image to the network's size.

    `crop` takes the largest centred part of the input's proportions, `pad` fits the whole image and fills with black,
    `squash` stretches. An image that has the input's size already passes unchanged by each.

    Returns:
        uint8 (height, width, channels), 0-255.
    """
    size = (spec.width, spec.height)
    resample = Image.Resampling[spec.interpolation.upper()]
    if image.size == size:
        fitted = image
    elif spec.resize == "crop":
        fitted = ImageOps.fit(image, size, resample)
    elif spec.resize == "pad":
        scale = min(spec.width / image.width, spec.height / image.height)
        inner = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), resample)
        fitted = Image.new(image.mode, size)
        fitted.paste(inner, ((spec.width - inner.width) // 2, (spec.height - inner.height) // 2))
    else:
        fitted = image.resize(size, resample)
    return np.asarray(fitted, np.uint8).reshape(spec.height, spec.width, spec.channels)


def read_input(source: bytes | Path, spec: InputSpec, max_pixels: int = DEFAULT_MAX_PIXELS) -> np.ndarray:
    """Decode and resize: uint8 (height, width, channels). Raises as `decode_image`."""
    return to_input(decode_image(source, spec.channels, max_pixels), spec)


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
        above = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", above.size, "white"), above).convert("RGB")
    return image.convert(mode)
