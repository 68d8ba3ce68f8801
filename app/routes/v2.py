"""/v2: the Open Inference Protocol over HTTP, with Triton's binary tensors, classification and model repository.

`tritonclient.http` works with it unchanged. Errors have the protocol's form, {"error": "..."}.
"""

import asyncio
import time
from math import inf
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app import cuda
from app.bodies import read_body
from app.deadline import deadline_of
from app.decoders import Decoders
from app.errors import (
    InferenceRequestError,
    LoadRequestError,
    MediaTypeError,
    TooManyBytesError,
    first_problem,
    protocol_responses,
)
from app.manager import Manager
from app.oip import EXTENSIONS, InferRequest, describe_model, inflate, read_request, write_answer
from app.presence import while_connected
from app.repository import LoadedModel, Repository
from app.routes.health import is_ready
from app.schemas import IndexEntry, ProtocolLive, ProtocolModel, ProtocolModelReady, ProtocolReady, ProtocolServer
from app.security import WITH_KEY, require_management
from app.settings import Settings
from app.telemetry import record_answers
from app.versions import read_policy

JSON_LENGTH = "Inference-Header-Content-Length"
MANAGEMENT_BYTES = 64 * 1024
"""Allowed in the body of an index, load or unload request."""


class _Body(BaseModel):
    model_config = ConfigDict(strict=True)


class IndexRequest(_Body):
    """What the index is asked for."""

    ready: bool = False


class LoadParameters(_Body):
    """What a load can be told; files of a model are not taken over HTTP."""

    model_config = ConfigDict(extra="forbid")

    config: Annotated[
        str | None,
        Field(
            description="Triton's model configuration as JSON, with its version policy alone",
            examples=['{"version_policy": {"latest": {"num_versions": 1}}}'],
        ),
    ] = None


class LoadRequest(_Body):
    """How a model is loaded."""

    parameters: LoadParameters = LoadParameters()


class UnloadParameters(_Body):
    """What an unload can be told; no model depends on another here."""

    unload_dependents: bool = False


class UnloadRequest(_Body):
    """How a model is unloaded."""

    parameters: UnloadParameters = UnloadParameters()


Body = TypeVar("Body", bound=_Body)


def _body_of(model: type[BaseModel], required: bool = False, **others: Any) -> dict[str, Any]:
    """OpenAPI's description of a body that the route reads itself."""
    content = {"application/json": {"schema": _inlined(model.model_json_schema())}} | others
    return {"requestBody": {"required": required, "content": content}}


