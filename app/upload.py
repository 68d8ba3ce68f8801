"""The images of a request: multipart fields or the raw body, counted while they stream in, never on disk."""

import re
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple

from fastapi import Request
from starlette.datastructures import Headers
from starlette.formparsers import MultiPartException, MultiPartParser

from app.bodies import read_body
from app.errors import EmptyImageError, FieldError, MediaTypeError, MultipartError, TooManyBytesError

IMAGE_FIELDS = ("image", "file")
BATCH_FIELD = "images"
MAX_PARTS = 20
FRAMING_BYTES = 64 * 1024
"""What boundaries and part headers may add to the images."""

_BINARY = {"schema": {"type": "string", "format": "binary"}}
REQUEST_BODY: dict[str, Any] = {
    "required": True,
    "description": "One image (JPEG, PNG, WebP, GIF, BMP, TIFF): the form field `image` or `file`, or the body itself.",
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": dict.fromkeys(IMAGE_FIELDS, _BINARY["schema"]),
                "minProperties": 1,
                "maxProperties": 1,
                "additionalProperties": False,
            }
        },
        "image/*": _BINARY,
        "application/octet-stream": _BINARY,
    },
}
"""OpenAPI's description of what `read_image` takes."""
BATCH_REQUEST_BODY: dict[str, Any] = {
    "required": True,
    "description": "Several images, each a form field `images`.",
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {
                    BATCH_FIELD: {"type": "array", "items": {"type": "string", "format": "binary"}, "minItems": 1}
                },
                "required": [BATCH_FIELD],
                "additionalProperties": False,
            }
        }
    },
}
"""OpenAPI's description of what `read_images` takes."""


async def read_image(request: Request, max_bytes: int) -> bytes:
    """Read the encoded image of a request; a body without a type is taken as the image (RFC 9110, 8.3).

    Args:
        request: its body not read yet.
        max_bytes: allowed of the image itself.

    Raises:
        TooManyBytesError: by its Content-Length, or as soon as the bytes that came exceed the limit.
        EmptyImageError, MultipartError, FieldError, MediaTypeError: as their names say.
    """
    media_type = _media_type(request)
    if media_type == "multipart/form-data":
        body = await read_body(request, max_bytes + FRAMING_BYTES, _too_many(max_bytes))
        source = _only_image(await _parts(request.headers, body, MAX_PARTS))
    elif media_type in ("", "application/octet-stream") or media_type.startswith("image/"):
        source = await read_body(request, max_bytes, _too_many(max_bytes))
    else:
        raise MediaTypeError(
            f"the body is {media_type[:100]!r}; expected multipart/form-data with a field `image`, image/* or "
            "application/octet-stream. With curl: -F image=@picture.jpg, or --data-binary @picture.jpg together with "
            "-H 'Content-Type: application/octet-stream'."
        )
    require_bytes(source, max_bytes)
    return source


async def read_images(request: Request, max_bytes: int, max_images: int) -> list[bytes]:
    """Read the encoded images of a batch as they came: some may be empty, and any as large as all may be together.

    Args:
        request: its body not read yet.
        max_bytes: allowed of all images together.
        max_images: allowed.

    Raises:
        TooManyBytesError, MultipartError, FieldError, MediaTypeError: as for one image.
    """
    media_type = _media_type(request)
    if media_type != "multipart/form-data":
        raise MediaTypeError(
            f"the body is {media_type[:100]!r}; expected multipart/form-data with fields `images`. "
            "With curl: -F images=@one.jpg -F images=@two.jpg."
        )
    too_many = TooManyBytesError(
        f"the images have more than {max_bytes} bytes together, the limit. Send fewer, or raise "
        "INTERFLOW_MAX_BATCH_BYTES."
    )
    body = await read_body(request, max_bytes + FRAMING_BYTES, too_many)
    parts = await _parts(request.headers, body, max_images)
    if not parts or any(part.field != BATCH_FIELD or not part.is_file for part in parts):
        raise FieldError(
            f"the form holds {_told(parts)}; expected files under the name `images` and nothing else, and parameters "
            "in the query string. With curl: -F images=@one.jpg -F images=@two.jpg."
        )
    return [part.content for part in parts]


