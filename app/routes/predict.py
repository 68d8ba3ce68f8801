"""POST /predict: one image in, the answer and what every stage said out."""

import asyncio
import time
from typing import Annotated

import numpy as np
from fastapi import APIRouter, Query, Request
from pydantic import Field

from app.answers import interpret
from app.errors import NoLayerAttentionError, problem_responses
from app.repository import Repository
from app.routes.models import ModelQuery
from app.schemas import Answer, Timing
from app.settings import Settings
from app.upload import REQUEST_BODY, read_image
from model.images import read_input

router = APIRouter(tags=["predict"])


class PredictQuery(ModelQuery):
    """Parameters of /predict."""

    top_k: Annotated[int, Field(ge=1, description="classes listed, best first; all where the model has fewer")] = 5
    layers: Annotated[
        bool, Field(description="say what the network's own layer attention drew on, too; 422 where it has none")
    ] = False


@router.post(
    "/predict",
    openapi_extra={"requestBody": REQUEST_BODY},
    responses=problem_responses(400, 404, 413, 415, 422, 500, 503),
)
async def predict(request: Request, query: Annotated[PredictQuery, Query()]) -> Answer:
    """Classify one image, and say what each stage of the network believes and how much it counted.

    With `layers`, also what its blocks drew on, where they have attention of their own (AFI, MRLA, AFF).
    """
    repository: Repository = request.app.state.repository
    settings: Settings = request.app.state.settings
    model = repository.get(query.model, query.version)
    if query.layers and not model.card.layer_attention:
        raise NoLayerAttentionError(
            f"the layers of model {model.card.name!r} have no attention of their own. Leave `layers` out, or ask for a "
            "model whose card (GET /model) lists `layer_attention`."
        )
    source = await read_image(request, settings.max_bytes)

    received = time.perf_counter()
    pixels = await asyncio.get_running_loop().run_in_executor(
        request.app.state.decoders, read_input, source, model.card.input, settings.max_pixels
    )
    decoded = time.perf_counter()
    inferred = await model.inference.infer(pixels[np.newaxis])
    interpretation = interpret(model.card, inferred.outputs, 0, query.top_k, query.layers)
    return Answer(
        request_id=request.state.request_id,
        model=model.ref,
        **interpretation._asdict(),
        timing_ms=Timing(
            decode=1e3 * (decoded - received),
            queue=inferred.queue_ms,
            inference=inferred.inference_ms,
            total=1e3 * (time.perf_counter() - received),
        ),
    )
