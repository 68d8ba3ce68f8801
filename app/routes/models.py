"""GET /models, /model and /model/branch-weights: what is loaded, and what it learned."""

from typing import Annotated

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from app.errors import ModelNotFoundError, problem_responses
from app.repository import Repository
from app.schemas import BranchWeights, LoadedModelSummary, ModelDescription, ModelList, StageWeights

router = APIRouter(tags=["models"])

HOW_TO_READ = (
    "The fused logit of a class is the sum over the stages of weight times the stage's raw logit. A weight is not an "
    "importance: doubling a stage's weight and halving its logits, or turning the sign of both, gives the same "
    "network. Neither size nor sign of a weight means anything by itself, and a stage of small weight may know much. "
    "To see how much a stage counts, read its importance: its mean share of the evidence in the answers. To see what "
    "it knows, read the accuracy of its reading, softmax(reading scale times raw logit). Both stay the same under such "
    "changes."
)


class ModelQuery(BaseModel):
    """Which loaded model; a parameter that does not exist is refused rather than ignored."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[str | None, Field(max_length=200, description="name; without, the default model")] = None
    version: Annotated[str | None, Field(max_length=200, description="without, the newest that is loaded")] = None


@router.get("/models", responses=problem_responses(503))
async def list_models(request: Request) -> ModelList:
    """The loaded models; one of them answers where a request names none."""
    repository: Repository = request.app.state.repository
    try:
        default = repository.default
    except ModelNotFoundError:  # the one that is set was unloaded, others were not
        default = None
    return ModelList(
        models=[
            LoadedModelSummary(**model.ref.model_dump(), classes=len(model.card.classes), default=model is default)
            for model in repository.models
        ]
    )


@router.get("/model", responses=problem_responses(404, 422, 503))
async def describe_model(request: Request, query: Annotated[ModelQuery, Query()]) -> ModelDescription:
    """A model's card, and what it runs on."""
    repository: Repository = request.app.state.repository
    model = repository.get(query.model, query.version)
    return ModelDescription(**model.card.model_dump(), runtime=model.runtime)


@router.get("/model/branch-weights", responses=problem_responses(404, 422, 503))
async def show_branch_weights(request: Request, query: Annotated[ModelQuery, Query()]) -> BranchWeights:
    """The learned weight of every stage and class, with the numbers that give it a meaning beside it."""
    repository: Repository = request.app.state.repository
    model = repository.get(query.model, query.version)
    card = model.card
    return BranchWeights(
        model=model.ref,
        method=card.method,
        shared_over_classes=card.method.attention != "class",
        stages=[
            StageWeights(
                name=stage.name,
                depth=stage.depth,
                weights=dict(zip(card.classes, card.branch_weights[branch], strict=True)),
                reading_scales=dict(zip(card.classes, card.reading_scales[branch], strict=True)),
                importance=card.branch_importance[branch],
                accuracy=card.metrics.branch_accuracy[branch],
            )
            for branch, stage in enumerate(card.stages)
        ],
        fitted_on=card.fitted_on,
        how_to_read=HOW_TO_READ,
    )
