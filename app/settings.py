"""Settings: environment variables INTERFLOW_*, read once at the start."""

import os
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from model.contract import InterflowError
from model.images import DEFAULT_MAX_PIXELS, MOST_PIXELS

PREFIX = "INTERFLOW_"


class SettingsError(InterflowError):
    """An INTERFLOW_* variable that is unknown, or whose value cannot be used."""


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


class Settings(BaseSettings):
    """What can be set; each field is the variable INTERFLOW_<FIELD>, and an empty one counts as not set."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, frozen=True)

    host: Annotated[str, Field(description="address to listen on")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="port to listen on; 0 takes a free one")] = 8000
    exports: Annotated[Path, Field(description="model repository: <model>/<version>/model.onnx")] = Path("exports")
    model: Annotated[str | None, Field(description="default model; none: the one exported last")] = None
    provider: Annotated[
        Literal["auto", "cuda", "cpu"],
        BeforeValidator(_lower),
        Field(description="auto, cuda or cpu; auto takes CUDA where it works, cuda refuses to start without"),
    ] = "auto"
    max_bytes: Annotated[int, Field(gt=0, description="bytes allowed in one encoded image")] = 10 * 2**20
    max_pixels: Annotated[
        int,
        Field(gt=0, le=MOST_PIXELS, description=f"pixels allowed in one image, at most {MOST_PIXELS} (Pillow's limit)"),
    ] = DEFAULT_MAX_PIXELS
    threads: Annotated[int, Field(ge=0, description="threads of one inference; 0: one per usable CPU")] = 0
    decode_workers: Annotated[int, Field(ge=0, description="images decoded at a time; 0: one per usable CPU")] = 0
    log_level: Annotated[
        Literal["critical", "error", "warning", "info", "debug"],
        BeforeValidator(_lower),
        Field(description="critical, error, warning, info or debug"),
    ] = "info"


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


def usable_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
