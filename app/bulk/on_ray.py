"""Ray Data, where there is a cluster: its actors finish parts as a local process does. Needs the extra `cluster`.

The folder of the model, INPUT and OUT must be reachable from every node by the same addresses.
"""

import importlib
import logging
import os
import signal
from collections.abc import Generator
from typing import Any

import numpy as np

from app.bulk.addresses import Output
from app.bulk.plan import Counts, Plan
from app.bulk.scorer import Scorer
from app.settings import Settings
from model.contract import InterflowError

MOST_BLOCKS = 1000
"""Of Ray's: what a task does, and what is done again with an actor that dies; parts that are done are not."""
RETRIES = 4
"""Of a task whose actors die, by a part or with their node; each goes on where the one before it was."""


class RayError(InterflowError):
    """No Ray, or no cluster."""


class _Actor:
    """Finishes the parts of a batch of numbers."""

    def __init__(self, plan: Plan, output: Output, settings: Settings, threads: int) -> None:
        self._scorer = Scorer(plan, output, settings, threads)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list]:
        finished = [self._scorer.finish(int(part)) for part in batch["id"]]
        return {
            "counts": [counts.model_dump_json() for counts, _ in finished],
            "made": [made for _, made in finished],
        }


def score_on_ray(
    plan: Plan,
    output: Output,
    settings: Settings,
    *,
    address: str | None,
    processes: int | None,
    threads: int,
    gpus: float,
) -> Generator[tuple[Counts, bool], None, None]:
    """As `app.bulk.processes.score_here`, by actors of one CPU each.

    Args:
        plan, output, settings, threads: as there.
        address: of the cluster; None: that of RAY_ADDRESS, or one of this machine, started for this.
        processes: most actors; None: as many as the cluster has CPUs for.
        gpus: that an actor takes, or which share of one.

    Raises:
        RayError: not installed, or no cluster at that address.
        InterflowError: as `Scorer`.
    """
    assert plan.listed is not None, "the listing is finished"  # noqa: S101 - whoever asks listed it
    # under `uv run` Ray would start every actor by it, too, in a copy of this folder and with an environment of its own
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    try:
        ray = importlib.import_module("ray")
        data = importlib.import_module("ray.data")
    except ImportError as error:
        raise RayError(
            f"--ray takes {error.name}, which is not installed. Install the extra `cluster` (uv sync --extra cluster)."
        ) from error
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(address, log_to_driver=False, logging_level="warning", ignore_reinit_error=True)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise RayError(f"no Ray cluster answers at {address or 'RAY_ADDRESS'} ({error}).") from error
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    data.DataContext.get_current().enable_progress_bars = False  # ours counts images
    for number, handler in handlers.items():
        signal.signal(number, handler)  # Ray put its own there
    own = {
        "api_keys": None,
        "management_key": None,
        "provider": settings.provider if gpus else "cpu",
        "workers": max(1, int(1 / gpus)) if gpus else 1,
    }
    most = processes or max(1, int(ray.cluster_resources().get("CPU", 1)))
    options: dict[str, Any] = {"num_gpus": gpus} if gpus else {}
    parts = data.range(plan.listed.parts, override_num_blocks=min(plan.listed.parts, MOST_BLOCKS))
    finished = parts.map_batches(
        _Actor,
        batch_size=1,
        fn_constructor_args=(plan, output, settings.model_copy(update=own), threads),
        compute=data.ActorPoolStrategy(min_size=1, max_size=min(most, plan.listed.parts)),
        num_cpus=1,
        max_task_retries=RETRIES,
        **options,
    )
    try:
        for row in finished.iter_rows():
            yield Counts.model_validate_json(row["counts"]), bool(row["made"])
    except ray.exceptions.RayError as error:
        raise _refusal(error) from error
    finally:
        ray.shutdown()


def _refusal(error: BaseException) -> InterflowError:
    """What went wrong in an actor, without Ray's traceback."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, InterflowError):
            return cause
        cause = getattr(cause, "cause", None) or cause.__cause__
    return RayError(f"Ray could not finish: {str(error).strip().splitlines()[-1]}")
