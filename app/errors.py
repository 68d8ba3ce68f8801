"""Errors over HTTP: RFC 9457 problem+json, and the one table that maps exceptions to a status and a code.

What a request can meet; each is an `InterflowError`, whose message is meant for the client:

ImageError, ImageTooLargeError    no image, damaged, or of too many pixels (model.images)
EmptyImageError                   no bytes
TooManyBytesError                 more bytes than INTERFLOW_MAX_BYTES, or than its answer may have
MultipartError                    a multipart body that breaks its own syntax
FieldError                        a form without the one image field, or with others
MediaTypeError                    a body that is neither a form nor an image
ModelNotFoundError                no such model or version loaded
NoLayerAttentionError             `layers` asked of a network whose layers have no attention of their own
NoExitError                       an adaptive answer asked of a network that cannot keep what is asked
QuestionError                     an explanation asked of a stage or class that the model does not have
NotReadyError                     no model loaded yet
InferenceError                    the network gave no usable numbers
DeviceMemoryError                 a batch for which the GPU's memory did not suffice; come again later
DeviceLostError                   the GPU is lost to this process; come again once another one serves
LoadRequestError                  a load request that asks for what cannot be had
LoadError                         a model that is broken, so that what was loaded stays
InferenceRequestError             a request of the Open Inference Protocol that breaks its rules or the model's
UnauthorizedError                 no key, or one that is not known, where one is needed
ManagementOffError                loading or unloading asked of a server without a management key
HeaderError                       a header of ours that holds what it cannot
QueueFullError                    too many images wait already; come again later
BodyBudgetError                   all requests together hold INTERFLOW_MAX_TOTAL_BYTES already; come again later
DeadlineError                     the request's time was up
SlowBodyError                     a body that took longer to arrive than INTERFLOW_BODY_TIMEOUT_S
DrainingError                     the server ends soon, and should get no new work
"""

import http
import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, ClassVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from app.schemas import Problem, ProtocolProblem
from model.contract import InterflowError
from model.images import ImageError, ImageTooLargeError


class EmptyImageError(InterflowError):
    """An image of no bytes."""


class TooManyBytesError(InterflowError):
    """An image of more bytes than allowed, raised while it still streams in; or an answer that would have more."""


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


class NoExitError(InterflowError):
    """An answer that may stop early, asked of a network that has no exits, or none that loses so little."""


class QuestionError(InterflowError):
    """An explanation asked of a stage or class that the model does not have."""


class NotReadyError(InterflowError):
    """No model is loaded yet."""


class InferenceError(InterflowError):
    """The network failed, or gave numbers that are not finite."""


class DeviceMemoryError(InferenceError):
    """A batch for which the GPU's memory did not suffice."""

    headers: ClassVar = {"Retry-After": "1"}  # seconds, the least that it can say


class DeviceLostError(InferenceError):
    """The GPU that a network runs on is lost to this process."""

    headers: ClassVar = DeviceMemoryError.headers


class LoadRequestError(InterflowError):
    """A request to load a model whose parameters cannot be used."""


class LoadError(InterflowError):
    """A model that was to be loaded, and is broken."""


class InferenceRequestError(InterflowError):
    """An inference request that breaks the Open Inference Protocol, or does not fit the model."""


class HeaderError(InterflowError):
    """A request header of ours with a value that cannot be used."""


class QueueFullError(InterflowError):
    """More images wait than may."""

    headers: ClassVar = {"Retry-After": "1"}  # seconds, the least that it can say; a full queue is worked off sooner


class BodyBudgetError(InterflowError):
    """The bodies of all requests together would hold more bytes than they may."""

    headers: ClassVar = QueueFullError.headers


class DeadlineError(InterflowError):
    """The time that a request allowed has passed."""

    def __init__(
        self,
        message: str = "the request's time was up before it was answered. Come again later, or allow more: the least "
        "of INTERFLOW_TIMEOUT_MS and the header X-Request-Timeout-Ms counts.",
    ) -> None:
        super().__init__(message)


