"""Random initial weights."""

from torch import nn


def xavier(module: nn.Module) -> None:
    """Xavier for convolutions and linear layers, biases 0 (Interflow, Sec. IV-B); for `nn.Module.apply`.

    Batch norm is left as torch makes it, at 1 and 0.
    """
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
