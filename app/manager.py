"""Models come and go while others answer: load, reload and unload on request, and by what changes on disk."""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from app import memory
from app.errors import LoadError, ModelNotFoundError
from app.repository import LoadedModel, Repository, load_model
from app.schemas import IndexEntry
from app.session import ModelError
from app.settings import Settings
from app.versions import START_POLICIES, Request, Requests, Version, VersionPolicy, find_versions
from model.contract import InterflowError

SYNC_S = 0.5
"""Between two looks at what other workers were asked for."""

P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger(__name__)


class Manager:
    """Brings a repository's models to what is asked for.

    Whatever comes is loaded, held against its card and warmed up before it is swapped in, in one step; when that fails,
    all stays as it was. The methods block; all but `index` are for one thread at a time, which `run` has.

    Args:
        settings: the exports folder, how models are loaded, and the folder that the workers of one server share.
        repository: what is loaded; changed by nobody else.

    Of several workers, the one that a request reaches does it first; the others follow within `SYNC_S` and the time
    that loading takes.
    """

    def __init__(self, settings: Settings, repository: Repository) -> None:
        self._settings = settings
        self._repository = repository
        self._shared = None if settings.state_dir is None else Requests(settings.state_dir)
        self._default_policy = START_POLICIES[settings.versions]
        self._done = dict(repository.asked)  # the last request that was followed, by model
        self._failed: dict[str, int] = {}  # serial numbers of requests that could not be followed
        self._seen: set[Version] = set()  # by the last poll
        self._refused: dict[Version, str] = {}  # what polls found broken, and why
        self._complaint = ""
        self._thread = ThreadPoolExecutor(1, "manager")

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do something off the event loop, after whatever is under way; once begun, it is finished."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: work(*args, **kwargs))

    async def watch(self) -> None:
        """Follow the exports folder, if INTERFLOW_POLL_S asks for it, and the other workers, until cancelled."""
        watches = [(self.poll, self._settings.poll_s)] if self._settings.poll_s else []
        watches += [(self.follow, SYNC_S)] if self._shared is not None else []
        await asyncio.gather(*(self._repeat(look, seconds) for look, seconds in watches))

    async def _repeat(self, look: Callable[[], None], seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds)
            try:
                await self.run(look)
            except Exception:  # the next look may go better; without this, it would be the last
                logger.exception("looking for changed models failed")

    def close(self) -> None:
        """Wait for what is under way."""
        self._thread.shutdown(cancel_futures=True)

    def load(self, name: str, policy: VersionPolicy | None = None) -> None:
        """Load or reload a model: the versions of the policy, or else of INTERFLOW_VERSIONS, and no others.

        Raises:
            ModelNotFoundError: it, or a version that the policy names, is not on disk.
            LoadError: a version is broken; all stays as it was.
        """
        policy = policy or self._default_policy
        self._ask(name, policy, lambda: self._load(name, policy))

    def unload(self, name: str) -> None:
        """Unload all versions of a model; no poll brings it back.

        Raises:
            ModelNotFoundError: it is not loaded.
        """
        self._ask(name, None, lambda: self._unload(name))

    def index(self, ready: bool = False) -> list[IndexEntry]:
        """Every version on disk and every one that is loaded; with `ready`, the loaded ones alone."""
        loaded = {(model.card.name, model.card.version) for model in self._repository.models}
        entries = [IndexEntry(name=name, version=number, state="READY", reason="") for name, number in loaded]
        if not ready:
            entries += [
                IndexEntry(
                    name=name,
                    version=version.number,
                    state="UNAVAILABLE",
                    reason=self._refused.get(version, "not loaded"),
                )
                for name, versions in self._found().items()
                for version in versions
                if (name, version.number) not in loaded
            ]
        return sorted(entries, key=lambda entry: (entry.name, int(entry.version)))

    def poll(self) -> None:
        """Bring the loaded models to what is on disk, less what requests unloaded.

        A version is tried when its files are as the last poll saw them: half a copy is left alone. A broken one is
        logged once and not tried again before it changes; until then, what is loaded of it counts in its place.
        """
        found = self._found()
        if not found:
            return  # the volume is away, perhaps: the models that are loaded go on
        for name in found | {model.card.name: [] for model in self._repository.models}:
            policy = self._done[name].policy if name in self._done else self._default_policy
            if policy is not None:
                self._follow_disk(name, found.get(name, []), policy)
        self._seen = {version for versions in found.values() for version in versions}
        self._refused = {version: reason for version, reason in self._refused.items() if version in self._seen}

    def follow(self) -> None:
        """Do what other workers were asked for and this one has not done; what fails is logged once and tried again."""
        if self._shared is None:
            return
        for name, request in self._shared.read().items():
            if name in self._done and self._done[name].serial == request.serial:
                continue
            try:
                if request.policy is not None:
                    self._load(name, request.policy)
                elif self._repository.versions(name):
                    self._unload(name)
            except Exception as error:  # the other models go on, and the next look may go better
                if self._failed.get(name) != request.serial:
                    self._failed[name] = request.serial
                    logger.error(
                        "this worker could not do what all were asked for, and tries again: %s",
                        error,
                        exc_info=not isinstance(error, InterflowError),
                    )
            else:
                self._done[name] = request

    def _ask(self, name: str, policy: VersionPolicy | None, work: Callable[[], None]) -> None:
        """Do it here first, so that who asked learns of a failure; then tell the other workers."""
        if self._shared is None:
            work()
            self._done[name] = Request(0, policy)
        else:
            with self._shared.turn() as tell:
                self.follow()
                work()
                self._done[name] = tell(name, policy)

    def _load(self, name: str, policy: VersionPolicy) -> None:
        there = self._found().get(name, [])
        chosen = policy.choose(there)
        if not chosen or policy.missing(there):
            missing = "".join(f", version {number}," for number in policy.missing(there)[:1])
            raise ModelNotFoundError(
                f"model {name[:200]!r}{missing} is not in {self._settings.exports}; there are of it: "
                f"{', '.join(version.number for version in there) or 'no versions'}."
            )
        try:
            models = [load_model(version, self._settings) for version in chosen]
        except InterflowError as error:
            raise LoadError(f"{error} What was loaded stays.") from error
        self._swap(name, models)

    def _unload(self, name: str) -> None:
        if not self._repository.versions(name):
            raise ModelNotFoundError(f"model {name[:200]!r} is not loaded.")
        self._swap(name, [])

    def _follow_disk(self, name: str, there: list[Version], policy: VersionPolicy) -> None:
        loaded = {model.card.version: model for model in self._repository.versions(name)}
        origins = {number: model.origin for number, model in loaded.items()}
        # what is not settled, or broken, counts as what is loaded of it, if anything is
        usable = [
            version if version in self._seen and version not in self._refused else origins.get(version.number)
            for version in there
        ]
        chosen = policy.choose([version for version in usable if version is not None])
        if chosen == list(origins.values()):
            return
        models = []
        for version in chosen:
            if version == origins.get(version.number):
                models.append(loaded[version.number])
                continue
            try:
                models.append(load_model(version, self._settings))
            except InterflowError as error:
                self._refused[version] = str(error)
                logger.error("%s What was loaded stays.", error)
                return  # the next poll chooses without it
        self._swap(name, models)

    def _swap(self, name: str, models: list[LoadedModel]) -> None:
        self._repository.replace(name, models)
        memory.give_back()
        versions = ", ".join(model.card.version for model in models)
        logger.info("model %s: %s", name, f"loaded is now version {versions}" if versions else "unloaded")

    def _found(self) -> dict[str, list[Version]]:
        """As `find_versions`; empty, with a line in the log, when that finds nothing."""
        try:
            found, complaint = find_versions(self._settings.exports), ""
        except ModelError as error:
            found, complaint = {}, str(error)
        if complaint and complaint != self._complaint:
            logger.error("%s", complaint)
        self._complaint = complaint
        return found
