"""POST /predict and /predict/batch: images in, the answers and what every stage said out."""

import asyncio
import time
from collections.abc import Sequence
from functools import lru_cache
from math import inf
from typing import Annotated, Literal, NamedTuple

import numpy as np
from fastapi import APIRouter, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import to_json
from starlette.datastructures import QueryParams
from starlette.types import Receive, Scope, Send

from app.deadline import deadline_of
from app.decoders import Decoders
from app.errors import (
    EmptyImageError,
    InferenceError,
    NoExitError,
    NoLayerAttentionError,
    TooManyBytesError,
    problem_of,
    problem_responses,
)
from app.inference import Inferred, Outputs
from app.presence import while_connected
from app.repository import LoadedModel, Repository
from app.routes.models import ModelQuery
from app.schemas import Answer, BatchAnswer, Interpretation, Problem, Timing
from app.settings import Settings
from app.telemetry import record_answers
from app.upload import BATCH_REQUEST_BODY, REQUEST_BODY, read_image, read_images, require_bytes
from model.contract import InterflowError
from model.images import ImageError, Seen, read_input_and_seen


class PredictQuery(ModelQuery):
    """Parameters of /predict and /predict/batch."""

    top_k: Annotated[int, Field(ge=1, description="classes listed, best first; all where the model has fewer")] = 5
    layers: Annotated[
        bool, Field(description="say what the network's own layer attention drew on, too; 422 where it has none")
    ] = False
    explain: Annotated[
        Literal["none", "maps"],
        Field(description="maps: where in the image each stage's contributions come from, as numbers, too"),
    ] = "none"
    mode: Annotated[
        Literal["full", "adaptive"],
        Field(
            description="adaptive: an image that a stage is sure of stops there, and its answer is that stage's "
            "reading; 422 where the model has no exits, and with `layers` or `explain=maps`, which take all stages"
        ),
    ] = "full"
    max_loss: Annotated[
        float | None,
        Field(
            ge=0, le=1,
            description="of `mode=adaptive`: accuracy that may be lost against full depth; the server's setting",
        ),
    ] = None  # fmt: skip

    @field_validator("mode")
    @classmethod
    def _whole_where_all_is_asked(cls, mode: str, others: ValidationInfo) -> str:
        if mode == "adaptive" and (others.data.get("layers") or others.data.get("explain") == "maps"):
            raise ValueError("`layers` and `explain=maps` take all stages; leave either them or `adaptive` out")
        return mode

    @field_validator("max_loss")
    @classmethod
    def _comes_with_its_mode(cls, max_loss: float, others: ValidationInfo) -> float:
        if others.data.get("mode") == "full":
            raise ValueError("it is of `mode=adaptive`; give both, or neither")
        return max_loss


class QueryRoute(APIRoute):
    """A route whose endpoint takes the request and a `PredictQuery`: documented by FastAPI, called without it.

    FastAPI's own way to an endpoint, which solves dependencies and opens what they may want to close, costs a request
    a quarter of all that Python does for it.
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; what is raised, the application's handlers answer."""
        if scope["method"] not in (self.methods or ()):
            await super().handle(scope, receive, send)  # says so
            return
        request = Request(scope, receive, send)
        response = await self.endpoint(request, _query(request))
        await response(scope, receive, send)


class Decoded(NamedTuple):
    """An image as the network takes it and, where maps are wanted, what of it that shows."""

    pixels: np.ndarray
    seen: Seen | None


LONGEST_KEPT_QUERY = 256
"""Bytes; longer ones are read each time, so that they cannot fill the memory."""
INLINE_VALUES = 100_000
"""Maps of up to so many numbers are written out in the event loop, in some tenths of a millisecond."""

router = APIRouter(tags=["predict"], route_class=QueryRoute)


