"""Golden files: what our modules compute from the inputs and parameters that a file holds.

The form of a file is in its `meta`. A file says by its arrays which module it describes, not by its name.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model.backbones.afi import AFISettings, Feature, FirstLayer, Integrate
from model.backbones.chain import Memory
from model.backbones.resnet import BaseRetrieval, LightRetrieval, ResidualBlock
from model.layers.aff import AFF, IAFF, MSCAM, MultiScaleAttention
from model.layers.afi import AFI
from model.layers.convolution import conv_bn
from model.layers.mrla import KeyValue, MRLABase, MRLALight, Projections

# Of the files: their values are float64 rounded to float32.
TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}


class Golden:
    """A file that is being computed: what is taken from it is input or parameter, what is left is what must come out.

    Attributes:
        hyper: hyper-parameters; sizes are read off the arrays wherever they show there.
        left: arrays that nobody has taken.
        computed: ours, by the file's names.
    """

    def __init__(self, path: str | Path, dtype: torch.dtype) -> None:
        with np.load(path) as file:
            self.left = {name: file[name] for name in file.files}
        meta = json.loads(self.left.pop("meta").item())
        self.path, self.module, self.hyper = path, meta.get("module"), meta.get("hyper", {})
        self.dtype = dtype
        self.computed: dict[str, Tensor] = {}
        self._inputs: dict[str, Tensor] = {}
        self._statistics: dict[str, Tensor] = {}
        self._cotangent = self.take("cotangent") if "cotangent" in self.left else None

    def size(self, name: str, axis: int) -> int:
        return self.left[name].shape[axis]

    def take(self, name: str) -> Tensor:
        return torch.from_numpy(self.left.pop(name)).to(self.dtype)

    def inputs(self, *names: str) -> list[Tensor]:
        self._inputs |= {name: self.take(name).requires_grad_() for name in names}
        return [self._inputs[name] for name in names]

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Parameters and running statistics, by the file's names."""
        for name, tensor in tensors.items():
            tensor.detach().copy_(self.take(name).view_as(tensor))
        self._statistics |= {name: tensor for name, tensor in tensors.items() if "_running_" in name}

    def modes(self, *modules: nn.Module) -> Iterator[str]:
        """Each mode that the file has values of, with the modules in it; a training step comes last."""
        for mode in ("eval", "train"):
            if any(mode in name for name in self.left):
                for module in modules:
                    module.train(mode == "train")
                yield mode
        self.note({f"{name}_after_train_step": tensor for name, tensor in self._statistics.items()})

    def note(self, outputs: dict[str, Tensor]) -> None:
        self.computed |= outputs

    def note_gradients(self, suffix: str, out: Tensor) -> None:
        """Of sum(cotangent * out), with respect to every input."""
        if self._cotangent is None:
            return
        gradients = torch.autograd.grad(
            (self._cotangent * out).sum(), list(self._inputs.values()), materialize_grads=True, retain_graph=True
        )
        self.note({f"grad_{name}{suffix}": gradient for name, gradient in zip(self._inputs, gradients, strict=True)})

    def results(self) -> dict[str, np.ndarray]:
        if missing := [name for name in self.left if name not in self.computed]:
            raise ValueError(f"{self.path} ({self.module}): nothing here computes {', '.join(missing)}.")
        return {name: self.computed[name].detach().numpy().astype(array.dtype) for name, array in self.left.items()}


def run_golden(path: str | Path, dtype: torch.dtype = torch.float64) -> dict[str, np.ndarray]:
    """Every output, gradient and running statistic that the file holds, computed by our modules, by the file's names.

    Raises:
        ValueError: the file describes no module of ours, or holds more than we compute.
    """
    golden = Golden(path, dtype)
    _runner(golden)(golden)
    return golden.results()


