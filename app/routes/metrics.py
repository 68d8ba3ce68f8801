"""GET /metrics: for Prometheus."""

from fastapi import APIRouter, Request
from fastapi.responses import Response

from app.metrics import exposition

router = APIRouter(tags=["metrics"])


@router.get("/metrics", response_class=Response)
def show_metrics(request: Request) -> Response:
    """Prometheus' text format, or OpenMetrics where the reader asks for it; with several workers, their sum."""
    state = request.app.state
    state.gauges.sample(state.repository)
    body, media_type = exposition(request.headers.get("accept", ""))
    return Response(body, headers={"Content-Type": media_type})