@router.post(
    "/predict",
    response_model=Answer,
    openapi_extra={"requestBody": REQUEST_BODY},
    responses=problem_responses(400, 404, 413, 415, 422, 429, 500, 503, 504),
)
async def predict(request: Request, query: Annotated[PredictQuery, Query()]) -> Response:
    """Classify one image, and say what each stage of the network believes and how much it counted.

    With `layers`, also what its blocks drew on, where they have attention of their own (AFI, MRLA, AFF). With
    `explain=maps`, also the exact sum over stages and positions that each fused logit is. With `mode=adaptive`, no
    deeper stage is evaluated than the image needs for a promised accuracy.
    """
    deadline = deadline_of(request)
    model = _model(request, query)
    thresholds = _thresholds(request, model, query)
    _require_answerable(request, model, query, 1)
    decoders: Decoders = request.app.state.decoders
    decoders.require_room()  # before the body is read: under a flood, most of the work is refusing
    model.inference.require_room()
    source = await read_image(request, request.app.state.settings.max_bytes)
    received = time.perf_counter()

    async def ask() -> Answer:
        image = await _decode(request, model, query, source, deadline)
        decoded = time.perf_counter()
        wanted = model.interpreter.wanted(query.layers, query.explain == "maps")
        inferred = await model.inference.infer(
            image.pixels[np.newaxis], wanted, deadline, thresholds, more_to_come=decoders.behind
        )
        said = await _interpret(request, model, query, inferred.outputs, image)
        _record(request, model, [said], [inferred], (received, decoded))
        return _answer(request, model, said, inferred, (received, decoded))

    answer = await while_connected(request, ask())
    return Response(to_json(answer), media_type="application/json")


@router.post(
    "/predict/batch",
    response_model=BatchAnswer,
    openapi_extra={"requestBody": BATCH_REQUEST_BODY},
    responses=problem_responses(400, 404, 413, 415, 422, 429, 500, 503, 504),
)
async def predict_batch(request: Request, query: Annotated[PredictQuery, Query()]) -> Response:
    """Classify several images, each as `/predict` would; where one cannot be read, its result is a problem.

    What keeps all from being answered (no such model, a full queue, the deadline) is the answer's own status.
    """
    deadline = deadline_of(request)
    model = _model(request, query)
    thresholds = _thresholds(request, model, query)
    settings: Settings = request.app.state.settings
    sources = await read_images(request, settings.max_batch_bytes, settings.max_queue)
    received = time.perf_counter()
    _require_answerable(request, model, query, len(sources))
    decoders: Decoders = request.app.state.decoders
    decoders.require_room(len(sources))
    model.inference.require_room(len(sources))

    async def decode(source: bytes) -> Decoded | InterflowError:
        try:
            require_bytes(source, settings.max_bytes)
            return await _decode(request, model, query, source, deadline, inline=False)
        except (EmptyImageError, TooManyBytesError, ImageError) as error:
            return error

    async def ask() -> Sequence[Answer | Problem]:
        decodings = await asyncio.gather(*map(decode, sources))
        decoded = time.perf_counter()
        images = [decoding for decoding in decodings if isinstance(decoding, Decoded)]
        maps = query.explain == "maps"
        wanted = model.interpreter.wanted(query.layers, maps)
        answers: list[Answer | Problem] = []
        interpretations: list[Interpretation] = []
        parts: list[Inferred] = []
        # maps of many classes are large: no more at a time than run at a time
        step = model.runtime.max_batch if maps else max(1, len(images))
        for start in range(0, len(images), step):
            part = images[start : start + step]
            pixels = np.stack([image.pixels for image in part])
            inferred = await model.inference.infer(pixels, wanted, deadline, thresholds, more_to_come=decoders.behind)
            parts.append(inferred)
            for place, image in enumerate(part):
                try:
                    said = await _interpret(request, model, query, inferred.outputs, image, place=place)
                    interpretations.append(said)
                    answers.append(_answer(request, model, said, inferred, (received, decoded)))
                except InferenceError as error:
                    answers.append(problem_of(request, error))
                await asyncio.sleep(0)  # others get their turn between two of many images
        if parts:
            _record(request, model, interpretations, parts, (received, decoded))
        own = iter(answers)
        return [next(own) if isinstance(decoding, Decoded) else problem_of(request, decoding) for decoding in decodings]

    results = list(await while_connected(request, ask()))
    return Response(to_json(BatchAnswer(results=results)), media_type="application/json")


async def _decode(
    request: Request,
    model: LoadedModel,
    query: PredictQuery,
    source: bytes,
    deadline: float | None,
    *,
    inline: bool = True,
) -> Decoded:
    """Raises as `Decoders.decode`."""
    decoders: Decoders = request.app.state.decoders
    if query.explain == "none":
        return Decoded(await decoders.decode(source, model.card.input, deadline, inline=inline), None)
    max_pixels = request.app.state.settings.max_pixels
    return Decoded(*await decoders.run(read_input_and_seen, source, model.card.input, max_pixels, deadline=deadline))


