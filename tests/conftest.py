"""Fixtures that several packages' tests share."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # for the tests that ask onnxruntime itself

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def photographs() -> dict[str, Path]:
    """Real photographs that scikit-image carries, by name."""
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    return {name: folder / name for name in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "retina.jpg")}


@pytest.fixture(scope="session")
def bundled() -> Path:
    """The artefact that comes with the project."""
    return ROOT / "exports" / "digits" / "1"


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run: a narrow S3 on the digits, a few epochs."""
    from training.train import main

    out = tmp_path_factory.mktemp("runs") / "digits"
    assert main(["--epochs", "4", "--width", "0.1", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def exported(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository with that run as digits/1."""
    from training.export import main

    exports = tmp_path_factory.mktemp("exports")
    assert main(["--run", str(trained_run), "--out", str(exports)]) == 0
    return exports
