"""The application on a cluster, by Ray Serve: `serve run app.cluster:app`, or `serve deploy deploy/serve.yaml`.

Ray starts copies of it (replicas, a process each), as many as the requests need, and its proxies, one on each node,
share the requests among them. Every replica is what `python -m app` is: the same routes, limits, errors and models.

Settings are those of whoever deploys: INTERFLOW_* in the shell of `serve run`, or in `runtime_env: env_vars:` of a
config file. They are read and checked once, and handed to the replicas; host, port and how long connections are kept
are `http_options` of Ray's.

A replica counts for itself, and /metrics is that of one on the node that is asked. With PROMETHEUS_MULTIPROC_DIR, in
the same place as the settings, all replicas of a node count in that folder, and /metrics of each node's proxy is their
sum.

Models change as on one machine: every replica follows the exports folder (INTERFLOW_POLL_S); a load or unload reaches
one of them, and the others through INTERFLOW_STATE_DIR, a folder that all nodes share; or `models` of `user_config` in
the config file names the versions, and `serve deploy` makes all replicas load them. No request fails meanwhile.
"""

import contextlib
import logging
import os
from collections.abc import Callable
from itertools import count
from math import ceil

import numpy as np
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, ValidationError

from app.cpus import usable_cpus
from app.errors import QueueFullError, first_problem
from app.logs import start_logging
from app.main import create_app
from app.manager import Manager
from app.repository import LoadedModel, Repository
from app.settings import Settings, SettingsError, load_settings, variable
from app.versions import VersionPolicy
from model.contract import LOGITS, InterflowError

PROXY_CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
# a cluster that `serve run` makes for itself starts after this, and inherits it
os.environ.setdefault(PROXY_CALLBACK, "app.cluster_proxy:middlewares")

try:
    import ray
    from ray import serve
except ImportError as error:
    raise InterflowError(
        f"{error.name} is not installed, and serving on a cluster takes it. Install the extra `cluster` "
        "(uv sync --extra cluster)."
    ) from error

ONGOING = 64
"""Requests that a replica has at a time: enough for full batches in all of its lanes. More wait at the proxies, which
give them to whichever replica is free."""
TARGET_ONGOING = 16
"""Requests for which one replica is enough; autoscaling keeps to it."""
GRACE_S = 40
"""For the requests of a replica that is told to end: more than INTERFLOW_TIMEOUT_MS, by default."""

logger = logging.getLogger(__name__)


class UserConfig(BaseModel):
    """`user_config` of the deployment: the versions to serve by model, in Triton's words; else INTERFLOW_VERSIONS."""

    model_config = ConfigDict(extra="forbid")

    models: dict[str, VersionPolicy] = {}


@serve.deployment(
    name="Interflow",
    ray_actor_options={"num_cpus": 1},
    autoscaling_config={"min_replicas": 1, "max_replicas": 10, "target_ongoing_requests": TARGET_ONGOING},
    max_ongoing_requests=ONGOING,
    max_queued_requests=Settings.model_fields["max_queue"].default,
    backpressure_config={"status_code": 429, "retry_after_s": 1},
    graceful_shutdown_timeout_s=GRACE_S,
    graceful_shutdown_wait_loop_s=0.5,
    health_check_period_s=5,
    health_check_timeout_s=30,
)
@serve.ingress()
class Replica:
    """One copy of the application.

    Args:
        settings: of the whole deployment.
        build: makes the application of a replica's own settings.
    """

    def __init__(self, settings: Settings, build: Callable[[Settings], FastAPI] = create_app) -> None:
        self._settings = own_settings(settings)
        start_logging(self._settings)
        self._app = build(self._settings)
        self._configured = False
        self._named: set[str] = set()
        """Models whose versions `user_config` says."""

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app

    async def reconfigure(self, config: object) -> None:
        """Load what `user_config` says, before the first request and whenever it changes.

        Raises:
            InterflowError: at the start; later, what cannot be loaded is logged, and what was loaded stays.
        """
        try:
            wanted = read_user_config(config)
            manager: Manager = self._app.state.manager
            no_more = dict.fromkeys(self._named - wanted.models.keys())  # INTERFLOW_VERSIONS says them again
            for name, policy in (wanted.models | no_more).items():
                await manager.run(manager.load, name, policy)
            self._named = set(wanted.models)
        except InterflowError as error:
            if not self._configured:
                raise
            logger.error("%s", error)
        self._configured = True

    async def check_health(self) -> None:
        """Ask every model that is loaded for one image; Ray replaces a replica where that fails or takes too long.

        Raises:
            InferenceError: a network gives no answers any more.
        """
        repository: Repository = self._app.state.repository
        for model in repository.models:
            await _ask(model)


async def _ask(model: LoadedModel) -> None:
    spec = model.card.input
    with contextlib.suppress(QueueFullError):  # it has enough to do
        await model.inference.infer(np.zeros((1, spec.height, spec.width, spec.channels), np.uint8), [LOGITS])


def read_user_config(config: object) -> UserConfig:
    """What `user_config` says; nothing says nothing.

    Raises:
        SettingsError: it is of another form.
    """
    try:
        return UserConfig.model_validate(config or {})
    except ValidationError as error:
        raise SettingsError(f"user_config of the deployment cannot be used{first_problem(error)}.") from error


def own_settings(settings: Settings) -> Settings:
    """One replica's: with its part of the node's CPUs, and of a GPU where it was given one."""
    context = ray.get_runtime_context()
    resources = context.get_assigned_resources()
    cpus, gpus = max(1, ceil(resources.get("CPU", 0))), resources.get("GPU", 0)
    # as of so many processes, all CPUs of the node, or memory of the GPU, are divided among them
    workers = ceil(1 / gpus) if gpus else next(number for number in count(1) if usable_cpus(number) <= cpus)
    provider = settings.provider
    if provider == "auto":
        provider = "cuda" if gpus else "cpu"
    decoders = settings.decode_workers or cpus
    # nothing is pinned beside Ray's own processes, which are busy on the same CPUs
    own = {"workers": workers, "provider": provider, "decode_workers": decoders, "pinning": False}
    return settings.model_copy(update=own)


def app(arguments: dict[str, str]) -> serve.Application:
    """For `serve run` and config files.

    Args:
        arguments: none.

    Raises:
        SettingsError: arguments, a bad INTERFLOW_* variable, or models that one replica would load and others not.
    """
    if arguments:
        name = next(iter(arguments))
        raise SettingsError(
            f"app.cluster:app takes no arguments, but {name!r} was given; set {variable(name)} instead."
        )
    settings = load_settings()
    if settings.management_key is not None and settings.state_dir is None:
        raise SettingsError(
            "INTERFLOW_MANAGEMENT_KEY is set, but a load or unload would reach one replica alone. Set "
            "INTERFLOW_STATE_DIR to a folder that all nodes share, or unset the key and name versions in `user_config`."
        )
    return Replica.bind(settings)  # type: ignore[attr-defined]  # the decorators make a deployment of it
