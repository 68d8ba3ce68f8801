"""How much of a network's work is done by the time a stage can answer."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from model.contract import InputSpec
from model.interflow import Interflow


@torch.no_grad()
def stage_work(network: Interflow, spec: InputSpec) -> tuple[float, ...]:
    """Share of the multiplications that are done when each stage's feature map is there, 1 for the last; B values.

    Those of the branches themselves are left out: a linear layer each. With a top-down path before the branches
    (`neck`) nearly all is done before the first can answer.
    """
    network.eval()
    device = next(network.parameters()).device
    image = torch.zeros(1, spec.channels, spec.height, spec.width, device=device)
    with FlopCounterMode(display=False) as counter, _Written(counter) as written:
        maps = network.features(image).maps
    done = [written.after[_memory(tensor)] for tensor in maps]
    return tuple(count / max(done) for count in done)


class _Written(TorchDispatchMode):
    """Notes of each tensor's memory how many multiplications had been counted when it was last written to."""

    def __init__(self, counter: FlopCounterMode) -> None:
        super().__init__()
        self.after: dict[int, int] = {}
        self._counter = counter
        self._held: list[Tensor] = []
        """So that no memory is used twice."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
            self._held += tensors
            self.after |= {_memory(tensor): self._counter.get_total_flops() for tensor in tensors}
        return made


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
