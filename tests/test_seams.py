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
SHARED = {
    "model",
    "model.contract",
    "model.cpu",
    "model.cut",
    "model.explain",
    "model.images",
    "model.jpeg",
    "model.panels",
}
PICKLERS = {"_pickle", "cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}


def imported_by(statement: str) -> set[str]:
    """Modules that a fresh interpreter has after a statement."""
    code = f"{statement}; import json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_the_server_imports_no_torch_and_only_the_shared_modules():
    modules = imported_by("import app.main, app.__main__")
    assert not {"torch", "torchvision", "safetensors", "matplotlib", "training"} & modules
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


def pickling(source: str) -> list[str]:
    """What in a module could read or write a pickle, and with it run whatever somebody put there."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found += [alias.name for alias in names if alias.name.split(".")[0] in PICKLERS]
            case ast.ImportFrom(module=str(module), names=names):
                found += [module] if module.split(".")[0] in PICKLERS else []
                found += [
                    f"torch.{alias.name}" for alias in names if module == "torch" and alias.name in ("load", "save")
                ]
            case ast.Attribute(value=ast.Name(id="torch"), attr="load" | "save"):
                found.append(f"torch.{node.attr}")
            case ast.keyword(arg="allow_pickle", value=value) if not isinstance(value, ast.Constant) or value.value:
                found.append("allow_pickle")
    return found


@pytest.mark.parametrize("package", ["app", "benchmarks", "model", "training"])
def test_nothing_is_pickled(package):
    modules = {path: pickling(path.read_text(encoding="utf-8")) for path in (ROOT / package).rglob("*.py")}
    assert modules
    assert {path: found for path, found in modules.items() if found} == {}


@pytest.mark.parametrize(
    "source",
    [
        "def read(file):\n    import pickle",
        "import numpy, joblib.externals as externals",
        "from pickle import loads",
        "from torch import Tensor, load",
        "weights = torch.load(path, weights_only=True)",
        "restore = torch.load",
        "numpy.load(path, allow_pickle=True)",
        "numpy.load(path, allow_pickle=trusted)",
    ],
)
def test_a_pickle_would_be_seen(source):
    assert len(pickling(source)) == 1
    assert pickling("import json; from torch import Tensor; numpy.load(path, allow_pickle=False)") == []