class SlowBodyError(InterflowError):
    """A request whose body did not arrive in time."""

    headers: ClassVar = {"Connection": "close"}  # the rest of the body may yet come, and is no request


class DrainingError(NotReadyError):
    """A server that was told to end."""


class UnauthorizedError(InterflowError):
    """A request without a key that it needs."""

    headers: ClassVar = {"WWW-Authenticate": "Bearer"}


class ManagementOffError(InterflowError):
    """Models can be neither loaded nor unloaded: no management key is set."""


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
    NoExitError: (422, "no_exit"),
    QuestionError: (422, "invalid_question"),
    NotReadyError: (503, "not_ready"),
    InferenceError: (500, "inference_failed"),
    DeviceMemoryError: (503, "device_out_of_memory"),
    DeviceLostError: (503, "device_lost"),
    LoadRequestError: (400, "invalid_load_request"),
    LoadError: (400, "load_failed"),
    InferenceRequestError: (400, "invalid_inference_request"),
    UnauthorizedError: (401, "unauthorized"),
    ManagementOffError: (403, "management_off"),
    HeaderError: (422, "invalid_header"),
    QueueFullError: (429, "queue_full"),
    BodyBudgetError: (429, "body_budget_spent"),
    DeadlineError: (504, "deadline_passed"),
    SlowBodyError: (408, "body_timeout"),
    DrainingError: (503, "draining"),
}
"""Status and stable code; a class that is not listed answers as the first listed one it derives from."""

MEDIA_TYPE = "application/problem+json"

logger = logging.getLogger(__name__)


def problem(
    request: Request, status: int, code: str, detail: str, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """One problem+json answer; the type is about:blank, so the title is the status' own phrase.

    Below /v2, the Open Inference Protocol's form instead.
    """
    if request.scope["path"].removeprefix(request.scope.get("root_path", "")).startswith("/v2"):
        return JSONResponse({"error": detail}, status, headers)
    return JSONResponse(_body(request, status, code, detail).model_dump(), status, headers, MEDIA_TYPE)


def problem_of(request: Request, error: InterflowError) -> Problem:
    """The body that an error is answered with, for answers that hold several."""
    return _body(request, *status_and_code(error), str(error))


def _body(request: Request, status: int, code: str, detail: str) -> Problem:
    return Problem(
        title=http.HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        code=code,
        request_id=request.state.request_id,
    )


def status_and_code(error: InterflowError) -> tuple[int, str]:
    """What `PROBLEMS` says of an error."""
    return next((PROBLEMS[kind] for kind in type(error).__mro__ if kind in PROBLEMS), (500, "internal_error"))


def require_no_draining(request: Request) -> None:
    """For routes that say whether to send work here.

    Raises:
        DrainingError: the server was told to end.
    """
    if request.app.state.draining:
        raise DrainingError("the server was told to end, and takes no new work. Ask another one.")


def problem_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's `responses` for the given statuses."""
    content = {MEDIA_TYPE: {"schema": Problem.model_json_schema()}}
    return {status: {"description": http.HTTPStatus(status).phrase, "content": content} for status in statuses}


def first_problem(error: ValidationError) -> str:
    """Where a document is wrong first, and how; to be put behind what the document is."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"])[:100]
    return f" (at `{where}`: {first['msg']})" if where else f" ({first['msg']})"


def protocol_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's `responses` for the given statuses below /v2."""
    content = {"application/json": {"schema": ProtocolProblem.model_json_schema()}}
    return {status: {"description": http.HTTPStatus(status).phrase, "content": content} for status in statuses}


async def _ours(request: Request, error: InterflowError) -> Response:
    status, code = status_and_code(error)
    if status == 429:
        await request.app.state.refusals.keep(getattr(request.state, "deadline", None))
    if status == 500:
        logger.error("request %s: %s", request.state.request_id, error)
    return problem(request, status, code, str(error), getattr(error, "headers", None))


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
