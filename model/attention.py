"""The attention module that fuses the branches (Interflow, Sec. III-B)."""

import math

import torch
from torch import Tensor, nn

from model.contract import InterflowError
from model.methods import Method


class BranchAttention(nn.Module):
    """Weighted sum of the branch logits: logit_c = sum_i W_ic * z_ic, without bias (Interflow, Sec. III-B).

    The paper's "1 x n convolution" is one weight per branch, its "n x n point-wise convolution" one per branch and
    class;
    it counts 4 and 40 of them on CIFAR-10. Weights that are not learned (hard attention) are a buffer.

    Args:
        method: gives the kind of attention and the initial weights.
        branches: B; differs from `method.branches` only where the taps were chosen by hand.
        num_classes: K.

    Raises:
        InterflowError: the method's initial weights are for another number of branches.
    """

    weight: Tensor

    def __init__(self, method: Method, branches: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        columns = num_classes if method.attention == "class" else 1
        if method.initial_weights is None:
            bound = math.sqrt(3 / branches)  # Xavier for the 1 x n kernel
            weight = torch.empty(branches, columns).uniform_(-bound, bound)
        elif len(method.initial_weights) == branches:
            weight = torch.tensor(method.initial_weights).unsqueeze(1).repeat(1, columns)
        else:
            raise InterflowError(
                f"{method.name} starts from {len(method.initial_weights)} weights, but {branches} branches are tapped; "
                f"tap as many stages, or choose a method of random initial weights (S1, S3, S6, S8)."
            )
        if method.learned:
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight)

    def matrix(self) -> Tensor:
        """W, (branches, classes); weights shared by the classes are repeated."""
        return self.weight.expand(-1, self.num_classes)

    def set_matrix(self, weights: Tensor) -> None:
        """Put these in W's place, (branches, classes); equal along a row where the classes share them."""
        with torch.no_grad():
            self.weight.copy_(weights[:, : self.weight.shape[1]])

    def forward(self, branch_logits: Tensor) -> Tensor:
        """Fuse (N, branches, classes) to the logits (N, classes)."""
        return (self.weight * branch_logits).sum(dim=1)
