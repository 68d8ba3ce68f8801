"""Settings: environment variables INTERFLOW_*, read once at the start."""

import os
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

from model.contract import InterflowError
from model.images import DEFAULT_MAX_PIXELS, MOST_PIXELS

PREFIX = "INTERFLOW_"


class SettingsError(InterflowError):
    """An INTERFLOW_* variable that is unknown, or whose value cannot be used."""


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _prefix(path: str) -> str:
    path = path.rstrip("/")
    if path and not re.fullmatch(r"(/[\w.~-]+)+", path, re.ASCII):
        raise ValueError("expected a path such as /digits, of letters, digits and . _ ~ -")
    return path


class Settings(BaseSettings):
    """What can be set; each field is the variable INTERFLOW_<FIELD>, and an empty one counts as not set."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, frozen=True)

    host: Annotated[str, Field(description="address to listen on")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="port to listen on; 0 takes a free one")] = 8000
    exports: Annotated[Path, Field(description="model repository: <model>/<version>/model.onnx")] = Path("exports")
    model: Annotated[
        str | None, Field(description="default model; none: the last exported in float32, or in any precision")
    ] = None
    versions: Annotated[
        Literal["newest", "all"],
        BeforeValidator(_lower),
        Field(description="newest or all: which versions of a model are loaded, unless a load request says"),
    ] = "newest"
    poll_s: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description="seconds between looks for new or changed models; 0: none")
    ] = 0
    provider: Annotated[
        Literal["auto", "cuda", "cpu"],
        BeforeValidator(_lower),
        Field(description="auto, cuda or cpu; auto takes CUDA where it works, cuda refuses to start without"),
    ] = "auto"
    cuda_graphs: Annotated[
        Literal["auto", "on", "off"],
        BeforeValidator(_lower),
        Field(description="auto, on or off: run batches as CUDA graphs; auto: of the sizes that are quicker so"),
    ] = "auto"
    cuda_tf32: Annotated[
        bool, Field(description="let the GPU multiply float32 with ten bits of each factor, as PyTorch's convolutions")
    ] = True
    cuda_memory: Annotated[
        int,
        Field(
            ge=0,
            description="bytes of the GPU that a model may take in all workers together, beside its inputs and outputs "
            "and CUDA's own; 0: any",
        ),
    ] = 0
    cuda_lost: Annotated[
        Literal["exit", "stay"],
        BeforeValidator(_lower),
        Field(description="exit or stay: end with status 1 when the GPU is lost, to be started anew, or be not ready"),
    ] = "exit"
    max_bytes: Annotated[int, Field(gt=0, description="bytes allowed in one encoded image")] = 10 * 2**20
    max_tensor_bytes: Annotated[
        int,
        Field(
            gt=0,
            description="bytes allowed in one inference request of /v2, inflated, in its answer's tensors, and in an "
            "answer of /predict",
        ),
    ] = 64 * 2**20
    max_json_bytes: Annotated[int, Field(gt=0, description="bytes of those of /v2 that may be JSON")] = 2**20
    max_batch_bytes: Annotated[
        int, Field(gt=0, description="bytes allowed in the images of one /predict/batch together")
    ] = 64 * 2**20
    max_total_bytes: Annotated[
        int,
        Field(
            gt=0,
            validate_default=True,
            description="bytes that the bodies of all requests of a process may hold together; more are answered 429",
        ),
    ] = 512 * 2**20
    max_pixels: Annotated[
        int,
        Field(gt=0, le=MOST_PIXELS, description=f"pixels allowed in one image, at most {MOST_PIXELS} (Pillow's limit)"),
    ] = DEFAULT_MAX_PIXELS
    timeout_ms: Annotated[
        int,
        Field(ge=0, description="milliseconds that a request may take, or less by its X-Request-Timeout-Ms; 0: any"),
    ] = 30_000
    max_queue: Annotated[
        int, Field(gt=0, description="images that may wait for the network, and for a decoder; more are answered 429")
    ] = 512
    max_batch: Annotated[
        int,
        Field(
            ge=0,
            le=4096,
            description="images that a lane runs at a time, on a CPU half of them where fewer wait; "
            "0: 16 for each of its CPUs, 8 above 64 x 64 pixels, 32 on CUDA",
        ),
    ] = 0
    batch_wait_us: Annotated[
        int, Field(ge=0, description="microseconds that images wait for others to fill their batch")
    ] = 0
    max_loss: Annotated[
        float,
        Field(ge=0, le=1, description="accuracy that `mode=adaptive` may lose, where the request does not say"),
    ] = 0.001
    lanes: Annotated[int, Field(ge=0, description="inferences at a time; 0: one per 4 usable CPUs")] = 0
    threads: Annotated[
        int,
        Field(ge=0, description="threads of an inference; 0: so many that lanes use all CPUs, of int8 all but one"),
    ] = 0
    niceness: Annotated[
        int,
        Field(
            ge=0, le=19, description="of the threads that run the network on the CPU: the rest of the server goes first"
        ),
    ] = 5
    pinning: Annotated[
        bool,
        Field(
            description="threads of an inference that is alone stay on CPUs of their own, where no quota or worker "
            "takes a part of them; False beside other busy processes"
        ),
    ] = True
    spinning: Annotated[
        bool, Field(description="threads of an inference wait for work by burning their CPU; only where it is theirs")
    ] = False
    decode_workers: Annotated[int, Field(ge=0, description="images decoded at a time; 0: one per usable CPU")] = 0
    log_level: Annotated[
        Literal["critical", "error", "warning", "info", "debug"],
        BeforeValidator(_lower),
        Field(description="critical, error, warning, info or debug"),
    ] = "info"
    log_format: Annotated[
        Literal["console", "json"], BeforeValidator(_lower), Field(description="console or json, one object a line")
    ] = "console"
    workers: Annotated[int, Field(ge=1, description="processes of `python -m app`; they share the usable CPUs")] = 1
    state_dir: Annotated[
        Path | None,
        Field(description="folder of load and unload requests, shared by workers and kept; none: a temporary one"),
    ] = None
    drain_s: Annotated[
        float, Field(ge=0, description="seconds from SIGTERM, with /readyz at 503, until the listener closes")
    ] = 0.5
    body_timeout_s: Annotated[
        float, Field(gt=0, description="seconds that a request's head, and then its body, may take to arrive")
    ] = 30
    keep_alive_s: Annotated[
        int, Field(ge=0, description="seconds that an idle connection is kept; more than those of the proxy in front")
    ] = 75
    root_path: Annotated[
        str, AfterValidator(_prefix), Field(description="path prefix under which a proxy serves this, such as /digits")
    ] = ""
    cors_origins: Annotated[
        str, Field(description="other origins whose pages may ask, separated by commas, or *; none: no page may")
    ] = ""
    api_keys: Annotated[
        SecretStr | None,
        Field(description="keys of clients, separated by commas; none here or in the file: none is needed"),
    ] = None
    api_keys_file: Annotated[Path | None, Field(description="file of more keys, one a line; read at the start")] = None
    management_key: Annotated[
        SecretStr | None, Field(description="key that loading and unloading models takes; none: both are off")
    ] = None
    tracing: Annotated[
        bool, Field(description="send OpenTelemetry spans, as the OTEL_ variables say; takes the extra `tracing`")
    ] = False

    @field_validator("max_total_bytes")
    @classmethod
    def _holds_any_request(cls, total: int, others: ValidationInfo) -> int:
        for name in ("max_bytes", "max_tensor_bytes", "max_batch_bytes"):
            if total < others.data.get(name, 0):
                raise ValueError(f"expected no less than {variable(name)}, {others.data[name]}")
        return total


def variable(field: str) -> str:
    """Name of a field's environment variable."""
    return PREFIX + field.upper()


def load_settings() -> Settings:
    """Read the settings from the environment.

    Raises:
        SettingsError: one sentence that names the first bad variable, its value and what was expected.
    """
    _refuse_unknown_variables()
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0])
        reason = first["msg"][0].lower() + first["msg"][1:]
        raise SettingsError(
            f"{variable(field)} is {first['input']!r}: {reason} ({Settings.model_fields[field].description})."
        ) from error


def _refuse_unknown_variables() -> None:
    known = [variable(field) for field in Settings.model_fields]
    given = {name.upper(): name for name in os.environ if name.upper().startswith(PREFIX)}
    if variable("service_host") in given:
        raise SettingsError(
            "INTERFLOW_SERVICE_HOST is set, as Kubernetes does for a Service called interflow, whose variables hide "
            "the settings; set `enableServiceLinks: false` in the pod."
        )
    for upper, name in sorted(given.items()):
        if upper not in known:
            closest = get_close_matches(upper, known, n=1, cutoff=0) or known
            raise SettingsError(f"{name} is not a setting; the closest is {closest[0]}. Unset or rename it.")
