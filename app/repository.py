"""The models that are loaded: found in the model repository on disk, held by name and version."""

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from app.errors import ModelNotFoundError, NotReadyError
from app.inference import DirectInference, Inference
from app.schemas import ModelRef, Runtime
from app.session import ModelError, Session
from app.settings import Settings
from model.contract import VERSION_PATTERN, ModelCard

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A network that can be asked, and its card."""

    card: ModelCard
    runtime: Runtime
    inference: Inference

    @property
    def ref(self) -> ModelRef:
        """What answers call it."""
        card = self.card
        return ModelRef(
            name=card.name, version=card.version, method=card.method.name, sha256=card.provenance.weights_sha256
        )


class Repository:
    """Loaded models.

    Args:
        models: each passed its warm-up.
        default: name of the model for requests that name none; without, the one exported last.
    """

    def __init__(self, models: Iterable[LoadedModel] = (), default: str | None = None) -> None:
        self.models = sorted(models, key=lambda model: (model.card.name, int(model.card.version)))
        newest = {model.card.name: model for model in self.models}  # a name's highest version comes last, and stays
        if default is None:
            self._default = max(newest.values(), key=lambda model: model.card.provenance.created, default=None)
        else:
            self._default = newest[default]

    @property
    def ready(self) -> bool:
        """At least one model can be asked."""
        return bool(self.models)

    @property
    def default(self) -> LoadedModel:
        """The model for requests that name none.

        Raises:
            NotReadyError: nothing is loaded.
        """
        if self._default is None:
            raise NotReadyError("no model is loaded yet; /readyz says when one is.")
        return self._default

    def get(self, name: str | None = None, version: str | None = None) -> LoadedModel:
        """The newest loaded version, or the given one, of the named or the default model.

        Raises:
            NotReadyError: nothing is loaded.
            ModelNotFoundError: what was asked for is not loaded.
        """
        default = self.default
        wanted = default.card.name if name is None else name
        found = [model for model in self.models if model.card.name == wanted and version in (None, model.card.version)]
        if not found:
            asked = f"model {wanted!r}" + (f", version {version!r}," if version is not None else "")
            loaded = ", ".join(f"{model.card.name} ({model.card.version})" for model in self.models)
            raise ModelNotFoundError(f"{asked} is not loaded; loaded are, with their versions: {loaded}.")
        return found[-1]

    def close(self) -> None:
        """Finish what was accepted, and free the networks' threads."""
        for model in self.models:
            model.inference.close()


def load_repository(settings: Settings) -> Repository:
    """Load and warm up the newest version of every model under the exports folder.

    Raises:
        ModelError, CardError: no model, not the default one, or one that is broken; a server that starts, starts whole.
    """
    versions = _newest_versions(settings.exports)
    if not versions:
        raise ModelError(
            f"no model is in {settings.exports}: expected <model>/<version>/model.onnx there. "
            "Export one, or set INTERFLOW_EXPORTS."
        )
    if settings.model is not None and settings.model not in versions:
        raise ModelError(f"INTERFLOW_MODEL is {settings.model!r}, but {settings.exports} holds {', '.join(versions)}.")
    sessions = [Session(folder, settings) for folder in versions.values()]
    return Repository(
        (LoadedModel(session.card, session.runtime, DirectInference(session)) for session in sessions), settings.model
    )


def _newest_versions(exports: Path) -> dict[str, Path]:
    """Folder of the highest version by model; folders that hold no version are named in the log and left out."""
    try:
        folders = sorted(path for path in exports.iterdir() if path.is_dir() and not path.name.startswith("."))
        newest = {}
        for folder in folders:
            versions = [path for path in folder.iterdir() if path.is_dir() and re.fullmatch(VERSION_PATTERN, path.name)]
            if versions:
                newest[folder.name] = max(versions, key=lambda path: int(path.name))
            else:
                logger.warning("%s holds no version (a folder named 1, 2, ...) and is left out.", folder)
    except OSError as error:
        raise ModelError(
            f"INTERFLOW_EXPORTS is {exports}, which cannot be read ({error.strerror}); expected a folder of models."
        ) from error
    return newest
