"""Optional OpenTelemetry tracing: one span a request, made by FastAPI, with a child for each step of an answer.

Where spans go, how many are kept and what the service is called are the standard OTEL_ variables. A traceparent header
makes the span part of the client's trace. Without INTERFLOW_TRACING the SDK is not imported.
"""

import importlib
import time
from collections.abc import Callable

from fastapi.telemetry import TelemetryConfig
from opentelemetry import trace

from app.settings import Settings, SettingsError

FASTAPI_TELEMETRY: TelemetryConfig = {
    "metrics": False,
    "logs": False,
    "operation_spans": False,
    "auto_configure": False,
}
"""Of what FastAPI can tell OpenTelemetry by itself, only the span of a request."""


def start_tracing(settings: Settings) -> Callable[[], None]:
    """Send spans if the settings ask for it; gives what sends the last ones and ends it.

    Raises:
        SettingsError: the extra `tracing` is not installed.
    """
    if not settings.tracing:
        return lambda: None
    try:
        resources = importlib.import_module("opentelemetry.sdk.resources")
        sdk = importlib.import_module("opentelemetry.sdk.trace")
        export = importlib.import_module("opentelemetry.sdk.trace.export")
        otlp = importlib.import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    except ImportError as error:
        raise SettingsError(
            f"INTERFLOW_TRACING is true, but {error.name} is not installed. Install the extra `tracing` "
            "(uv sync --extra tracing), or unset INTERFLOW_TRACING."
        ) from error
    named = resources.Resource({"service.name": "interflow"}).merge(resources.OTELResourceDetector().detect())
    provider = sdk.TracerProvider(resource=resources.Resource.create().merge(named))
    provider.add_span_processor(export.BatchSpanProcessor(otlp.OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    return provider.shutdown


def trace_steps(model: str, ended: float, **ms: float) -> None:
    """Children of the request's span, if it is recorded: the steps in their order, the last of which just ended.

    Args:
        model: name and version.
        ended: moment of `time.perf_counter` when the last step ended.
        ms: by step, milliseconds; one begins where the one before it ended.
    """
    span = trace.get_current_span()
    if not span.is_recording():
        return
    span.set_attribute("interflow.model", model)
    tracer = trace.get_tracer("interflow")
    end = time.time_ns() - int((time.perf_counter() - ended) * 1e9)
    for step, value in reversed(ms.items()):
        start = end - int(value * 1e6)
        tracer.start_span(step, start_time=start).end(end)
        end = start
