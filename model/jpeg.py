"""Plain JPEGs by libjpeg-turbo itself, without Pillow around it: the same pixels, of a small image in half the time.

Between two runs of a network, whatever Python does is done with cold caches, and Pillow reads a JPEG's header in
Python: a server gave one client a tenth more answers without, and 32 clients 4 % more. Anything out of the ordinary is
left to Pillow, and so is every refusal.
"""

import struct
from typing import Any, Self

import simplejpeg
from PIL import ExifTags, Image

SHRINKS = (8, 4, 2)
"""Whole factors by which libjpeg decodes smaller, as Pillow's `draft` chooses them."""
_SEGMENT = struct.Struct(">HH")
_APP1, _SCAN = 0xFFE1, 0xFFDA
_FRAMES = (0xFFC0, 0xFFC1, 0xFFC2)
"""Baseline, extended and progressive."""
_MODES = {"YCbCr": "RGB", "Gray": "L"}
_COLOURS = {"RGB": "RGB", "L": "GRAY"}
_EXIF = b"Exif\0\0"


class PlainJpeg:
    """A JPEG in colour or grey whose header was read, and no pixel of it.

    Attributes:
        source: its bytes.
        width, height: as stored.
        orientation: 1 to 8, as EXIF says.
    """

    def __init__(self, source: bytes, width: int, height: int, mode: str, orientation: int) -> None:
        self.source, self.orientation = source, orientation
        self.width, self.height = width, height
        self._mode = mode

    @classmethod
    def read(cls, source: bytes) -> Self | None:
        """None: Pillow has to look at it, which it may also refuse."""
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(source)
            orientation = _orientation(source)
        except (ValueError, struct.error):
            return None
        if orientation is None or colours not in _MODES:
            return None
        return cls(source, width, height, _MODES[colours], orientation)

    def shrink(self, side: int) -> int:
        """The largest factor by which it can be decoded smaller so that its shorter side keeps so many pixels."""
        return next((factor for factor in SHRINKS if min(self.width, self.height) >= factor * side), 1)

    def decode(self, shrink: int) -> Image.Image | None:
        """RGB or L, as stored, sides divided by `shrink` and rounded up; None: damaged, or so it seems."""
        width, height = (-(-side // shrink) for side in (self.width, self.height))
        try:
            pixels = simplejpeg.decode_jpeg(self.source, _COLOURS[self._mode], min_height=height, min_width=width)
        except ValueError:
            return None
        if pixels.shape[:2] != (height, width):
            return None
        return Image.frombuffer(self._mode, (width, height), pixels, "raw", self._mode, 0, 1)


def _orientation(source: bytes) -> int | None:
    """By its EXIF; None where it may stand elsewhere (XMP), in several pieces, or be wrong, and of other frames.

    Raises:
        struct.error: it ends before its first scan.
    """
    orientation, position, frame = 1, 2, 0
    exif_found = xmp_found = told = False
    while True:
        marker, size = _SEGMENT.unpack_from(source, position)
        if marker == _SCAN:
            return None if frame not in _FRAMES or (xmp_found and not told) else orientation
        if marker >> 8 != 0xFF or size < 2:  # padding, or no marker at all
            return None
        if 0xFFC0 <= marker <= 0xFFCF and marker not in (0xFFC4, 0xFFC8, 0xFFCC):  # tables, and reserved
            frame = marker
        elif marker == _APP1 and source.startswith(_EXIF, position + 4):
            if exif_found:
                return None
            exif_found = True
            tags = Image.Exif()
            try:
                tags.load(source[position + 4 : position + 2 + size])
                found: Any = tags.get(ExifTags.Base.Orientation)
            except Exception:  # Pillow raises almost anything on damaged EXIF
                return None
            told = found is not None
            orientation = int(found) if found in range(1, 9) else 1
        elif marker == _APP1:
            xmp_found = True
        position += 2 + size
