"""The one image of a request: a multipart field or the raw body, counted while it streams in, never on disk."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import Request
from starlette.datastructures import FormData, Headers
from starlette.formparsers import MultiPartException, MultiPartParser

from app.errors import EmptyImageError, FieldError, MediaTypeError, MultipartError, TooManyBytesError

IMAGE_FIELDS = ("image", "file")
MAX_PARTS = 20
FRAMING_BYTES = 64 * 1024
"""What boundaries and part headers may add to the image."""

_BINARY = {"schema": {"type": "string", "format": "binary"}}
REQUEST_BODY: dict[str, Any] = {
    "required": True,
    "description": "One image (JPEG, PNG, WebP, GIF, BMP, TIFF): the form field `image` or `file`, or the body itself.",
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {"image": {"type": "string", "format": "binary"}},
                "required": ["image"],
            }
        },
        "image/*": _BINARY,
        "application/octet-stream": _BINARY,
    },
}
"""OpenAPI's description of what `read_image` takes."""


async def read_image(request: Request, max_bytes: int) -> bytes:
    """Read the encoded image of a request; a body without a type is taken as the image (RFC 9110, 8.3).

    Args:
        request: its body not read yet.
        max_bytes: allowed of the image itself.

    Raises:
        TooManyBytesError: by its Content-Length, or as soon as the bytes that came exceed the limit.
        EmptyImageError, MultipartError, FieldError, MediaTypeError: as their names say.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type == "multipart/form-data":
        source = await _read_form(request, max_bytes)
    elif media_type in ("", "application/octet-stream") or media_type.startswith("image/"):
        async with aclosing(_limited(request, max_bytes, max_bytes)) as chunks:
            source = b"".join([chunk async for chunk in chunks])
    else:
        raise MediaTypeError(
            f"the body is {media_type[:100]!r}; expected multipart/form-data with a field `image`, image/* or "
            "application/octet-stream. With curl: -F image=@picture.jpg, or --data-binary @picture.jpg together with "
            "-H 'Content-Type: application/octet-stream'."
        )
    if not source:
        raise EmptyImageError("the image is empty (0 bytes). Send the bytes of a picture.")
    if len(source) > max_bytes:
        raise _too_many(max_bytes)
    return source


async def _limited(request: Request, limit: int, max_bytes: int) -> AsyncGenerator[bytes, None]:
    """The body's chunks, at most `limit` bytes of them."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise _too_many(max_bytes)
    received = 0
    async with aclosing(request.stream()) as chunks:
        async for chunk in chunks:
            received += len(chunk)
            if received > limit:
                raise _too_many(max_bytes)
            yield chunk


def _too_many(max_bytes: int) -> TooManyBytesError:
    return TooManyBytesError(
        f"the image has more than {max_bytes} bytes, the limit. Send it smaller, or raise INTERFLOW_MAX_BYTES."
    )


class _MemoryParser(MultiPartParser):
    """Keeps files in memory (images are never stored, the disk may be read-only), and asks for the closing boundary."""

    spool_max_size = 0
    complete = False

    def __init__(self, headers: Headers, chunks: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers, self._whole(chunks), max_files=MAX_PARTS, max_fields=MAX_PARTS)

    def on_end(self) -> None:
        self.complete = True

    async def _whole(self, chunks: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        async for chunk in chunks:
            yield chunk
        if not self.complete:  # raised in here, so that the parser closes the files that it opened
            raise MultiPartException("it ends before its closing boundary.")


async def _read_form(request: Request, max_bytes: int) -> bytes:
    async with aclosing(_limited(request, max_bytes + FRAMING_BYTES, max_bytes)) as chunks:
        parser = _MemoryParser(request.headers, chunks)
        try:
            form = await parser.parse()
        except MultiPartException as error:
            raise MultipartError(f"the multipart body is malformed: {error.message}") from error
        except ValueError as error:  # bytes that the client's own charset cannot decode
            raise MultipartError(f"the multipart body is malformed: {error}") from error
    try:
        return await _only_image(form)
    finally:
        await form.close()


async def _only_image(form: FormData) -> bytes:
    fields = [name[:50] for name, _ in form.multi_items()]
    if len(fields) != 1 or fields[0] not in IMAGE_FIELDS:
        raise FieldError(
            f"the form holds {', '.join(map(repr, fields)) or 'no field'}; expected one field, `image` or `file`, and "
            "parameters in the query string."
        )
    value = form[fields[0]]
    if isinstance(value, str):
        raise FieldError(
            f"the form field {fields[0]!r} is text; expected a file. With curl: -F {fields[0]}=@picture.jpg."
        )
    return await value.read()
