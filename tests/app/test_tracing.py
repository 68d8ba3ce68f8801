"""Tracing: a span a request with its steps, in the client's trace; nothing of it where it is off."""

import http.server
import subprocess
import sys
import threading
from pathlib import Path

import httpx2
import pytest

from app.settings import Settings, SettingsError
from app.tracing import start_tracing

ROOT = Path(__file__).parents[2]
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def collector():
    """An OTLP collector: its address, and the spans that came, by name."""
    trace_service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
    spans = {}

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                import gzip

                body = gzip.decompress(body)
            request = trace_service.ExportTraceServiceRequest.FromString(body)
            for resource in request.resource_spans:
                service = {one.key: one.value.string_value for one in resource.resource.attributes}["service.name"]
                for scope in resource.scope_spans:
                    spans.update({span.name: (service, span) for span in scope.spans})
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}", spans
        server.shutdown()


def test_a_request_is_a_span_with_its_steps_in_the_clients_trace(start, collector, monkeypatch):
    address, spans = collector
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
    process = start(provider="cpu", tracing="true", drain_s=0)
    served = process.stdout.readline().split(" on ")[1].split(";")[0]
    image = (ROOT / "app/static/examples/digits-7.png").read_bytes()
    answer = httpx2.post(
        f"{served}/predict", content=image, headers={"traceparent": f"00-{TRACE}-{PARENT}-01"}, trust_env=False
    )
    assert answer.status_code == 200
    process.terminate()
    process.communicate(timeout=60)  # the end sends what is left
    assert process.returncode == 0
    service, request = spans["POST /predict"]
    assert service == "interflow"
    assert (request.trace_id.hex(), request.parent_span_id.hex()) == (TRACE, PARENT)
    attributes = {one.key: one.value for one in request.attributes}
    assert attributes["http.response.status_code"].int_value == 200
    assert attributes["interflow.model"].string_value == "digits/1"
    steps = [spans[name][1] for name in ("decode", "queue", "inference", "interpret")]
    assert {step.parent_span_id for step in steps} == {request.span_id}
    moments = [moment for step in steps for moment in (step.start_time_unix_nano, step.end_time_unix_nano)]
    assert [request.start_time_unix_nano, *moments, request.end_time_unix_nano] == sorted(
        [request.start_time_unix_nano, *moments, request.end_time_unix_nano]
    )


def test_the_sdk_is_imported_only_when_it_is_asked_for():
    code = (
        "import sys, app.__main__; from app.main import create_app; from app.settings import Settings;"
        "create_app(Settings()); print([name for name in sys.modules if name.startswith('opentelemetry.sdk')])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_tracing_without_its_packages_is_explained(monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk", None)
    with pytest.raises(SettingsError, match=r"INTERFLOW_TRACING is true, but opentelemetry\.sdk.* the extra `tracing`"):
        start_tracing(Settings(tracing=True))
    start_tracing(Settings())
