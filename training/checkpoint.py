"""A run's state in one safetensors file: network, optimiser, random state; no pickle."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from model.contract import METADATA_KEY, InterflowError
from training import ranks
from training.files import replacing

_NETWORK, _OPTIMIZER, _RANDOM, _CUDA_RANDOM, _STATE = "network.", "optimizer.", "random.cpu", "random.cuda", "state."


@dataclass(frozen=True)
class Progress:
    """Where a run stands: `step` batches into epoch `epoch`, counted from 0, on the data of this fingerprint."""

    epoch: int
    step: int
    data: str


def save_checkpoint(
    path: Path, network: nn.Module, optimizer: Optimizer, state: Mapping[str, Tensor], progress: Progress
) -> None:
    """Write the whole state under a temporary name, then rename: a kill leaves the previous checkpoint.

    Args:
        path: ends in .safetensors.
        network: its parameters and buffers are saved.
        optimizer: over those of its parameters that are trained.
        state: what else the run carries, by name.
        progress: goes into the one metadata entry, as sorted JSON.

    Raises:
        InterflowError: it cannot be written.
    """
    tensors = {_NETWORK + name: tensor for name, tensor in network.state_dict().items()}
    for name, parameter in network.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):  # SGD has None where no momentum was asked for
                tensors[f"{_OPTIMIZER}{name}:{key}"] = value
    tensors[_RANDOM] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors[_CUDA_RANDOM] = torch.cuda.get_rng_state()
    tensors |= {_STATE + name: tensor for name, tensor in state.items()}
    metadata = {METADATA_KEY: json.dumps(asdict(progress), sort_keys=True)}
    try:
        with replacing(path) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata=metadata)
    except (SafetensorError, OSError) as error:
        raise InterflowError(
            f"{path}: the state could not be saved ({error}). What was saved before is kept. Free the disk, --resume."
        ) from error


def load_checkpoint(path: Path, network: nn.Module, optimizer: Optimizer, state: Mapping[str, Tensor]) -> Progress:
    """Put a saved state back, in place; returns where the run stood. Where several train, the first one's file.

    Raises:
        InterflowError: not a checkpoint, or one of another network.
    """
    progress, tensors = ranks.from_first(lambda: _read(path))
    _load_network(path, network, tensors)
    for name, parameter in network.named_parameters():
        prefix = f"{_OPTIMIZER}{name}:"
        for key in [key for key in tensors if key.startswith(prefix)]:
            value = tensors[key].to(parameter.device)
            if value.shape == parameter.shape:  # in the parameter's layout, as the fused optimisers expect it
                value = torch.empty_like(parameter, requires_grad=False).copy_(value)
            optimizer.state[parameter][key.removeprefix(prefix)] = value
    if missing := {_RANDOM, *(_STATE + name for name in state)} - set(tensors):
        raise InterflowError(f"{path}: not a whole checkpoint (no {', '.join(sorted(missing))}); begin a new run.")
    for name, tensor in state.items():
        tensor.copy_(tensors[_STATE + name])
    torch.set_rng_state(tensors[_RANDOM])
    if torch.cuda.is_available() and _CUDA_RANDOM in tensors:
        torch.cuda.set_rng_state(tensors[_CUDA_RANDOM])
    return progress


def load_network(path: Path, network: nn.Module) -> dict[str, Tensor]:
    """Put only the saved network's tensors back, and return them by name. Raises as `load_checkpoint`."""
    _, tensors = _read(path)
    return _load_network(path, network, tensors)


def read_progress(path: Path) -> Progress:
    """Where a saved run stands. Raises as `load_checkpoint`."""
    return _read(path)[0]


def weights_sha256(network: nn.Module) -> str:
    """Hash of the network's tensors in safetensors form, wherever they lie."""
    return hashlib.sha256(
        save({name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()})
    ).hexdigest()


def _read(path: Path) -> tuple[Progress, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            return Progress(**json.loads(metadata[METADATA_KEY])), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise InterflowError(f"{path}: not a checkpoint that can be read ({error}).") from error


def _load_network(path: Path, network: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    saved = {key.removeprefix(_NETWORK): value for key, value in tensors.items() if key.startswith(_NETWORK)}
    try:
        network.load_state_dict(saved)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise InterflowError(f"{path}: holds another network than its run's recipe describes ({reason}).") from error
    return saved