def _inlined(schema: Any, definitions: dict[str, Any] | None = None) -> Any:
    """A JSON schema without references, which would point nowhere inside of another document."""
    if isinstance(schema, list):
        return [_inlined(part, definitions) for part in schema]
    if not isinstance(schema, dict):
        return schema
    definitions = schema.get("$defs", {}) if definitions is None else definitions
    if "$ref" in schema:
        return _inlined(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {key: _inlined(part, definitions) for key, part in schema.items() if key != "$defs"}


_BINARY = {"schema": {"type": "string", "format": "binary", "description": f"JSON ({JSON_LENGTH} bytes), then tensors"}}
_TENSORS = _body_of(InferRequest, required=True, **{"application/octet-stream": _BINARY})
_ANSWERS = protocol_responses(400, 404, 413, 415, 429, 500, 503, 504) | {
    200: {"content": {"application/json": {"schema": {"type": "object"}}, "application/octet-stream": _BINARY}}
}


def _path(*names: str) -> dict[str, Any]:
    """OpenAPI's description of what a path holds, which routes of two paths read themselves."""
    return {
        "parameters": [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
    }


_MODEL, _VERSION = _path("name"), _path("name", "number")
_MANAGED = _MODEL | {"security": WITH_KEY}
_MANAGE: dict[str, Any] = {"responses": protocol_responses(400, 401, 403, 404, 413), "response_class": Response}

router = APIRouter(prefix="/v2", tags=["Open Inference Protocol"])


@router.get("")
async def describe_server(request: Request) -> ProtocolServer:
    """What this server is, and which extensions of the protocol it has."""
    return ProtocolServer(name="interflow", version=request.app.version, extensions=list(EXTENSIONS))


@router.get("/health/live")
async def is_live() -> ProtocolLive:
    """200 while the process answers."""
    return ProtocolLive()


@router.get("/health/ready", responses=protocol_responses(503))
async def is_server_ready(request: Request) -> ProtocolReady:
    """200 whenever /readyz answers so."""
    await is_ready(request)
    return ProtocolReady()


@router.get("/models/{name}", openapi_extra=_MODEL, responses=protocol_responses(404, 503))
@router.get("/models/{name}/versions/{number}", openapi_extra=_VERSION, responses=protocol_responses(404, 503))
async def show_model(request: Request) -> ProtocolModel:
    """A model's inputs and outputs, and its loaded versions."""
    repository: Repository = request.app.state.repository
    model = _model(request)
    return describe_model(model.card, [loaded.card.version for loaded in repository.versions(model.card.name)])


@router.get("/models/{name}/ready", openapi_extra=_MODEL, responses=protocol_responses(404, 503))
@router.get("/models/{name}/versions/{number}/ready", openapi_extra=_VERSION, responses=protocol_responses(404, 503))
async def is_model_ready(request: Request) -> ProtocolModelReady:
    """200 while the model is loaded, and the GPU not lost."""
    model = _model(request)
    cuda.device.require()
    return ProtocolModelReady(name=model.card.name)


@router.post("/models/{name}/infer", openapi_extra=_TENSORS | _MODEL, responses=_ANSWERS, response_class=Response)
@router.post(
    "/models/{name}/versions/{number}/infer",
    openapi_extra=_TENSORS | _VERSION,
    responses=_ANSWERS,
    response_class=Response,
)
async def infer(request: Request) -> Response:
    """Run a batch of images, given as a tensor, through a model; answers the requested outputs as tensors.

    `parameters.timeout` counts microseconds from the request's last byte.
    """
    deadline = deadline_of(request)
    settings: Settings = request.app.state.settings
    model = _model(request)
    limit = settings.max_tensor_bytes
    too_many = _too_many(limit, "Send fewer images, or raise INTERFLOW_MAX_TENSOR_BYTES.")
    body = await read_body(request, limit, too_many)
    received = time.perf_counter()
    model.inference.require_room()
    body = await _inflated(request, body, limit, deadline)
    # not in a thread: JSON would hold up the others from there as well; the limits keep that short
    ask = read_request(body, _json_bytes(request, len(body)), model.card, settings)
    if ask.timeout_s is not None:
        deadline = min(received + ask.timeout_s, deadline or inf)
    decoded = time.perf_counter()
    inferred = await while_connected(request, model.inference.infer(ask.images, ask.names, deadline))
    answer, json_bytes = write_answer(model.card, ask, inferred.outputs)
    decode_ms = 1e3 * (decoded - received)
    record_answers(request, model, decode=decode_ms, queue=inferred.queue_ms, inference=inferred.inference_ms)
    if json_bytes == len(answer):
        return Response(answer, media_type="application/json")
    return Response(answer, headers={JSON_LENGTH: str(json_bytes)}, media_type="application/octet-stream")


@router.post("/repository/index", openapi_extra=_body_of(IndexRequest), responses=protocol_responses(400, 413))
async def show_index(request: Request) -> list[IndexEntry]:
    """Every version that can be loaded, and every one that is."""
    manager: Manager = request.app.state.manager
    asked = await _read_json(request, IndexRequest)
    return await asyncio.to_thread(manager.index, asked.ready)


@router.post("/repository/models/{name}/load", openapi_extra=_body_of(LoadRequest) | _MANAGED, **_MANAGE)
async def load(request: Request) -> Response:
    """Load a model, or load it anew; answers when the new one is in the old one's place. Takes the management key.

    Without `config`: the versions that INTERFLOW_VERSIONS says; else those of its `version_policy`.
    """
    require_management(request)
    manager: Manager = request.app.state.manager
    given = (await _read_json(request, LoadRequest)).parameters
    await manager.run(
        manager.load, request.path_params["name"], None if given.config is None else read_policy(given.config)
    )
    return Response()


@router.post("/repository/models/{name}/unload", openapi_extra=_body_of(UnloadRequest) | _MANAGED, **_MANAGE)
async def unload(request: Request) -> Response:
    """Unload all versions of a model; requests that are under way are answered. Takes the management key."""
    require_management(request)
    manager: Manager = request.app.state.manager
    await _read_json(request, UnloadRequest)
    await manager.run(manager.unload, request.path_params["name"])
    return Response()


def _model(request: Request) -> LoadedModel:
    """The model, and perhaps the version, that the path names."""
    repository: Repository = request.app.state.repository
    return repository.get(request.path_params["name"], request.path_params.get("number"))


async def _read_json(request: Request, model: type[Body]) -> Body:
    """A small JSON object; no body counts as an empty one."""
    body = await read_body(request, MANAGEMENT_BYTES, _too_many(MANAGEMENT_BYTES))
    try:
        return model.model_validate_json(body or b"{}")
    except ValidationError as error:
        raise LoadRequestError(f"the body cannot be used{first_problem(error)}.") from error


def _too_many(limit: int, advice: str = "") -> TooManyBytesError:
    return TooManyBytesError(f"the body has more than {limit} bytes, the limit. {advice}".rstrip())


async def _inflated(request: Request, body: bytes, limit: int, deadline: float | None) -> bytes:
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding in ("gzip", "deflate"):
        decoders: Decoders = request.app.state.decoders
        inflated = await decoders.run(inflate, body, limit, deadline=deadline)
        request.state.held_body.grow(len(inflated) - len(body))  # which is now held instead
        return inflated
    if coding != "identity":
        raise MediaTypeError(f"the Content-Encoding is {coding[:50]!r}; expected gzip, deflate or none.")
    return body


def _json_bytes(request: Request, body_bytes: int) -> int:
    """Length of the JSON at the body's start; without a header, all of it is JSON."""
    given = request.headers.get(JSON_LENGTH, str(body_bytes))
    if not given.isdecimal() or len(given) > 19 or int(given) > body_bytes:
        raise InferenceRequestError(
            f"{JSON_LENGTH} is {given[:50]!r}; expected how many of the body's {body_bytes} bytes, from its start, are "
            "JSON."
        )
    return int(given)
