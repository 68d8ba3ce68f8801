"""Files of every format, whole, damaged and lying: an image or a 4xx that says so, in bounded memory and time.

Every file goes to the server over HTTP, and an honest image after it.
"""

import io
import random
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from model.images import FORMATS, MOST_SCANS, MOST_SIDE

Image.init()

BLUE = (0, 0, 255)
MB = 10**6


def encode(image, kind, **options):
    with io.BytesIO() as file:
        image.save(file, kind, **options)
        return file.getvalue()


def noise(mode="RGB", side=40):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8))
    return image.convert("L").convert(mode) if mode in ("I;16", "F") else image.convert(mode)


def post(client, content):
    return client.post("/predict", content=content, headers={"Content-Type": "image/png"})


def refusal(answer):
    """Status and code of a problem that says what is wrong in a few words."""
    problem = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert 10 < len(problem["detail"]) < 300
    return answer.status_code, problem["code"]


def require_answer_or_refusal(answer):
    if answer.status_code != 200:
        assert refusal(answer) in ((400, "invalid_image"), (413, "too_many_pixels"))


NO_IMAGE = (400, "invalid_image")
TOO_LARGE = (413, "too_many_pixels")


@pytest.fixture(autouse=True)
def _nothing_is_logged_and_the_next_is_answered(colours, logs):
    yield
    answer = colours.post("/predict", content=encode(Image.new("RGB", (4, 4), BLUE), "PNG"))
    assert answer.json()["prediction"]["label"] == "blue"
    errors = [record for record in logs.get_records("call") if record.levelname == "ERROR"]
    assert [record for record in errors if not record.name.startswith("PIL")] == []  # which `app.logs` keeps silent


# Every format


def saved_by_pillow():
    """A blue image in every format that Pillow writes by itself."""
    for kind in sorted(Image.SAVE):
        for mode in ("RGB", "L", "1", "P"):
            try:
                with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # formats that will go
                    content = encode(Image.new("RGB", (32, 32), BLUE).convert(mode), kind)
            except (OSError, ValueError, KeyError):  # of a mode that it does not hold, or by a program that is not here
                continue
            yield kind, content
            break


SAVED = dict(saved_by_pillow())
TAKEN = {*FORMATS, "MPO"}  # a JPEG with more images behind it

ONLY_OPENED = {
    "CUR": b"\0\0\2\0\1\0" + struct.pack("<BBBBHHII", 1, 1, 0, 0, 0, 0, 40, 22) + bytes(60),
    "DCX": struct.pack("<II", 0x3ADE68B1, 12) + bytes(200),
    "FITS": b"SIMPLE  =                    T".ljust(80)
    + b"NAXIS   =                    0".ljust(80)
    + b"END".ljust(2720),
    "FLI": struct.pack("<IHHHH", 128, 0xAF11, 1, 8, 8) + bytes(200),
    "FTEX": b"FTEX" + bytes(200),
    "GBR": struct.pack(">IIIII", 28, 2, 8, 8, 1) + b"GIMP" + bytes(100),
    "ICNS": b"icns\0\0\1\0" + bytes(300),
    "IPTC": b"\x1c\x03\x14\0\1\0" + bytes(100),
    "MCIDAS": b"\0\0\0\0\0\0\0\4" + bytes(300),
    "MPEG": b"\0\0\1\xb3\1\0\1\0" + bytes(100),
    "PCD": bytes(2048) + b"PCD_" + bytes(2048),
    "PDF": b"%PDF-1.7\n1 0 obj\n<< >>\nendobj\n",
    "PIXAR": b"\x80\xe8\0\0" + bytes(1100),
    "POSTSCRIPT": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(/etc/passwd) (r) file\n",
    "PSD": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 30_000, 30_000, 8, 3) + bytes(100),
    "SUN": struct.pack(">IIIIIIII", 0x59A66A95, 8, 8, 24, 192, 1, 0, 0) + bytes(192),
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    "WMF": b"\xd7\xcd\xc6\x9a\0\0" + bytes(100),
    "XPM": b'/* XPM */\nstatic char *x[] = {\n"1 1 1 1",\n"a c #0000ff",\n"a"};',
    "XVTHUMB": b"P7 332\n#END_OF_COMMENTS\n8 8 255\n" + bytes(64),
    "HTML": b"<html>",
    "ZIP": b"PK\3\4" + bytes(100),
    "zeros": bytes(5000),
}