def _runner(golden: Golden) -> Callable[[Golden], None]:
    has = golden.left.__contains__
    for marks, runner in (
        (("w1", "conv1_weight"), _afi_basic_block),
        (("w1",), _afi),
        (("wq", "lam"), _mrla_light),
        (("wq",), _mrla_base),
        (("local2_reduce_weight",), _iaff),
        (("local_reduce_weight", "y"), _aff),
        (("local_reduce_weight",), _ms_cam),
    ):
        if all(map(has, marks)):
            return runner
    raise ValueError(f"{golden.path} ({golden.module}): no module of ours has {', '.join(golden.left)}.")


def _reduction(channels: int, hidden: int) -> int:
    """An r with floor(channels / r) = hidden."""
    return channels // hidden


def _norm(prefix: str, norm: nn.BatchNorm2d) -> dict[str, Tensor]:
    tensors = {"gamma": norm.weight, "beta": norm.bias, "running_mean": norm.running_mean}
    return {f"{prefix}_{key}": tensor for key, tensor in (tensors | {"running_var": norm.running_var}).items()}


def _afi(golden: Golden) -> None:
    (x,) = golden.inputs("x")
    hidden, channels = golden.left["w1"].shape
    afi = AFI(channels, _reduction(channels, hidden)).to(golden.dtype)
    golden.fill({"w1": afi.squeeze.weight, "w2": afi.excite.weight})
    means = x.mean(dim=(3, 4))
    out, weights = afi(x.unbind())
    golden.note({"z": means, "scores": afi.scores(means), "weights": weights, "out": out})
    golden.note({"out_first_only": afi([x[0]])[0]})
    golden.note_gradients("", out)


def _attention(attention: MultiScaleAttention, number: str = "") -> dict[str, Tensor]:
    tensors = {}
    for branch, context in (("local", attention.local_context), ("global", attention.global_context)):
        reduce, norm1, _, expand, norm2 = context
        prefix = branch + number
        tensors |= {f"{prefix}_{key}_weight": conv.weight for key, conv in (("reduce", reduce), ("expand", expand))}
        tensors |= {f"{prefix}_{key}_bias": conv.bias for key, conv in (("reduce", reduce), ("expand", expand))}
        tensors |= _norm(f"{prefix}_bn1", norm1) | _norm(f"{prefix}_bn2", norm2)
    return tensors


def _fusion(golden: Golden, kind: Callable[[int, int], Any]) -> Any:
    hidden, channels = golden.left["local_reduce_weight"].shape
    return kind(channels, _reduction(channels, hidden)).to(golden.dtype)


def _both_modes(golden: Golden, module: nn.Module, inputs: Sequence[Tensor]) -> None:
    for mode in golden.modes(module):
        out, _ = module(*inputs)
        golden.note({f"out_{mode}": out})
        golden.note_gradients(f"_{mode}", out)


def _ms_cam(golden: Golden) -> None:
    module = _fusion(golden, MSCAM)
    golden.fill(_attention(module.attention))
    _both_modes(golden, module, golden.inputs("x"))


def _aff(golden: Golden) -> None:
    module = _fusion(golden, AFF)
    golden.fill(_attention(module.attention))
    _both_modes(golden, module, golden.inputs("x", "y"))


def _iaff(golden: Golden) -> None:
    module = _fusion(golden, IAFF)
    golden.fill(_attention(module.first) | _attention(module.second, "2"))
    x, y = golden.inputs("x", "y")
    golden.note({"out_eval_first_global_reused": _port_of_iaff(module.eval(), x, y)})
    _both_modes(golden, module, (x, y))


def _port_of_iaff(module: IAFF, x: Tensor, y: Tensor) -> Tensor:
    """With the third-party port's slip: its second pass asks the first global branch again."""
    weight = module.first(x + y)
    u = x * weight + y * (1 - weight)
    mean = u.mean(dim=(2, 3), keepdim=True)
    weight = (module.second.local_context(u) + module.first.global_context(mean)).sigmoid()
    return x * weight + y * (1 - weight)