def require_bytes(source: bytes, max_bytes: int) -> None:
    """Refuse an image of no bytes, or of too many.

    Raises:
        EmptyImageError, TooManyBytesError: as their names say.
    """
    if not source:
        raise EmptyImageError("the image is empty (0 bytes). Send the bytes of a picture.")
    if len(source) > max_bytes:
        raise _too_many(max_bytes)


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _too_many(max_bytes: int) -> TooManyBytesError:
    return TooManyBytesError(
        f"the image has more than {max_bytes} bytes, the limit. Send it smaller, or raise INTERFLOW_MAX_BYTES."
    )


def _only_image(parts: Sequence["Part"]) -> bytes:
    if len(parts) != 1 or parts[0].field not in IMAGE_FIELDS:
        raise FieldError(
            f"the form holds {_told(parts)}; expected one field, `image` or `file`, and parameters in the query string."
        )
    part = parts[0]
    if not part.is_file:
        raise FieldError(
            f"the form field {part.field!r} is text; expected a file. With curl: -F {part.field}=@picture.jpg."
        )
    return part.content


def _told(parts: Sequence["Part"]) -> str:
    return ", ".join(repr(part.field[:50]) for part in parts[:MAX_PARTS]) or "no field"


# Multipart bodies


class Part(NamedTuple):
    """One field of a form."""

    field: str
    content: bytes
    is_file: bool


async def _parts(headers: Headers, body: bytes, max_parts: int) -> list[Part]:
    """The fields of a form, in their order.

    Raises:
        MultipartError: it breaks the syntax, or has more than `max_parts` files or fields.
    """
    plain = plain_parts(headers.get("content-type", ""), body, max_parts)
    return await general_parts(headers, body, max_parts) if plain is None else plain


_PLAIN_TYPE = re.compile(r"multipart/form-data; ?boundary=([0-9A-Za-z_-]{1,70})")
_PLAIN_HEAD = re.compile(
    rb'\r\nContent-Disposition: form-data; name="(\w{1,50})"; filename="[^"\\%;=\x00-\x1f\x7f-\xff]{0,200}"'
    rb"(?:\r\nContent-Type: [a-z]{1,30}/[\w.+-]{1,100})?\r\n\r\n",
    re.ASCII,
)


def plain_parts(content_type: str, body: bytes, max_parts: int) -> list[Part] | None:
    """The files of a form as browsers, curl and HTTP libraries write it, 20 times as fast as `general_parts` reads it.

    Returns:
        What `general_parts` would; None of anything out of the ordinary, which is left to it.
    """
    kind = _PLAIN_TYPE.fullmatch(content_type)
    if kind is None:
        return None
    delimiter = b"\r\n--" + kind[1].encode()
    if not body.startswith(delimiter[2:]):
        return None
    parts: list[Part] = []
    position = len(delimiter) - 2
    while not body.startswith(b"--", position):
        head = _PLAIN_HEAD.match(body, position)
        if head is None or len(parts) == max_parts:
            return None
        end = body.find(delimiter, head.end())
        if end < 0:
            return None
        parts.append(Part(head[1].decode(), body[head.end() : end], True))
        position = end + len(delimiter)
    return parts if body[position + 2 :] in (b"", b"\r\n") else None


async def general_parts(headers: Headers, body: bytes, max_parts: int) -> list[Part]:
    """The fields of any form that is well-formed, by Starlette's parser. Raises as `_parts`."""
    async with aclosing(_once(body)) as chunks:
        parser = _MemoryParser(headers, chunks, max_parts)
        try:
            form = await parser.parse()
        except MultiPartException as error:
            raise MultipartError(f"the multipart body is malformed: {error.message}") from error
    try:
        return [
            Part(field, b"", False) if isinstance(value, str) else Part(field, await value.read(), True)
            for field, value in form.multi_items()
        ]
    finally:
        await form.close()


async def _once(body: bytes) -> AsyncGenerator[bytes, None]:
    yield body


class _MemoryParser(MultiPartParser):
    """Keeps files in memory (images are never stored, the disk may be read-only), and asks for the closing boundary."""

    spool_max_size = 0
    complete = False

    def __init__(self, headers: Headers, chunks: AsyncGenerator[bytes, None], max_parts: int) -> None:
        super().__init__(headers, self._whole(chunks), max_files=max_parts, max_fields=max_parts)

    def on_part_begin(self) -> None:
        self._charset = "utf-8"  # whatever the client names: Python's punycode and idna take 10 seconds a megabyte
        super().on_part_begin()

    def on_end(self) -> None:
        self.complete = True

    async def _whole(self, chunks: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        async for chunk in chunks:
            yield chunk
        if not self.complete:  # raised in here, so that the parser closes the files that it opened
            raise MultiPartException("it ends before its closing boundary.")