async def _interpret(
    request: Request, model: LoadedModel, query: PredictQuery, outputs: Outputs, image: Decoded, *, place: int = 0
) -> Interpretation:
    """What the network's outputs say of an image, by its place in the batch; with maps, where they are wanted."""
    interpreter = model.interpreter
    interpretation = interpreter.interpret(outputs, place, query.top_k, adaptive=query.mode == "adaptive")
    if image.seen is not None:
        arguments = (outputs, place, interpretation, image.seen)
        if interpreter.map_values <= INLINE_VALUES:
            interpretation["maps"] = interpreter.maps(*arguments)
        else:
            interpretation["maps"] = await request.app.state.decoders.run(interpreter.maps, *arguments)
    return interpretation


def _query(request: Request) -> PredictQuery:
    text: bytes = request.scope["query_string"]
    return (_read_query if len(text) <= LONGEST_KEPT_QUERY else _read_query.__wrapped__)(text)


@lru_cache(maxsize=256)  # clients ask in few ways, each of them again and again; reading one takes a tenth of a request
def _read_query(text: bytes) -> PredictQuery:
    try:
        return PredictQuery.model_validate(dict(QueryParams(text)))
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error


def _model(request: Request, query: PredictQuery) -> LoadedModel:
    repository: Repository = request.app.state.repository
    model = repository.get(query.model, query.version)
    if query.layers and not model.card.layer_attention:
        raise NoLayerAttentionError(
            f"the layers of model {model.card.name!r} have no attention of their own. Leave `layers` out, or ask for a "
            "model whose card (GET /model) lists `layer_attention`."
        )
    return model


def _require_answerable(request: Request, model: LoadedModel, query: PredictQuery, images: int) -> None:
    """Refuse what would fill the memory, before anything is computed.

    Raises:
        TooManyBytesError: the answer could have more bytes than INTERFLOW_MAX_TENSOR_BYTES.
    """
    limit = request.app.state.settings.max_tensor_bytes
    size = images * model.interpreter.answer_bytes(query.top_k, query.explain == "maps")
    if size > limit:
        raise TooManyBytesError(
            f"the answer could have {size} bytes; the limit is {limit} (INTERFLOW_MAX_TENSOR_BYTES). Send fewer images "
            "at a time, ask for a smaller `top_k`, or leave `explain=maps` out."
        )


def _thresholds(request: Request, model: LoadedModel, query: PredictQuery) -> tuple[float, ...] | None:
    """At which confidence of their readings stages stop; None where none is to."""
    if query.mode == "full":
        return None
    exits = model.card.exits
    if not exits:
        raise NoExitError(
            f"model {model.card.name!r} cannot stop early: its card (GET /model) lists no `exits`. Leave "
            "`mode=adaptive` out."
        )
    settings: Settings = request.app.state.settings
    max_loss = settings.max_loss if query.max_loss is None else query.max_loss
    kept = [policy for policy in exits if policy.max_loss <= max_loss]
    if not kept:
        raise NoExitError(
            f"max_loss {max_loss:g}: the least that model {model.card.name!r} has thresholds for is "
            f"{exits[0].max_loss:g}. Ask for that much, or leave `mode=adaptive` out."
        )
    return tuple(inf if threshold is None else threshold for threshold in kept[-1].thresholds)


def _answer(
    request: Request, model: LoadedModel, said: Interpretation, inferred: Inferred, moments: tuple[float, float]
) -> Answer:
    """The answer to one image; `moments`: when the body was read, and when it was decoded."""
    received, decoded = moments
    timing = Timing(
        decode=1e3 * (decoded - received),
        queue=inferred.queue_ms,
        inference=inferred.inference_ms,
        total=1e3 * (time.perf_counter() - received),
    )
    return Answer(request_id=request.state.request_id, model=model.ref, **said, timing_ms=timing)


def _record(
    request: Request,
    model: LoadedModel,
    said: Sequence[Interpretation],
    parts: Sequence[Inferred],
    moments: tuple[float, float],
) -> None:
    """Count a request whose images ran in parts, one after the other; `moments` as of `_answer`."""
    received, decoded = moments
    queue_ms, inference_ms = sum(part.queue_ms for part in parts), sum(part.inference_ms for part in parts)
    record_answers(
        request,
        model,
        said,
        decode=1e3 * (decoded - received),
        queue=queue_ms,
        inference=inference_ms,
        interpret=1e3 * (time.perf_counter() - decoded) - queue_ms - inference_ms,
    )