def _fill_projections(golden: Golden, layers: Sequence[MRLALight | MRLABase]) -> None:
    """Kernels of one layer, or of all layers one after another; their length is the file's."""
    kernels = {name: golden.take(name).unflatten(0, (len(layers), -1)) for name in ("wq", "wk", "wv")}
    for i, layer in enumerate(layers):
        channels = layer.projections.value.in_channels
        per_head = channels // layer.projections.heads
        projections = Projections(channels, per_head, kernels["wq"].shape[-1]).to(golden.dtype)
        for name, conv in (("wq", projections.query), ("wk", projections.key), ("wv", projections.value)):
            conv.weight.detach().copy_(kernels[name][i].view_as(conv.weight))
        layer.projections = projections


def _per_head(golden: Golden, channels: int) -> int:
    return golden.hyper.get("dim_per_head") or channels // golden.hyper["heads"]


def _mrla_light(golden: Golden) -> None:
    x, o_prev = golden.inputs("x", "o_prev")
    block = LightRetrieval(x.shape[1], _per_head(golden, x.shape[1]), drop_path=0).to(golden.dtype)
    _fill_projections(golden, [block.layer])
    golden.fill({"lam": block.layer.lam} | _norm("bn", block.norm))
    for name, previous in (("layer", torch.zeros_like(o_prev)), ("module", o_prev)):
        out, _ = block.layer(x, previous)
        golden.note({f"out_{name}": out})
        golden.note_gradients(f"_{name}", out)
    for mode in golden.modes(block):
        out = block(x, o_prev, Memory())
        golden.note({f"out_block_{mode}": out})
        golden.note_gradients(f"_block_{mode}", out)


def _mrla_base(golden: Golden) -> None:
    (x,) = golden.inputs("x")
    settings = x.shape[2], _per_head(golden, x.shape[2])
    *layers, last = (MRLABase(*settings).to(golden.dtype) for _ in x)
    _fill_projections(golden, [*layers, last])
    outs: list[Tensor] = []
    entries: list[KeyValue] = []
    for layer, of_layer in zip([*layers, last], x, strict=True):
        out, _, mine = layer(of_layer, entries)
        outs, entries = [*outs, out], [*entries, mine]
    golden.note({"out_layer": torch.stack(outs), "keys": torch.stack([mine.key.flatten(1) for mine in entries], dim=1)})
    golden.note_gradients("_last", outs[-1])
    norm = nn.BatchNorm2d(x.shape[2]).to(golden.dtype).eval()
    golden.fill(_norm("bn", norm))
    for suffix, relu in (("", False), ("_relu", True)):
        block, memory = BaseRetrieval(*settings, drop_path=0, relu=relu), Memory()
        block.layer, block.norm = last, norm
        memory.earlier = [("", mine) for mine in entries[:-1]]
        golden.note({f"out_block_last_eval{suffix}": block(x[-1], x[-1], memory)})


def _afi_basic_block(golden: Golden) -> None:
    x, earlier = golden.inputs("x", "prev")
    features, channels, kernel, _ = golden.left["conv1_weight"].shape
    settings = AFISettings(expanded=features == channels, reduction=_reduction(*reversed(golden.left["w1"].shape)))
    block = ResidualBlock(
        FirstLayer(conv_bn(channels, features, kernel), Integrate(features, settings), 2 * features),
        conv_bn(2 * features, channels, golden.size("conv2_weight", -1), relu=False),
        nn.Identity(),
    ).to(golden.dtype)
    first, afi = block.first.convolution, block.first.afi.afi
    golden.fill({"conv1_weight": first[0].weight, "conv2_weight": block.rest[0].weight})
    golden.fill(_norm("bn1", first[1]) | _norm("bn2", block.rest[1]))
    golden.fill({"w1": afi.squeeze.weight, "w2": afi.excite.weight})
    afi.register_forward_hook(lambda _afi, _inputs, outputs: golden.note({"fused": outputs[0]}))
    for mode in golden.modes(block):
        memory = Memory()
        memory.earlier = [Feature("", feature, feature.mean(dim=(2, 3))) for feature in earlier]
        out = block(x, memory)
        golden.note({f"feature_{mode}": memory.earlier[-1].map, f"out_{mode}": out})
        golden.note_gradients(f"_{mode}", out)
