"""The application: `create_app()`, and `app` for `uvicorn app.main:app`. Importing this loads no model."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import RedirectResponse
from fastapi.staticfiles import StaticFiles
from PIL import Image

from app.errors import HANDLERS
from app.middleware import RequestIdMiddleware
from app.repository import Repository, load_repository
from app.routes import health, models, predict
from app.settings import Settings, load_settings, usable_cpus

DESCRIPTION = (
    "Image classification whose every answer is an exact sum over the network's stages: "
    "what each stage said, and how much it counted."
)


def create_app(settings: Settings | None = None, repository: Repository | None = None) -> FastAPI:
    """Build the application.

    Args:
        settings: without, read from the environment when the server starts.
        repository: models to serve, closed when the server ends; without, loaded when the server starts.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        given = load_settings() if settings is None else settings
        app.state.settings = given
        app.state.repository = await asyncio.to_thread(load_repository, given) if repository is None else repository
        Image.init()  # loads Pillow's formats now, rather than in the first request that needs one
        with ThreadPoolExecutor(given.decode_workers or usable_cpus(), "decode") as decoders:
            app.state.decoders = decoders
            yield
        app.state.repository.close()

    app = FastAPI(
        title="Interflow", version="1", description=DESCRIPTION, lifespan=lifespan, exception_handlers=HANDLERS
    )
    app.add_middleware(RequestIdMiddleware)
    for routes in (predict, models, health):
        app.include_router(routes.router)
    app.add_api_route("/", _to_docs, include_in_schema=False)
    app.mount("/static", StaticFiles(directory=Path(__file__).parent / "static"), name="static")
    return app


async def _to_docs() -> RedirectResponse:
    return RedirectResponse("docs")  # relative, so that it holds behind a path prefix


app = create_app()