def test_every_format_that_pillow_writes_or_opens_has_its_sample():
    """But those for which it asks a program of the user's own."""
    assert set(Image.SAVE) - set(SAVED) <= {"BUFR", "GRIB", "HDF5", "WMF"}
    assert {*Image.OPEN} - {*SAVED, *ONLY_OPENED} <= {"BUFR", "GRIB", "HDF5", "IMT"}  # IMT: anything with its extension


@pytest.mark.parametrize("kind", SAVED)
def test_our_formats_are_taken_and_the_others_refused_by_name(colours, kind):
    answer = post(colours, SAVED[kind])
    if kind in TAKEN:
        assert answer.json()["prediction"]["label"] == "blue"
    else:
        assert refusal(answer) == NO_IMAGE
        assert ", ".join(FORMATS) in answer.json()["detail"]


@pytest.mark.parametrize("kind", ONLY_OPENED)
def test_what_pillow_would_open_and_we_do_not(colours, kind):
    assert refusal(post(colours, ONLY_OPENED[kind])) == NO_IMAGE


# Damage

EXIF = b"Exif\0\0II*\0" + bytes(50)
VARIANTS = {
    "jpeg": encode(noise(), "JPEG"),
    "jpeg progressive": encode(noise(), "JPEG", progressive=True, quality=90),
    "jpeg cmyk and exif": encode(noise("CMYK"), "JPEG", exif=EXIF, icc_profile=bytes(99)),
    "mpo": encode(noise(), "MPO", save_all=True, append_images=[noise()]),
    "png": encode(noise(), "PNG"),
    "png palette": encode(noise("P"), "PNG", transparency=3),
    "png 16 bits": encode(noise("I;16"), "PNG"),
    "png animated": encode(noise(), "PNG", save_all=True, append_images=[noise().rotate(90)]),
    "webp": encode(noise(), "WEBP"),
    "webp lossless": encode(noise("RGBA"), "WEBP", lossless=True, exif=EXIF),
    "webp animated": encode(noise(), "WEBP", save_all=True, append_images=[noise().rotate(90)]),
    "gif": encode(noise("P"), "GIF", transparency=3, interlace=1),
    "gif animated": encode(noise("P"), "GIF", save_all=True, append_images=[noise("P").rotate(90)]),
    "bmp": encode(noise(), "BMP"),
    "bmp palette": encode(noise("P"), "BMP"),
    "bmp one bit": encode(noise("1"), "BMP"),
    "tiff": encode(noise(), "TIFF"),
    "tiff float": encode(noise("F"), "TIFF"),
    "tiff lab": encode(Image.new("LAB", (40, 40), (90, 9, 9)), "TIFF", compression="packbits"),
    "tiff lzw": encode(noise(), "TIFF", compression="tiff_lzw"),
    "tiff deflate": encode(noise(), "TIFF", compression="tiff_adobe_deflate"),
    "tiff jpeg": encode(noise(), "TIFF", compression="jpeg"),
    "tiff fax": encode(noise("1"), "TIFF", compression="group4"),
    "tiff pages": encode(noise(), "TIFF", save_all=True, append_images=[noise()]),
}  # fmt: skip


