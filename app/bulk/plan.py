"""What a run was asked for, and `OUT/run.json`, which holds later runs to it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.bulk.addresses import AddressError, Output, is_remote
from app.errors import first_problem
from app.repository import precedence
from app.session import ModelError, read_card
from app.settings import Settings
from app.versions import find_versions
from model.contract import InterflowError, ModelCard

try:
    import fcntl
except ImportError:  # Windows: two runs at once do no harm, they only do the work twice
    fcntl = None  # type: ignore[assignment]

RUN_FILE = "run.json"
LOCK_FILE = ".lock"
WRITTEN = (RUN_FILE, "listing/listing-*", "predictions/part-*", "unreadable/part-*")
"""All files of a run in OUT, as patterns."""
FORMAT_VERSION: Literal[1] = 1


class PlanError(InterflowError):
    """A run that is not the one that was begun in its folder, or that cannot be begun there."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Model(_Part):
    """The model that answers."""

    name: str
    version: str
    sha256: str
    """Of its weights."""
    precision: str
    folder: str
    """Its artefact; may move between two runs."""


class Options(_Part):
    """What the tables depend on beside model and images."""

    top_k: int = Field(ge=1)
    part_images: int = Field(ge=1)
    """At most in a part."""
    max_bytes: int
    max_pixels: int
    cuda_tf32: bool | None = None
    """None: begun before this was written down, and held to neither."""


class Listed(_Part):
    """What the listing found."""

    images: int
    parts: int
    left_out: int
    """Files in the folders that are named as neither images nor Parquet files."""
    parquet: bool
    """The images are in Parquet files."""


class Counts(_Part):
    """What became of images: of a part, or of all."""

    predictions: int = 0
    unreadable: dict[str, int] = {}
    """By code of the reason."""
    classes: dict[str, int] = {}
    """Answers by label."""

    @property
    def images(self) -> int:
        """All of them."""
        return self.predictions + sum(self.unreadable.values())

    def plus(self, other: "Counts") -> "Counts":
        """Both together."""
        return Counts(
            predictions=self.predictions + other.predictions,
            unreadable=_sum(self.unreadable, other.unreadable),
            classes=_sum(self.classes, other.classes),
        )


def _sum(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    return {key: one.get(key, 0) + other.get(key, 0) for key in sorted({*one, *other})}


class Plan(_Part):
    """All that a part's tables follow from, with the listing."""

    format_version: Literal[1] = FORMAT_VERSION
    inputs: tuple[str, ...]
    """Absolute."""
    column: str | None
    """Of Parquet files, where one was named."""
    model: Model
    options: Options
    listed: Listed | None = None
    """None: the listing is not finished."""
    done: Counts | None = None
    """None: the run is not finished."""

    def write(self, output: Output) -> None:
        """Keep it as run.json."""
        output.write(RUN_FILE, (self.model_dump_json(indent=2) + "\n").encode())


def find_model(settings: Settings, name: str | None, version: str | None) -> ModelCard:
    """The card of the model that a server with these settings would answer with.

    Args:
        settings: exports folder and default model.
        name: None: the server's default.
        version: None: the newest.

    Raises:
        ModelError, CardError: there is none, or it is broken.
    """
    found = {model: versions for model, versions in find_versions(settings.exports).items() if versions}
    wanted = name or settings.model
    if wanted is None:
        wanted = max((read_card(versions[-1].folder) for versions in found.values()), key=precedence).name
    if wanted not in found:
        raise ModelError(f"model {wanted!r} is not in {settings.exports}, which holds {', '.join(found)}.")
    numbers = [one.number for one in found[wanted]]
    if version is not None and version not in numbers:
        raise ModelError(f"model {wanted!r} has no version {version!r}; it has {', '.join(numbers)}.")
    return read_card(settings.exports / wanted / (version or numbers[-1]))


def begin(output: Output, asked: Plan) -> Plan:
    """What was begun in this folder already, if it is what is asked, else a new run.

    Raises:
        PlanError: another run was begun there, or the folder holds something else.
    """
    begun = _begun_in(output)
    if begun is None:
        asked.write(output)
        return asked
    for what, before, now in _identity(begun, asked):
        if before != now:
            raise PlanError(
                f"{output.address} holds a run with another {what}: {_shown(before)}, where now {_shown(now)} is asked."
                " Ask for the same to go on with it, or name another folder."
            )
    return begun.model_copy(update={"model": asked.model})


def _begun_in(output: Output) -> Plan | None:
    """The run of a folder; None: there is nothing in it.

    Raises:
        PlanError: it holds something else.
    """
    file = output.open(RUN_FILE)
    if file is None:
        if names := output.names():
            raise PlanError(
                f"{output.address} holds {names[0]!r} and no {RUN_FILE}, so it is not the folder of a run. "
                "Name a folder that is empty, or that does not exist yet."
            )
        return None
    with file:
        text = file.read()
    try:
        return Plan.model_validate_json(text)
    except ValidationError as error:
        raise PlanError(
            f"{output.address}/{RUN_FILE} is not that of a run{first_problem(error)}. Name another folder."
        ) from error


def _identity(begun: Plan, asked: Plan) -> Iterator[tuple[str, object, object]]:
    yield "input", begun.inputs, asked.inputs
    yield "column", begun.column, asked.column
    for plan_part in ("model", "options"):
        before, now = (getattr(plan, plan_part).model_dump() for plan in (begun, asked))
        for key, value in before.items():
            if key != "folder" and value is not None:
                yield f"{plan_part} ({key})" if plan_part == "model" else key, value, now[key]


def _shown(value: object) -> str:
    return " ".join(value) if isinstance(value, tuple) else "none" if value is None else str(value)


@contextlib.contextmanager
def alone(output: Output) -> Iterator[None]:
    """Hold a local folder for this run, until its process ends however it ends. A store's is not held.

    Raises:
        PlanError: another run holds it, or it holds something else than a run; then nothing in it was touched.
    """
    if is_remote(output.address) or fcntl is None:
        yield
        return
    folder = Path(output.address)
    try:
        _begun_in(output)
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK_FILE).open("w")
    except OSError as error:
        raise AddressError(f"{folder}: cannot be written ({error.strerror}).") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise PlanError(f"another run works in {folder}. Wait for it, or end it.") from error
        output.sweep(WRITTEN)
        try:
            yield
        finally:
            output.sweep(WRITTEN)  # after a worker that was killed, too
