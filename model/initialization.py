"""Random initial weights; for `nn.Module.apply`. Batch norm is left as torch makes it, at 1 and 0."""

from torch import nn


def xavier(module: nn.Module) -> None:
    """Xavier for convolutions and linear layers, biases 0 (Interflow, Sec. IV-B): plain networks and heads."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def he(module: nn.Module) -> None:
    """He's normal, by fan-out, for 2-d convolutions; biases 0 (He et al. 2015, as torchvision's residual networks)."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
