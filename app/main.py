"""The application: `create_app()`, and `app` for `uvicorn app.main:app`. Importing this loads no model."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from PIL import Image

from app.bodies import BodyBudget
from app.cpus import usable_cpus
from app.decoders import Decoders
from app.errors import HANDLERS
from app.manager import Manager
from app.metrics import Gauges
from app.middleware import (
    AccessMiddleware,
    BodyMiddleware,
    CorsMiddleware,
    HeadMiddleware,
    RequestIdMiddleware,
    RootPathMiddleware,
)
from app.openapi import DocumentedApp
from app.refusals import Pace
from app.repository import Repository, load_repository
from app.routes import explain, health, metrics, models, page, predict, v2
from app.security import KeyMiddleware, load_keys
from app.settings import Settings, load_settings
from app.tracing import FASTAPI_TELEMETRY, start_tracing

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
        given = app.state.settings if settings else _configure(app, load_settings())
        app.state.repository = await asyncio.to_thread(load_repository, given) if repository is None else repository
        manager = app.state.manager = Manager(given, app.state.repository)
        await manager.run(manager.follow)  # what the other workers were asked for while this one loaded
        Image.init()  # loads Pillow's formats now, rather than in the first request that needs one
        workers = given.decode_workers or usable_cpus(given.workers)
        app.state.decoders = Decoders(workers, given.max_queue, given.max_pixels)
        sampling = asyncio.create_task(app.state.gauges.keep_sampling(app.state.repository))
        watching = asyncio.create_task(manager.watch())
        yield
        sampling.cancel()
        watching.cancel()
        manager.close()
        app.state.repository.close()
        app.state.decoders.close()
        app.state.end_tracing()

    app = DocumentedApp(
        title="Interflow",
        version="1",
        description=DESCRIPTION,
        lifespan=lifespan,
        exception_handlers=HANDLERS,
        telemetry=FASTAPI_TELEMETRY,
    )
    app.state.draining = False
    app.state.gauges = Gauges()
    app.state.refusals = Pace()
    if settings:
        _configure(app, settings)
    for middleware in (  # the first is the innermost
        HeadMiddleware,
        BodyMiddleware,
        KeyMiddleware,
        CorsMiddleware,
        RootPathMiddleware,
        RequestIdMiddleware,
        AccessMiddleware,
    ):
        app.add_middleware(middleware)
    modules = (predict, page, explain, models, v2, health, metrics)  # in the order in which they are tried
    # before the documentation's; and as they are, because FastAPI matches each request twice with an included router
    app.router.routes[:0] = [route for module in modules for route in module.router.routes]
    app.mount("/static", page.PageFiles(), name="static")
    return app


def _configure(app: FastAPI, settings: Settings) -> Settings:
    """Raises what is wrong with keys and tracing, at once where the settings are given rather than read."""
    app.state.settings = settings
    app.state.bodies = BodyBudget(settings.max_total_bytes)
    app.state.keys = load_keys(settings)
    app.state.end_tracing = start_tracing(settings)
    return settings


app = create_app()
