"""What is on disk: every version of every model, the policy that chooses among them, and what is asked of workers."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from app.errors import LoadRequestError, first_problem
from app.session import ModelError
from app.settings import SettingsError
from model.contract import CARD_FILE, MODEL_FILE, VERSION_PATTERN

Stamp = tuple[tuple[int, int, int] | None, ...]


@dataclass(frozen=True)
class Version:
    """One version of a model as it lay on disk when it was looked at: a changed file makes it another one."""

    name: str
    number: str
    folder: Path
    stamp: Stamp
    """Inode, bytes and time of change of its two files; None for a missing one."""


def find_versions(exports: Path) -> dict[str, list[Version]]:
    """Every version by model, from the oldest to the newest; a model folder that holds none has an empty list.

    Raises:
        ModelError: the folder cannot be read, or no version is in it.
    """
    try:
        folders = sorted(path for path in exports.iterdir() if path.is_dir() and not path.name.startswith("."))
        found = {folder.name: _versions_in(folder) for folder in folders}
    except OSError as error:
        raise ModelError(
            f"INTERFLOW_EXPORTS is {exports}, which cannot be read ({error.strerror}); expected a folder of models."
        ) from error
    if not any(found.values()):
        raise ModelError(
            f"no model is in {exports}: expected <model>/<version>/{MODEL_FILE} there. "
            "Export one, or set INTERFLOW_EXPORTS."
        )
    return found


def _versions_in(folder: Path) -> list[Version]:
    numbered = [path for path in folder.iterdir() if re.fullmatch(VERSION_PATTERN, path.name) and path.is_dir()]
    return [
        Version(folder.name, path.name, path, (_stamp(path / MODEL_FILE), _stamp(path / CARD_FILE)))
        for path in sorted(numbered, key=lambda path: int(path.name))
    ]


def _stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Latest(_Part):
    num_versions: Annotated[int, Field(gt=0)] = 1


class _All(_Part):
    pass


class _Specific(_Part):
    versions: Annotated[tuple[Annotated[int, Field(gt=0)], ...], Field(min_length=1)]


class VersionPolicy(_Part):
    """Which versions of a model are loaded, in the words of Triton's model configuration; one of the three is given."""

    latest: _Latest | None = None
    all: _All | None = None
    specific: _Specific | None = None

    @model_validator(mode="after")
    def _one_choice(self) -> Self:
        given = [getattr(self, name) for name in self.model_fields_set]
        if len(given) != 1 or None in given:
            raise ValueError("give one of latest, all and specific")
        return self

    def choose(self, versions: Sequence[Version]) -> list[Version]:
        """The versions to load of those there are, oldest first."""
        if self.latest is not None:
            return list(versions[-self.latest.num_versions :])
        if self.specific is not None:
            return [version for version in versions if int(version.number) in self.specific.versions]
        return list(versions)

    def missing(self, versions: Sequence[Version]) -> list[int]:
        """Numbers that it names, but that do not exist."""
        named = self.specific.versions if self.specific is not None else ()
        return sorted(set(named) - {int(version.number) for version in versions})


START_POLICIES = {"newest": VersionPolicy(latest=_Latest()), "all": VersionPolicy(all=_All())}
"""By the setting INTERFLOW_VERSIONS."""


class _Config(_Part):
    version_policy: VersionPolicy


def read_policy(config: str) -> VersionPolicy:
    """The version policy of a load request's `config`: Triton's model configuration as JSON, with nothing else in it.

    Raises:
        LoadRequestError: not that.
    """
    try:
        return _Config.model_validate_json(config).version_policy
    except ValidationError as error:
        raise LoadRequestError(
            f"the parameter `config` cannot be used{first_problem(error)}; expected JSON such as "
            '{"version_policy": {"latest": {"num_versions": 1}}}; in the place of latest, '
            '"all": {} or "specific": {"versions": [1]}. '
            "All else that a model's configuration could say is in its artefact."
        ) from error


class Request(NamedTuple):
    """The last thing that was asked for of a model."""

    serial: int
    """How many requests for it there were."""
    policy: VersionPolicy | None
    """None: unload it."""


_REQUESTS = TypeAdapter(dict[str, Request])


class Requests:
    """What the workers of a server were asked for, by model: a small JSON file, which outlives them.

    Args:
        folder: that they share; made where there is none.

    Raises:
        SettingsError: it cannot be made or written to.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "models.json"
        self._lock = folder / "models.lock"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock.touch()
        except OSError as error:
            raise SettingsError(
                f"INTERFLOW_STATE_DIR is {folder}, which cannot be written to ({error.strerror}); expected a folder."
            ) from error

    def read(self) -> dict[str, Request]:
        """The last request for each model.

        Raises:
            SettingsError: the file is not one that a worker wrote.
        """
        if not self._path.exists():
            return {}
        try:
            return _REQUESTS.validate_json(self._path.read_bytes())
        except ValidationError as error:
            raise SettingsError(
                f"{self._path} is not what a worker wrote{first_problem(error)}; remove it, and models are loaded by "
                "INTERFLOW_VERSIONS."
            ) from error

    @contextmanager
    def turn(self) -> Iterator[Callable[[str, VersionPolicy | None], Request]]:
        """One worker at a time may change what is asked for; gives the function that writes it down."""
        import fcntl  # noqa: PLC0415  # not on Windows, where a server has one worker

        with self._lock.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # closing the file gives it up
            yield self._tell

    def _tell(self, name: str, policy: VersionPolicy | None) -> Request:
        requests = self.read()
        serial = requests[name].serial + 1 if name in requests else 1
        requests[name] = Request(serial, policy)
        staged = self._path.with_suffix(".new")
        staged.write_bytes(_REQUESTS.dump_json(requests, exclude_unset=True))
        staged.replace(self._path)  # whoever reads meanwhile reads the old or the new, never half
        return requests[name]
