"""What an answered image leaves behind: counts, its steps in the request's trace, the model's name in the log line."""

import time

from fastapi import Request

from app.metrics import record_answer, record_steps
from app.repository import LoadedModel
from app.schemas import Interpretation
from app.tracing import trace_steps


def record_image(request: Request, model: LoadedModel, said: Interpretation | None = None, **ms: float) -> None:
    """Call once the last step is done.

    Args:
        request: that asked.
        model: that answered.
        said: by the model and its stages; None where only tensors were asked for.
        ms: milliseconds by step, in their order: `decode`, `queue`, `inference`, `interpret`, those that there were.
    """
    name = model.card.name
    request.state.model = f"{name}/{model.card.version}"
    record_steps(name, **ms)
    if said is not None:
        record_answer(name, said)
    trace_steps(request.state.model, time.perf_counter(), **ms)
