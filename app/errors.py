"""Errors over HTTP: RFC 9457 problem+json, and the one table that maps exceptions to a status and a code.

What a request can meet; each is an `InterflowError`, whose message is meant for the client:

ImageError, ImageTooLargeError    no image, damaged, or of too many pixels (model.images)
EmptyImageError                   no bytes
TooManyBytesError                 more bytes than INTERFLOW_MAX_BYTES
MultipartError                    a multipart body that breaks its own syntax
FieldError                        a form without the one image field, or with others
MediaTypeError                    a body that is neither a form nor an image
ModelNotFoundError                no such model or version loaded
NoLayerAttentionError             `layers` asked of a network whose layers have no attention of their own
NotReadyError                     no model loaded yet
InferenceError                    the network gave no usable numbers
"""

import http
import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from app.schemas import Problem
from model.contract import InterflowError
from model.images import ImageError, ImageTooLargeError


class EmptyImageError(InterflowError):
    """An image of no bytes."""


class TooManyBytesError(InterflowError):
    """An image of more bytes than allowed; raised while it still streams in."""


class MultipartError(InterflowError):
    """A multipart body that breaks the syntax of RFC 7578."""


class FieldError(InterflowError):
    """A form that does not hold the one image field."""


class MediaTypeError(InterflowError):
    """A body of a type that holds no image."""


class ModelNotFoundError(InterflowError):
    """A model, or a version of it, that is not loaded."""


class NoLayerAttentionError(InterflowError):
    """Layer attention asked of a network that has none."""


class NotReadyError(InterflowError):
    """No model is loaded yet."""


class InferenceError(InterflowError):
    """The network failed, or gave numbers that are not finite."""


PROBLEMS: dict[type[InterflowError], tuple[int, str]] = {
    ImageTooLargeError: (413, "too_many_pixels"),
    ImageError: (400, "invalid_image"),
    EmptyImageError: (400, "empty_image"),
    TooManyBytesError: (413, "too_many_bytes"),
    MultipartError: (400, "invalid_multipart"),
    FieldError: (422, "invalid_form"),
    MediaTypeError: (415, "unsupported_media_type"),
    ModelNotFoundError: (404, "model_not_found"),
    NoLayerAttentionError: (422, "no_layer_attention"),
    NotReadyError: (503, "not_ready"),
    InferenceError: (500, "inference_failed"),
}
"""Status and stable code; a class that is not listed answers as the first listed one it derives from."""

MEDIA_TYPE = "application/problem+json"

logger = logging.getLogger(__name__)


def problem(
    request: Request, status: int, code: str, detail: str, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """One problem+json answer; the type is about:blank, so the title is the status' own phrase."""
    body = Problem(
        title=http.HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        code=code,
        request_id=request.state.request_id,
    )
    return JSONResponse(body.model_dump(), status, headers, MEDIA_TYPE)


def problem_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's `responses` for the given statuses."""
    content = {MEDIA_TYPE: {"schema": Problem.model_json_schema()}}
    return {status: {"description": http.HTTPStatus(status).phrase, "content": content} for status in statuses}


async def _ours(request: Request, error: InterflowError) -> Response:
    status, code = next((PROBLEMS[kind] for kind in type(error).__mro__ if kind in PROBLEMS), (500, "internal_error"))
    if status == 500:
        logger.error("request %s: %s", request.state.request_id, error)
    return problem(request, status, code, str(error))


async def _parameters(request: Request, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    name = repr(first["loc"][-1])[:100]
    if first["type"] == "extra_forbidden":
        return problem(request, 422, "unknown_parameter", f"{name} is not a query parameter of {request.url.path}.")
    return problem(request, 422, "invalid_parameter", f"query parameter {name}: {first['msg']}.")


async def _routing(request: Request, error: HTTPException) -> Response:
    code, detail = {
        404: ("not_found", f"nothing is at {request.url.path[:200]}; see /docs."),
        405: ("method_not_allowed", f"{request.method[:20]} is not allowed at {request.url.path[:200]}."),
    }.get(error.status_code, ("http_error", error.detail))
    return problem(request, error.status_code, code, detail, error.headers)


async def _disconnected(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=400)  # nobody reads it: the client went away while sending


HANDLERS: dict[int | type[Exception], Callable[[Request, Any], Coroutine[Any, Any, Response]]] = {
    InterflowError: _ours,
    RequestValidationError: _parameters,
    HTTPException: _routing,
    ClientDisconnect: _disconnected,
}
"""For every exception but the unexpected, which `app.middleware` answers."""