def truncated(content):
    yield from (content[:length] for length in (1, 2, 4, 8, 12, 26, 40, len(content) // 2, len(content) - 1))


def mutated(content, count, seed=0):
    """Single bytes, runs and numbers put in other places' place, most of them near the start."""
    chance = random.Random(seed)
    extremes = (b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x80\0\0\0", b"\0\0\0\x80")
    for _ in range(count):
        changed = bytearray(content)
        for _ in range(chance.choice((1, 1, 4, 32))):
            place = chance.randrange(min(len(changed), chance.choice((32, 200, len(changed)))))
            piece = chance.choice((bytes([chance.randrange(256)]), chance.choice(extremes), chance.randbytes(2)))
            changed[place : place + len(piece)] = piece
        yield bytes(changed)


def spliced(content, other):
    """The start of one file and the end of another."""
    yield from (content[:place] + other[place:] for place in (4, 20, 60, 300))


def require_each_answered(colours, files):
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda content: post(colours, content), files))
    for answer in answers:
        require_answer_or_refusal(answer)
    return answers


@pytest.mark.parametrize("name", VARIANTS)
def test_a_file_cut_off(colours, name):
    answers = require_each_answered(colours, truncated(VARIANTS[name]))
    assert all(refusal(answer) == NO_IMAGE for answer in answers[:5])


@pytest.mark.parametrize("name", VARIANTS)
def test_damaged_files(colours, name):
    answers = require_each_answered(colours, mutated(VARIANTS[name], 40))
    assert any(answer.status_code != 200 for answer in answers)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_very_many_damaged_files(colours, name):
    require_each_answered(colours, mutated(VARIANTS[name], 3000, seed=1))


@pytest.mark.parametrize("name", VARIANTS)
def test_two_files_in_one(colours, name):
    for other in VARIANTS.values():
        require_each_answered(colours, spliced(VARIANTS[name], other))


# Lies


def png_chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, *chunks, pixels=None, depth=8, colour=2):
    """A PNG of any header and chunks; black, and of so many bytes of pixels as the header says."""
    size = height * (1 + width * depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour] // 8) if pixels is None else pixels
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = png_chunk(b"IDAT", zeros(size))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + b"".join(chunks) + body + png_chunk(b"IEND", b"")


def zeros(count):
    """So many, compressed."""
    deflater = zlib.compressobj(9)
    return b"".join(deflater.compress(bytes(min(MB, count - done))) for done in range(0, count, MB)) + deflater.flush()


def tiff(*tags, content=b"", next_ifd=0):
    """A TIFF of one directory of (tag, type, count, value); its pixels begin at `tiff_start(len(tags))`."""
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + struct.pack("<I", next_ifd) + content


def grey_tiff(width, height, *more, compression=1, content=bytes(64), next_ifd=0):
    """A TIFF of one grey strip, or as the further tags say."""
    tags = {256: width, 257: height, 258: 8, 259: compression, 262: 1, 277: 1, 278: height, 279: len(content)}
    plain = [(tag, 4, 1, value) for tag, value in tags.items() if tag not in {given[0] for given in more}]
    start = 8 + 2 + 12 * (len(plain) + len(more) + 1) + 4
    where = 324 if 322 in {given[0] for given in more} else 273
    return tiff(*sorted([*plain, *more, (where, 4, 1, start)]), content=content, next_ifd=next_ifd)


def bmp(width, height, *, offset=62, depth=8, compression=0, colours=2, pixels=bytes(64)):
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, depth, compression, 0, 0, 0, colours, 0)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, offset) + header + bytes(8) + pixels


def gif(width, height, frame):
    """A canvas, and one frame: left, top, width and height; without any palette."""
    return (
        b"GIF89a"
        + struct.pack("<HHBBB", width, height, 0, 0, 0)
        + b","
        + struct.pack("<HHHHB", *frame, 0)
        + (b"\x02\x02\x44\x01\x00;")
    )


def webp(content, riff_size=None, kind=b"VP8X"):
    body = b"WEBP" + kind + struct.pack("<I", len(content)) + content
    return b"RIFF" + struct.pack("<I", len(body) if riff_size is None else riff_size) + body


GIF = encode(Image.new("P", (4, 4)), "GIF")
NO_PALETTE = GIF[:10] + bytes([GIF[10] & 0x7F]) + GIF[11:13] + GIF[13 + 3 * 2 ** ((GIF[10] & 7) + 1) :]
WEBP = VARIANTS["webp"]
JPEG = VARIANTS["jpeg"]
FRAME_HEADER = JPEG.index(b"\xff\xc0") + 5  # of the JPEG: its height, then its width


