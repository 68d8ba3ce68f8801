"""The house's walls: who imports whom. Runs with torch installed and without."""

import ast
import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHARED = {"model", "model.contract", "model.explain", "model.images"}


def imported_by(statement: str) -> set[str]:
    """Modules that a fresh interpreter has after a statement."""
    code = f"{statement}; import json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_the_server_imports_no_torch_and_only_the_shared_modules():
    modules = imported_by("import app.main, app.__main__")
    assert not {"torch", "torchvision", "onnx", "safetensors", "matplotlib", "training"} & modules
    assert {name for name in modules if name.split(".")[0] == "model"} == SHARED


@pytest.mark.parametrize("package", ["app", "training"])
def test_onnxruntime_does_not_call_home(package, tmp_path):
    ask = "import onnxruntime; onnxruntime.InferenceSession('exports/digits/1/model.onnx')"
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", f"import {package}; {ask}"], cwd=ROOT, env=environment, check=True)
    assert list(tmp_path.iterdir()) == []  # where it keeps an id of the device and what it would send


def test_the_import_contracts_hold():
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


def test_the_package_of_networks_holds_a_docstring_only():
    (only,) = ast.parse((ROOT / "model" / "__init__.py").read_text()).body
    assert isinstance(only, ast.Expr)


def test_no_training_module_bears_a_librarys_name():
    # `python training/train.py` puts training/ first on the path: `import datasets` there would find ours
    taken = set(sys.stdlib_module_names) | set(metadata.packages_distributions()) - {"app", "model", "training"}
    for distribution in metadata.distributions():
        required = (re.match(r"[\w.-]+", requirement) for requirement in distribution.requires or ())
        taken |= {name.group().replace("-", "_").lower() for name in required if name}
    ours = {path.stem for path in (ROOT / "training").glob("*.py")}
    assert ours & taken == set()
