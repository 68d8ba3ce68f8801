"""How much of a network's work is done by the time a stage can answer."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from model.contract import InputSpec
from model.interflow import Interflow


class Done(NamedTuple):
    """What it takes to come so far."""

    multiplications: int
    weights: int
    """Parameters that have been read."""


def stage_work(network: Interflow, spec: InputSpec) -> tuple[float, ...]:
    """Share of the work that is done when each stage's feature map is there, 1 for the last; B values.

    Work is the mean of two shares, that of the multiplications and that of the weights read: the time of one image on a
    CPU goes by both. (Of the half-width VGG-16, multiplications 0.31, 0.61, 0.91, 1; both 0.16, 0.37, 0.72, 1; time
    0.21, 0.42, 0.73, 1, and in batches of 32 0.30, 0.53, 0.82, 1.)

    The branches themselves are left out: a linear layer each. With a top-down path before the branches (`neck`) nearly
    all is done before the first can answer.
    """
    done = stage_effort(network, spec)
    whole = Done(*(max(of_all) for of_all in zip(*done, strict=True)))
    return tuple((stage.multiplications / whole.multiplications + stage.weights / whole.weights) / 2 for stage in done)


@torch.no_grad()
def stage_effort(network: Interflow, spec: InputSpec) -> tuple[Done, ...]:
    """What is done when each stage's feature map is there, for one image; B values."""
    network.eval()
    device = next(network.parameters()).device
    image = torch.zeros(1, spec.channels, spec.height, spec.width, device=device)
    weights = {_memory(parameter): parameter.numel() for parameter in network.parameters()}
    with FlopCounterMode(display=False) as counter, _Written(counter, weights) as written:
        maps = network.features(image).maps
    return tuple(written.after[_memory(tensor)] for tensor in maps)


class _Written(TorchDispatchMode):
    """Notes of each tensor's memory what had been done when it was last written to."""

    def __init__(self, counter: FlopCounterMode, weights: dict[int, int]) -> None:
        super().__init__()
        self.after: dict[int, Done] = {}
        self._counter = counter
        self._weights = weights
        self._read: set[int] = set()
        self._held: list[Tensor] = []
        """So that no memory is used twice."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self._read |= self._weights.keys() & {_memory(tensor) for tensor in _tensors((args, kwargs))}
        if not func.is_view:
            self._held += _tensors(made)
            done = Done(self._counter.get_total_flops(), sum(self._weights[weight] for weight in self._read))
            self.after |= {_memory(tensor): done for tensor in _tensors(made)}
        return made


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