def jpeg_of(height, width):
    return JPEG[:FRAME_HEADER] + struct.pack(">HH", height, width) + JPEG[FRAME_HEADER + 4 :]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (png(30_000, 30_000, pixels=10), TOO_LARGE),
        (png(2**31 - 1, 2**31 - 1, pixels=10), TOO_LARGE),
        (png(2**32 - 1, 1, pixels=10), TOO_LARGE),
        (png(0, 4, pixels=10), NO_IMAGE),
        (png(1000, 1000, pixels=10), NO_IMAGE),
        (png(8, 8, colour=3), NO_IMAGE),  # a palette that is missing
        (png(8, 8, png_chunk(b"zTXt", b"a\0\0" + zeros(100 * MB))), NO_IMAGE),
        (png(8, 8, png_chunk(b"iTXt", b"a\0\1\0\0\0" + zeros(60 * MB))), NO_IMAGE),
        (png(8, 8, png_chunk(b"iCCP", b"a\0\0" + zeros(60 * MB))), NO_IMAGE),
        (png(8, 8, *[png_chunk(b"zTXt", b"a%d\0\0" % number + zeros(MB)) for number in range(70)]), NO_IMAGE),
        (jpeg_of(65_535, 65_535), TOO_LARGE),
        (jpeg_of(0, 40), NO_IMAGE),
        (jpeg_of(40, 0), NO_IMAGE),
        (bmp(30_000, 30_000), TOO_LARGE),
        (bmp(-8, 8), TOO_LARGE),
        (bmp(2**31 - 1, -(2**31)), TOO_LARGE),
        (bmp(0, 0), NO_IMAGE),
        (bmp(8, 8, offset=2**32 - 1), NO_IMAGE),
        (bmp(8, 8, colours=2**32 - 1), NO_IMAGE),
        (gif(65_535, 65_535, (0, 0, 1, 1)), TOO_LARGE),
        (gif(1, 1, (0, 0, 60_000, 60_000)), TOO_LARGE),  # a frame makes the canvas larger
        (gif(1, 1, (60_000, 60_000, 1, 1)), TOO_LARGE),
        (gif(0, 0, (0, 0, 0, 0)), NO_IMAGE),
        (webp(bytes(4) + b"\xff" * 6), TOO_LARGE),
        (webp(bytes(4) + (16_382).to_bytes(3, "little") * 2), TOO_LARGE),
        (WEBP[:4] + bytes(4) + WEBP[8:], NO_IMAGE),
        (WEBP[:4] + b"\xff" * 4 + WEBP[8:], NO_IMAGE),
        (grey_tiff(30_000, 30_000), TOO_LARGE),
        (grey_tiff(2**32 - 1, 2**32 - 1), TOO_LARGE),
        (grey_tiff(0, 8), NO_IMAGE),
        (grey_tiff(8, 8, (258, 3, 2**32 - 1, 8)), NO_IMAGE),
        (grey_tiff(8, 8, (277, 3, 1, 60_000)), NO_IMAGE),
        (grey_tiff(1, 1, (322, 4, 1, 29_984), (323, 4, 1, 29_984), compression=8, content=zeros(10)), TOO_LARGE),
        (tiff(), NO_IMAGE),
        (b"II*\0" + struct.pack("<I", 2**32 - 1), NO_IMAGE),
        (b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 2**63), NO_IMAGE),
    ],
)  # fmt: skip
def test_headers_that_lie(colours, content, expected):
    assert refusal(post(colours, content)) == expected


@pytest.mark.parametrize(
    "content",
    [
        grey_tiff(8, 8, next_ifd=8),  # a directory that is followed by itself
        grey_tiff(8, 8, (34665, 4, 1, 8)),  # and one whose EXIF is itself
        JPEG[:2] + b"\xff\xe1\xff\xff" + b"Exif\0\0" + bytes(65_527) + JPEG[2:],
        JPEG[:2] + b"\xff\xe2\xff\xff" + b"ICC_PROFILE\0\1\1" + bytes(65_519) + JPEG[2:],
        JPEG + bytes(50_000),
        JPEG + VARIANTS["png"],
        png(8, 8, png_chunk(b"tEXt", b"a\0" + b"b" * 90_000)),
        png(8, 8, png_chunk(b"eXIf", b"II*\0" + b"\xff" * 1000)),
        png(8, 8, png_chunk(b"iCCP", b"a\0\0" + zeros(1000))),
        bmp(8, 8, compression=1, pixels=b"\0\2\xff\xff"),  # jumps far beyond the end
        NO_PALETTE,
        encode(noise("P"), "GIF", save_all=True, append_images=[noise("P", 20)] * 50),
    ],
)  # fmt: skip
def test_odd_files_that_still_hold_an_image(colours, content):
    assert post(colours, content).status_code == 200


