"""POST /explain: an image in, a picture of what spoke for its answer and against it out."""

import io
import math
import time
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from PIL import Image
from pydantic import Field

from app.deadline import deadline_of
from app.decoders import Decoders
from app.errors import QuestionError, problem_responses
from app.inference import Outputs
from app.presence import while_connected
from app.repository import Repository
from app.routes.models import ModelQuery
from app.schemas import Interpretation
from app.settings import Settings
from app.telemetry import record_answers
from app.upload import REQUEST_BODY, read_image
from model.contract import BRANCH_WEIGHTS, ModelCard, branch_map_name
from model.explain import contribution_maps, density, fused_map
from model.images import Seen, read_input_and_seen, read_picture
from model.panels import Question, explained, heat_map, limit_of, overlay

FUSED = "fused"
RUNNER_UP = "runner-up"
MOST_LISTED = 50
"""Names in an error."""
SIDE, PANEL_SIDE = 512, 224
MOST_PANEL_PIXELS = 1_500_000
"""Of all pictures in a panel together."""


class ExplainQuery(ModelQuery):
    """Parameters of /explain."""

    stage: Annotated[
        str, Field(max_length=200, description=f"a stage's name, or `{FUSED}`: all together; a panel has all anyway")
    ] = FUSED
    class_: Annotated[
        str | None, Field(alias="class", max_length=200, description="label or index; without, the answer's class")
    ] = None
    versus: Annotated[
        str | None,
        Field(
            max_length=200,
            description="why the class and not this one: the difference of both maps. Label, index, or "
            f"`{RUNNER_UP}`: the most confident other class",
        ),
    ] = None
    values: Annotated[
        Literal["evidence", "raw"],
        Field(description="evidence: contributions less their mean over the classes, all that a softmax sees; or raw"),
    ] = "evidence"
    style: Annotated[
        Literal["overlay", "map", "panel"],
        Field(description="the map over the image; alone; or the image, every stage's map and the fused, with numbers"),
    ] = "overlay"
    size: Annotated[
        int | None,
        Field(ge=64, le=1024, description=f"pixels of the picture's longer side; {SIDE}, in a panel {PANEL_SIDE} each"),
    ] = None


router = APIRouter(tags=["predict"])


