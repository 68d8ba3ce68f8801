"""Weights of a backbone from a safetensors file: all of them, or none. No pickle is ever read."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from model.contract import InterflowError

IN_CHECKPOINT = "network.backbone."
"""What the names of a backbone's tensors begin with in the checkpoint of a run (`training/checkpoint.py`)."""


def read_weights(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a safetensors file whose names begin so, by the rest of the name.

    Raises:
        InterflowError: not such a file, and how to make one.
    """
    if path.suffix != ".safetensors":
        raise InterflowError(
            f"{path}: expected a .safetensors file, because others can run code when they are read; convert one that "
            f'you trust: python -c "import torch, safetensors.torch as s; '
            f"s.save_file(torch.load('{path}', weights_only=True), '{path.with_suffix('.safetensors')}')\"."
        )
    try:
        with safe_open(path, framework="pt") as file:
            return {key.removeprefix(prefix): file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InterflowError(f"{path}: not a safetensors file that can be read ({error}).") from error


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], source: str, spare: Collection[str] = ()) -> None:
    """Put all of a module's tensors in their places, or none.

    Args:
        module: to load into.
        tensors: by the module's names.
        source: what they are, for the error: a file, and the network it is for.
        spare: names that may be there although the module has no such tensor.

    Raises:
        InterflowError: they do not fit.
    """
    expected = module.state_dict()
    if reason := misfit(expected, tensors, spare):
        raise InterflowError(f"{source}: {reason}.")
    module.load_state_dict({name: tensors[name] for name in expected if name in tensors}, strict=False)


def misfit(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], spare: Collection[str] = ()) -> str:
    """How tensors differ from the expected ones in names and shapes, the first few of them named; empty where not."""
    if expected.keys().isdisjoint(tensors):
        return f"no tensor fits; there are {few(tensors)}, and expected were {few(expected)}"
    misshapen = [
        f"{name} {list(tensors[name].shape)} instead of {list(value.shape)}"
        for name, value in expected.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    foreign = [name for name in tensors if name not in expected and name not in spare]
    found = (("missing", missing(expected, tensors)), ("misshapen", misshapen), ("of another network", foreign))
    return "; ".join(f"{what}: {few(names)}" for what, names in found if names)


def missing(expected: Iterable[str], tensors: Collection[str]) -> list[str]:
    """Names that are not there. Batch norm's counters may be: they are no weights, and old files lack them."""
    return [name for name in expected if name not in tensors and not name.endswith("num_batches_tracked")]


def few(names: Iterable[str]) -> str:
    """The first three, and how many more there are."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
