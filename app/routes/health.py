"""GET /healthz and /readyz: for those who decide whether to restart this server, and whether to send it work."""

from fastapi import APIRouter, Request

from app import cuda
from app.errors import NotReadyError, problem_responses, require_no_draining
from app.repository import Repository
from app.schemas import Alive, Ready, ReadyModel

router = APIRouter(tags=["health"])


@router.get("/healthz")
async def is_alive() -> Alive:
    """200 while the process answers."""
    return Alive()


@router.get("/readyz", responses=problem_responses(503))
async def is_ready(request: Request) -> Ready:
    """200 once a model is loaded and has passed its warm-up, until the server is told to end or loses its GPU."""
    require_no_draining(request)
    cuda.device.require()
    repository: Repository = request.app.state.repository
    if not repository.ready:
        raise NotReadyError("no model is loaded.")
    return Ready(
        models=[
            ReadyModel(
                name=model.card.name,
                version=model.card.version,
                provider=model.runtime.provider,
                fallback=model.runtime.fallback,
            )
            for model in repository.models
        ]
    )