@router.post(
    "/explain",
    response_class=Response,
    openapi_extra={"requestBody": REQUEST_BODY},
    responses=problem_responses(400, 404, 413, 415, 422, 429, 500, 503, 504)
    | {
        200: {
            "description": "The picture",
            "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}},
        }
    },
)
async def explain(request: Request, query: Annotated[ExplainQuery, Query()]) -> Response:
    """Draw where in the image the evidence for a class lies (red), and where that against it (blue).

    The maps are exact on the grid of each stage, whose cells are no pixels; between them they are interpolated. What
    the network did not see of the image is hatched. The headers X-Interflow-Class and X-Interflow-Versus name the
    class indices; X-Interflow-Sum is the number that a single map sums to, X-Interflow-Limit its strongest colour.
    """
    deadline = deadline_of(request)
    settings: Settings = request.app.state.settings
    repository: Repository = request.app.state.repository
    decoders: Decoders = request.app.state.decoders
    model = repository.get(query.model, query.version)
    stage = None if query.stage == FUSED else _stage(model.card, query.stage)
    target = None if query.class_ is None else _class(model.card, query.class_)
    versus = None if query.versus in (None, RUNNER_UP) else _class(model.card, query.versus)
    decoders.require_room()
    model.inference.require_room()
    source = await read_image(request, settings.max_bytes)
    received = time.perf_counter()

    async def ask() -> Response:
        pixels, seen = await decoders.run(
            read_input_and_seen, source, model.card.input, settings.max_pixels, deadline=deadline
        )
        decoded = time.perf_counter()
        wanted = model.interpreter.wanted(maps=True)
        inferred = await model.inference.infer(pixels[np.newaxis], wanted, deadline, more_to_come=decoders.behind)
        said = model.interpreter.interpret(inferred.outputs, 0, top_k=2)
        question = _question(said, query, target, versus)

        def draw() -> Response:
            side = query.size or (PANEL_SIDE if query.style == "panel" else SIDE)
            if query.style == "panel":
                side = min(side, math.isqrt(MOST_PANEL_PIXELS // (len(model.card.stages) + 2)))
            picture = read_picture(source, side, settings.max_pixels)
            return _draw(picture, model.card, inferred.outputs, question, seen, stage=stage, style=query.style)

        response = await decoders.run(draw, deadline=deadline)
        drawn = time.perf_counter()
        record_answers(
            request,
            model,
            [said],
            decode=1e3 * (decoded - received),
            queue=inferred.queue_ms,
            inference=inferred.inference_ms,
            draw=1e3 * (drawn - decoded) - inferred.queue_ms - inferred.inference_ms,
        )
        return response

    return await while_connected(request, ask())


def _question(said: Interpretation, query: ExplainQuery, target: int | None, versus: int | None) -> Question:
    """What is asked, now that the answer is known."""
    best, *others = (prediction["index"] for prediction in said["top_k"])
    if target is None:
        target = best
    if query.versus == RUNNER_UP:
        versus = best if target != best else others[0]
    if versus == target:
        raise QuestionError(
            f"`versus` is class {versus}, which is the one explained itself. Name another one, or `{RUNNER_UP}`."
        )
    return Question(target, versus, raw=query.values == "raw")


def _draw(
    picture: Image.Image,
    card: ModelCard,
    outputs: Outputs,
    question: Question,
    seen: Seen,
    *,
    stage: int | None,
    style: Literal["overlay", "map", "panel"],
) -> Response:
    """Blocks for some milliseconds."""
    branch_maps = [outputs[branch_map_name(branch)][0] for branch in range(len(card.stages))]
    weights = outputs[BRANCH_WEIGHTS][0]
    headers = {"X-Interflow-Class": str(question.target)}
    if question.versus is not None:
        headers["X-Interflow-Versus"] = str(question.versus)
    if style == "panel":
        image = explained(picture, card, branch_maps, weights, question, box=seen)
    else:
        maps = question.maps(contribution_maps(branch_maps, weights))
        shown = maps if stage is None else [maps[stage]]
        values = density(fused_map(shown, (picture.height, picture.width), seen), seen)
        limit = limit_of([values])
        image = heat_map(values, limit) if style == "map" else overlay(picture, values, limit)
        total = sum(float(values.sum(dtype=np.float64)) for values in shown)
        headers |= {"X-Interflow-Sum": f"{total:.6g}", "X-Interflow-Limit": f"{limit:.6g}"}
    with io.BytesIO() as file:
        image.save(file, "PNG")
        return Response(file.getvalue(), media_type="image/png", headers=headers)


def _stage(card: ModelCard, name: str) -> int:
    """Index of a stage."""
    names = [stage.name for stage in card.stages]
    if name not in names:
        raise QuestionError(
            f"model {card.name!r} has no stage {name[:100]!r}; it has {_listed(names)}, and `{FUSED}` is all together."
        )
    return names.index(name)


def _class(card: ModelCard, name: str) -> int:
    """Index of a class, by its label, or else by its index."""
    if name in card.classes:
        return card.classes.index(name)
    if name.isascii() and name.isdecimal() and int(name) < len(card.classes):
        return int(name)
    raise QuestionError(
        f"model {card.name!r} has no class {name[:100]!r}; it has {_listed(card.classes)}, or their indices 0 to "
        f"{len(card.classes) - 1}."
    )


def _listed(names: Sequence[str]) -> str:
    more = len(names) - MOST_LISTED
    return ", ".join(names[:MOST_LISTED]) + (f" and {more} more (GET /model)" if more > 0 else "")
