"""The models that are loaded: held by name and version, and swapped while requests are answered."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, partial

from app.answers import Interpreter, ReadNetwork
from app.batcher import Batcher
from app.errors import ModelNotFoundError, NotReadyError
from app.inference import Inference
from app.metrics import record_batch
from app.schemas import ModelRef, Runtime
from app.session import ModelError, Session
from app.settings import Settings
from app.versions import START_POLICIES, Request, Requests, Version, find_versions
from model.contract import ModelCard

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A network that can be asked, and its card. Who holds one can ask it, whatever is swapped meanwhile."""

    card: ModelCard
    runtime: Runtime
    inference: Inference
    origin: Version | None = None
    """The files that it was loaded from."""

    @cached_property
    def interpreter(self) -> Interpreter:
        """Reads its outputs."""
        return Interpreter(self.card)

    @cached_property
    def ref(self) -> ModelRef:
        """What answers call it."""
        card = self.card
        return ModelRef(
            name=card.name, version=card.version, method=card.method.name, sha256=card.provenance.weights_sha256
        )


class Repository:
    """Loaded models. Any thread may read; one at a time may `replace`.

    Args:
        models: each passed its warm-up.
        default: name of the model for requests that name none; without, the one exported last, those of reduced
            precision after all others.
        asked: the requests that chose them, by model.
    """

    def __init__(
        self, models: Iterable[LoadedModel] = (), default: str | None = None, asked: Mapping[str, Request] | None = None
    ) -> None:
        self.models = _in_order(models)
        self.asked = asked or {}
        self._default = default

    @property
    def ready(self) -> bool:
        """At least one model can be asked."""
        return bool(self.models)

    @property
    def default(self) -> LoadedModel:
        """The model for requests that name none.

        Raises:
            NotReadyError: nothing is loaded.
            ModelNotFoundError: the default model was unloaded, others were not.
        """
        return self.get()

    def get(self, name: str | None = None, version: str | None = None) -> LoadedModel:
        """The newest loaded version, or the given one, of the named or the default model.

        Raises:
            NotReadyError: nothing is loaded.
            ModelNotFoundError: what was asked for is not loaded.
        """
        models = self.models  # one look, for a swap may come at any moment
        if not models:
            raise NotReadyError("no model is loaded; /readyz says when one is.")
        wanted = self._default if name is None else name
        if wanted is None:
            wanted = max((model.card for model in models), key=precedence).name
        found = [model for model in models if model.card.name == wanted and version in (None, model.card.version)]
        if not found:
            asked = f"model {wanted!r}" + (f", version {version!r}," if version is not None else "")
            loaded = ", ".join(f"{model.card.name} ({model.card.version})" for model in models)
            raise ModelNotFoundError(f"{asked} is not loaded; loaded are, with their versions: {loaded}.")
        return found[-1]

    def versions(self, name: str) -> list[LoadedModel]:
        """What is loaded of one model, oldest first."""
        return [model for model in self.models if model.card.name == name]

    def replace(self, name: str, models: Iterable[LoadedModel]) -> None:
        """Put these in the place of all that is loaded of one model, in one step.

        Requests that hold an old one finish on it; an `Inference` that nobody holds any more ends by itself.
        """
        self.models = _in_order([*(model for model in self.models if model.card.name != name), *models])

    def close(self) -> None:
        """Finish what was accepted, and free the networks' threads."""
        for model in self.models:
            model.inference.close()


def precedence(card: ModelCard) -> tuple[bool, datetime]:
    """The greatest is the default: a model made of another in fewer bits stands beside that one, not in its place."""
    return card.precision == "float32", card.provenance.created


def _in_order(models: Iterable[LoadedModel]) -> tuple[LoadedModel, ...]:
    """By name, and the highest version of a name last."""
    return tuple(sorted(models, key=lambda model: (model.card.name, int(model.card.version))))


def load_model(version: Version, settings: Settings) -> LoadedModel:
    """Load one version, hold it against its card and warm it up.

    Raises:
        ModelError, CardError: it is broken.
    """
    session = Session(version.folder, settings)
    batcher = Batcher(
        ReadNetwork(session, Interpreter(session.card)),
        lanes=session.runtime.lanes,
        helpers=session.runtime.helpers,
        max_batch=session.runtime.max_batch,
        small_batch=session.runtime.small_batch,
        max_queue=settings.max_queue,
        wait_us=settings.batch_wait_us,
        niceness=session.runtime.niceness,
        on_batch=partial(record_batch, session.card.name),
    )
    return LoadedModel(session.card, session.runtime, batcher, version)


def load_repository(settings: Settings) -> Repository:
    """Load and warm up what is served from the start: the newest version of every model, or all (INTERFLOW_VERSIONS).

    What the workers were asked for of a model comes first: one that takes the place of another loads what that one had.
    A version that was asked for and is no longer there is left to the manager, which says so.

    Raises:
        ModelError, CardError: no model, not the default one, or one that is broken; a server that starts, starts whole.
        SettingsError: INTERFLOW_STATE_DIR cannot be used.
    """
    asked = {} if settings.state_dir is None else Requests(settings.state_dir).read()
    found = find_versions(settings.exports)
    for name in [name for name, versions in found.items() if not versions]:
        logger.warning("%s holds no version (a folder named 1, 2, ...) and is left out.", settings.exports / name)
        del found[name]
    if settings.model is not None and settings.model not in found:
        raise ModelError(f"INTERFLOW_MODEL is {settings.model!r}, but {settings.exports} holds {', '.join(found)}.")
    chosen, followed = [], {}
    for name, versions in found.items():
        policy = asked[name].policy if name in asked else START_POLICIES[settings.versions]
        if policy is not None:
            chosen += policy.choose(versions)
        if name in asked and (policy is None or not policy.missing(versions)):
            followed[name] = asked[name]
    return Repository([load_model(version, settings) for version in chosen], settings.model, followed)
