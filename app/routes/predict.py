"""POST /predict and /predict/batch: images in, the answers and what every stage said out."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import Field, ValidationError
from pydantic_core import to_json

from app.deadline import deadline_of
from app.decoders import Decoders
from app.errors import (
    EmptyImageError,
    InferenceError,
    NoLayerAttentionError,
    TooManyBytesError,
    problem_of,
    problem_responses,
)
from app.inference import Inferred
from app.presence import while_connected
from app.repository import LoadedModel, Repository
from app.routes.models import ModelQuery
from app.schemas import Answer, BatchAnswer, Interpretation, Problem, Timing
from app.settings import Settings
from app.telemetry import record_image
from app.upload import BATCH_REQUEST_BODY, REQUEST_BODY, read_image, read_images, require_bytes
from model.contract import InterflowError
from model.images import ImageError


class PredictQuery(ModelQuery):
    """Parameters of /predict and /predict/batch."""

    top_k: Annotated[int, Field(ge=1, description="classes listed, best first; all where the model has fewer")] = 5
    layers: Annotated[
        bool, Field(description="say what the network's own layer attention drew on, too; 422 where it has none")
    ] = False


class QueryRoute(APIRoute):
    """A route whose endpoint takes the request and a `PredictQuery`: documented by FastAPI, called without it.

    FastAPI's own way to an endpoint costs a request a quarter of all that Python does for it.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """What answers a request."""

        async def handle(request: Request) -> Response:
            return await self.endpoint(request, _query(request))

        return handle


NO_QUERY = PredictQuery()

router = APIRouter(tags=["predict"], route_class=QueryRoute)


@router.post(
    "/predict",
    response_model=Answer,
    openapi_extra={"requestBody": REQUEST_BODY},
    responses=problem_responses(400, 404, 413, 415, 422, 429, 500, 503, 504),
)
async def predict(request: Request, query: Annotated[PredictQuery, Query()]) -> Response:
    """Classify one image, and say what each stage of the network believes and how much it counted.

    With `layers`, also what its blocks drew on, where they have attention of their own (AFI, MRLA, AFF).
    """
    deadline = deadline_of(request)
    model = _model(request, query)
    decoders: Decoders = request.app.state.decoders
    decoders.require_room()  # before the body is read: under a flood, most of the work is refusing
    model.inference.require_room()
    source = await read_image(request, request.app.state.settings.max_bytes)
    received = time.perf_counter()

    async def ask() -> tuple[float, Inferred]:
        pixels = await decoders.decode(source, model.card.input, deadline)
        decoded = time.perf_counter()
        wanted = model.interpreter.wanted(query.layers)
        return decoded, await model.inference.infer(pixels[np.newaxis], wanted, deadline)

    decoded, inferred = await while_connected(request, ask())
    interpretation = model.interpreter.interpret(inferred.outputs, 0, query.top_k)
    answer = _answer(request, model, interpretation, inferred, (received, decoded))
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
    settings: Settings = request.app.state.settings
    sources = await read_images(request, settings.max_batch_bytes, settings.max_queue)
    received = time.perf_counter()
    decoders: Decoders = request.app.state.decoders
    decoders.require_room(len(sources))
    model.inference.require_room(len(sources))

    async def decode(source: bytes) -> np.ndarray | InterflowError:
        try:
            require_bytes(source, settings.max_bytes)
            return await decoders.decode(source, model.card.input, deadline, inline=False)
        except (EmptyImageError, TooManyBytesError, ImageError) as error:
            return error

    async def ask() -> tuple[Sequence[np.ndarray | InterflowError], float, Inferred | None]:
        decodings = await asyncio.gather(*map(decode, sources))
        decoded = time.perf_counter()
        images = [decoding for decoding in decodings if isinstance(decoding, np.ndarray)]
        if not images:
            return decodings, decoded, None
        wanted = model.interpreter.wanted(query.layers)
        return decodings, decoded, await model.inference.infer(np.stack(images), wanted, deadline)

    decodings, decoded, inferred = await while_connected(request, ask())
    results: list[Answer | Problem] = []
    image = 0
    for decoding in decodings:
        if isinstance(decoding, InterflowError):
            results.append(problem_of(request, decoding))
        elif inferred is not None:
            try:
                interpretation = model.interpreter.interpret(inferred.outputs, image, query.top_k)
                results.append(_answer(request, model, interpretation, inferred, (received, decoded)))
            except InferenceError as error:
                results.append(problem_of(request, error))
            image += 1
            await asyncio.sleep(0)  # others get their turn between two of many images
    return Response(to_json(BatchAnswer(results=results)), media_type="application/json")


def _query(request: Request) -> PredictQuery:
    if not request.scope["query_string"]:
        return NO_QUERY
    try:
        return PredictQuery.model_validate(dict(request.query_params))
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


def _answer(
    request: Request,
    model: LoadedModel,
    interpretation: Interpretation,
    inferred: Inferred,
    moments: tuple[float, float],
) -> Answer:
    """The answer to one image, which is counted, too; `moments`: when the body was read, and when it was decoded."""
    received, decoded = moments
    decode_ms, total_ms = 1e3 * (decoded - received), 1e3 * (time.perf_counter() - received)
    record_image(
        request,
        model,
        interpretation,
        decode=decode_ms,
        queue=inferred.queue_ms,
        inference=inferred.inference_ms,
        interpret=total_ms - decode_ms - inferred.queue_ms - inferred.inference_ms,
    )
    return Answer(
        request_id=request.state.request_id,
        model=model.ref,
        **interpretation,
        timing_ms=Timing(decode=decode_ms, queue=inferred.queue_ms, inference=inferred.inference_ms, total=total_ms),
    )