@pytest.mark.parametrize("orientation", [0, 9, 65_535, -1, "up", b"\xff", (6, 6), 1.5])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_an_orientation_that_is_none_is_ignored(colours, orientation, kind):
    kind_of_field, count, layout = {
        int: (9, 1, "<i"), str: (2, 3, "3s"), bytes: (7, 1, "1s"), tuple: (3, 2, "<2H"), float: (12, 1, "<d")
    }[type(orientation)]  # fmt: skip
    values = orientation if isinstance(orientation, tuple) else [orientation]
    packed = struct.pack(layout, *(value.encode() if isinstance(value, str) else value for value in values))
    inline = packed.ljust(4, b"\0") if len(packed) <= 4 else struct.pack("<I", 26)
    exif = b"II*\0\x08\0\0\0\1\0" + struct.pack("<HHI", 274, kind_of_field, count) + inline + bytes(4) + packed
    content = encode(Image.new("RGB", (30, 20), BLUE), kind, exif=b"Exif\0\0" + exif)
    assert post(colours, content).json()["prediction"]["label"] == "blue"


def test_a_tiff_of_a_kind_that_pillow_cannot_read(colours, photos):
    assert refusal(post(colours, (photos / "multipage_rgb.tif").read_bytes())) == NO_IMAGE


@pytest.mark.parametrize("size", [(MOST_SIDE, 1), (MOST_SIDE + 1, 1), (1, MOST_SIDE), (1, MOST_SIDE + 1)])
def test_a_side_has_its_limit_too(colours, size):
    answer = post(colours, encode(Image.new("1", size), "PNG"))
    if max(size) > MOST_SIDE:
        assert refusal(answer) == TOO_LARGE
        assert f"{MOST_SIDE} pixels a side" in answer.json()["detail"]
    else:
        assert answer.status_code == 200


def jpeg_of_scans(scans, side=40):
    """A progressive JPEG whose last scan comes again and again."""
    content = encode(Image.new("RGB", (side, side), BLUE), "JPEG", progressive=True)
    last = content[content.rindex(b"\xff\xda") : -2]
    return content[:-2] + last * (scans - content.count(b"\xff\xda")) + b"\xff\xd9"


@pytest.mark.parametrize("scans", [MOST_SCANS, MOST_SCANS + 1, 5000])
def test_the_scans_of_a_jpeg_have_their_limit(colours, scans):
    """Each takes as long as all pixels do: a few megabytes of them would take hours."""
    answer = post(colours, jpeg_of_scans(scans))
    if scans > MOST_SCANS:
        assert refusal(answer) == NO_IMAGE
        assert f"{scans} scans" in answer.json()["detail"]
    else:
        assert answer.json()["prediction"]["label"] == "blue"


def test_pillows_own_complaints_are_not_logged(measured):
    complained_of = grey_tiff(8, 8, (277, 3, 1, 60_000))
    assert refusal(post(measured.client, complained_of)) == NO_IMAGE
    measured.require_honest_answer()


# Bombs: small files of very many pixels

BYTES_PER_PIXEL = 18
"""That decoding takes at most (animated WebP: Pillow's library holds two canvases, Pillow two copies)."""
SLACK = 40 * MB
SIDE = 2000  # the measured server allows 4,000,000 pixels


