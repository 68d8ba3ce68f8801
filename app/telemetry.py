"""What an answered request leaves behind: counts, its steps in its trace, the model's name in the log line."""

import time
from collections.abc import Sequence

from fastapi import Request

from app.metrics import record_answer, record_steps
from app.repository import LoadedModel
from app.schemas import Interpretation
from app.tracing import trace_steps


def record_answers(request: Request, model: LoadedModel, said: Sequence[Interpretation] = (), **ms: float) -> None:
    """Call once a request, when its last step is done.

    Args:
        request: that asked.
        model: that answered.
        said: of each image, by the model and its stages; none where only tensors were asked for.
        ms: milliseconds by step, in their order: `decode`, `queue`, `inference`, `interpret`, those that there were.
    """
    name = model.card.name
    request.state.model = f"{name}/{model.card.version}"
    record_steps(name, **ms)
    for of_image in said:
        record_answer(name, of_image)
    trace_steps(request.state.model, time.perf_counter(), **ms)