def runs(side):
    """Rows of run lengths, for a BMP."""
    return (b"\xff\0" * (side // 255 + 1) + b"\0\0") * side


BOMBS = {
    "png rgb": lambda side: png(side, side),
    "png rgba of 16 bits": lambda side: png(side, side, depth=16, colour=6),
    "png grey of 16 bits": lambda side: png(side, side, depth=16, colour=0),
    "png transparent palette": lambda side: encode(Image.new("P", (side, side)), "PNG", transparency=0),
    "webp": lambda side: encode(Image.new("RGB", (side, side)), "WEBP", quality=1, method=0),
    "webp lossless": lambda side: encode(Image.new("RGBA", (side, side)), "WEBP", lossless=True, quality=0, method=0),
    "gif": lambda side: encode(Image.new("P", (side, side)), "GIF", transparency=0),
    "bmp run lengths": lambda side: bmp(side, side, compression=1, pixels=runs(side)),
    "tiff deflate": lambda side: grey_tiff(side, side, compression=8, content=zeros(side * side)),
    "tiff float": lambda side: encode(Image.new("F", (side, side)), "TIFF", compression="tiff_adobe_deflate"),
    "tiff lab": lambda side: encode(Image.new("LAB", (side, side)), "TIFF", compression="tiff_lzw"),
    "jpeg": lambda side: encode(Image.new("RGB", (side, side)), "JPEG", quality=1, subsampling=0),
    "jpeg progressive cmyk": lambda side: encode(Image.new("CMYK", (side, side)), "JPEG", progressive=True),
    "jpeg of many scans": lambda side: jpeg_of_scans(MOST_SCANS, side),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_takes_no_more_than_its_pixels_may(measured, name):
    content = BOMBS[name](SIDE)
    assert len(content) < MB
    growth = measured.growth(lambda: post(measured.client, content).raise_for_status())
    assert growth < BYTES_PER_PIXEL * SIDE * SIDE + SLACK


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_of_more_pixels_is_refused_by_its_header(measured, name):
    content = BOMBS[name](SIDE + 8)
    answers = []
    assert measured.growth(lambda: answers.append(post(measured.client, content))) < 10 * MB
    assert refusal(answers[0]) == TOO_LARGE


def test_bombs_at_the_same_time_take_no_more_than_their_decoders(measured):
    contents = [BOMBS[name](SIDE) for name in ("png rgba of 16 bits", "webp lossless", "gif", "tiff float")] * 6

    def abuse():
        with ThreadPoolExecutor(len(contents)) as pool:
            answers = list(pool.map(lambda content: post(measured.client, content), contents))
        assert {answer.status_code for answer in answers} == {200}

    assert measured.growth(abuse) < 2 * BYTES_PER_PIXEL * SIDE * SIDE + SLACK


def test_bombs_in_one_batch_take_no_more_than_their_decoders(measured):
    files = [("images", BOMBS["png rgba of 16 bits"](SIDE))] * 20 + [("images", VARIANTS["png"])]

    def abuse():
        results = measured.client.post("/predict/batch", files=files).json()["results"]
        assert all("prediction" in result for result in results)

    assert measured.growth(abuse) < 2 * BYTES_PER_PIXEL * SIDE * SIDE + SLACK


CLAIMS_LITTLE = {
    "a TIFF of 1 x 1 in a tile of 200 megapixels": lambda: grey_tiff(
        1, 1, (322, 4, 1, 16_000), (323, 4, 1, 12_512), compression=8, content=zeros(16_000 * 12_512)
    ),
    "a TIFF of one row in a strip of 100,000": lambda: grey_tiff(
        2000, 1, (278, 4, 1, 100_000), compression=8, content=zeros(200 * MB)
    ),
    "a PNG of 3 megapixels in one row": lambda: png(3 * MB, 1, colour=0),
    "a PNG of 3 megapixels in one column": lambda: png(1, 3 * MB, colour=0),
    "a PNG with more pixels than it says": lambda: png(8, 8, pixels=200 * MB),
    "a WebP of the largest canvas": lambda: webp(bytes(4) + (16_382).to_bytes(3, "little") * 2),
    "a GIF of frames that outgrow it": lambda: (
        gif(1, 1, (0, 0, 1, 1))[:-1] + gif(1, 1, (0, 0, 65_535, 65_535))[13:] * 10
    ),
}


@pytest.mark.parametrize("name", CLAIMS_LITTLE)
def test_what_claims_little_and_holds_much_takes_little(measured, name):
    content = CLAIMS_LITTLE[name]()
    growth = measured.growth(lambda: require_answer_or_refusal(post(measured.client, content)))
    assert growth < SLACK
