"""Several processes that train one network: `torchrun --nproc-per-node 2 training/train.py ...`.

Each holds the whole network and takes its share of every batch. Gradients, batch norm's statistics and the epoch's
figures are those of the whole batch, so that any number of processes trains what one does, within rounding. The first
process reads the run's folder and the data and tells the others; it alone writes and speaks.

A process that torchrun did not start, or started alone, is the first of one: nothing here then costs or changes
anything.
"""

import itertools
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from model.contract import InterflowError

T = TypeVar("T")

LOOK_EVERY_S = 0.02
"""While waiting for the first process."""
SPEAK_WITHIN_S = 1
"""Who only saw that another process ended leaves it so long to say why."""

OTHER_ENDED = "another process of this run has ended; go on from its last saved state with --resume."

_told = itertools.count()


def launched() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_available() and dist.is_torchelastic_launched() else 1


def several() -> bool:
    """Whether this process trains together with others."""
    return dist.is_available() and dist.is_initialized()


def size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if several() else 1


def first() -> bool:
    """Whether this is the process that writes and speaks."""
    return launched() == 1 or os.environ["RANK"] == "0"


@contextmanager
def joined() -> Iterator[None]:
    """Meet the other processes that torchrun started, and leave after the first: torchrun ends all when one fails."""
    if launched() == 1:
        yield
        return
    cuda = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    _notes()
    yield
    if first():
        _notes().set("done", "")
    _wait("done")
    dist.destroy_process_group()


def choose_cuda() -> torch.device:
    """The GPU of this process: each on a machine has its own.

    Raises:
        InterflowError: there are more processes than GPUs.
    """
    if not several():
        return torch.device("cuda")
    local, found = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= found:
        raise InterflowError(
            f"device cuda: torch finds {found} on this machine for {os.environ['LOCAL_WORLD_SIZE']} processes; give "
            f"torchrun --nproc-per-node {found}."
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def seed(recipe_seed: int, epoch: int, step: int) -> None:
    """Let the others than the first draw their own drop-out, from the seed, their rank and where the run stands.

    The first goes on with torch's state as it is: the one process's, or the checkpoint's. So what is dropped, unlike
    order and augmentation, depends on the number of processes.
    """
    if not first():
        own = np.random.SeedSequence([recipe_seed, dist.get_rank(), epoch, step]).generate_state(1, np.uint64)
        torch.manual_seed(int(own[0]))


def share(rows: Tensor) -> Tensor:
    """This process's rows of a batch, or of anything else; as many as the others', or one more or less."""
    return rows.tensor_split(dist.get_world_size())[dist.get_rank()] if several() else rows


def workers(count: int) -> int:
    """Of so many processes that decode images on a machine, how many this one may start."""
    return max(1, count // int(os.environ["LOCAL_WORLD_SIZE"])) if several() and count else count


def summed(tensor: Tensor) -> Tensor:
    """The sum over the processes, in place."""
    if several():
        dist.all_reduce(tensor)
    return tensor


def any_of(*flags: bool) -> tuple[bool, ...]:
    """Of each flag, whether any process has raised it."""
    return tuple(bool(count) for count in summed(torch.tensor(flags, dtype=torch.int32))) if several() else flags


def put_together(part: Tensor, rows: int) -> Tensor:
    """What every process made of its `share` of so many rows, in order: (rows, ...), of `part`'s (share, ...)."""
    if not several():
        return part
    whole = part.new_zeros(rows, *part.shape[1:])
    whole[share(torch.arange(rows))] = part
    return summed(whole)


def from_first(make: Callable[[], T]) -> T:
    """What the first process makes, in every process; the others wait for it, however long it takes.

    Whatever may be refused is made like this, so that one process refuses it, once.
    """
    if not several():
        return make()
    note = f"told/{next(_told)}"
    made: list[Any] = [None]
    if first():
        made[0] = make()
        _notes().set(note, "")
    _wait(note)  # not in a collective, which has a time limit
    dist.broadcast_object_list(made)
    return made[0]


def data_parallel(network: nn.Module, device: torch.device) -> nn.Module:
    """The network as it is trained: with the first process's weights, gradients and statistics of the whole batch.

    Its parameters and buffers are `network`'s own, by which it is averaged, saved and evaluated.
    """
    if not several():
        return network
    # Of layers that have one value a channel and are used on several maps: an extra copy of their few gradients.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    if device.type == "cpu":
        return _CpuDataParallel(network)
    from timm.layers import convert_sync_batchnorm  # noqa: PLC0415 - torch's own forgets the activations in timm's

    return DistributedDataParallel(convert_sync_batchnorm(network), device_ids=[device.index])


class _CpuDataParallel(DistributedDataParallel):
    """Torch's SyncBatchNorm runs on GPUs only."""

    def forward(self, *inputs: Any, **named: Any) -> Any:
        with _WholeBatchNorm():
            return super().forward(*inputs, **named)


class _WholeBatchNorm(TorchFunctionMode):
    """Batch norm, whichever module asks for it, over the batch of all processes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.batch_norm and kwargs["training"]:
            return _batch_norm(*args, **kwargs)
        return func(*args, **(kwargs or {}))


def _batch_norm(  # with the arguments that functional.batch_norm hands over
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    dims, shape = [d for d in range(x.dim()) if d != 1], [1, -1, *[1] * (x.dim() - 2)]
    dtype, channels = torch.promote_types(x.dtype, torch.float32), x.shape[1]
    own_count = x.numel() // channels
    own_mean = (x.sum(dims, dtype=torch.float64) / max(own_count, 1)).to(dtype)
    centred = x.to(dtype) - own_mean.view(shape)
    own = [x.new_tensor([own_count], dtype=torch.float64), own_mean, centred.square().sum(dims, dtype=torch.float64)]
    # One message: the spread of all is that within each share, and that of the shares' means around the mean of all.
    counts, means, spreads = _Gathered.apply(torch.cat(own)).split([1, channels, channels], dim=1)
    count = counts.sum()
    mean = (counts * means).sum(0) / count
    variance = (spreads + counts * (means - mean).square()).sum(0) / count
    with torch.no_grad():
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((variance * count / (count - 1)).to(running_var.dtype), momentum)
    factor = (variance + eps).rsqrt() * (1 if weight is None else weight)
    shift = (own_mean - mean) * factor + (0 if bias is None else bias)
    return (centred * factor.to(dtype).view(shape) + shift.to(dtype).view(shape)).to(x.dtype)


class _Gathered(torch.autograd.Function):
    """What every process has of a vector, (processes, L); to each goes back the sum of what all make of its own."""

    @staticmethod
    def forward(_ctx: Any, own: Tensor) -> Tensor:
        whole = own.new_zeros(size(), len(own))
        whole[dist.get_rank()] = own
        return summed(whole)

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:
        return summed(gradient.clone())[dist.get_rank()]


def lost(error: Exception) -> bool:
    """Whether this is what a process that waits for another gets when that one has ended."""
    if not several():
        return False
    return isinstance(error, dist.DistBackendError | dist.DistNetworkError) or "gloo" in str(error)


def fail(refusal: str) -> NoReturn:
    """End this process, which cannot go on, so that all end; one of them says why.

    At once: an interpreter that ends in good order would wait for messages that never come.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # of torchrun, which ends all when the first of them has
    try:
        if OTHER_ENDED in refusal:
            _wait("said", SPEAK_WITHIN_S)
        if _notes().add("speakers", 1) == 1:
            print(refusal, file=sys.stderr, flush=True)
            _notes().set("said", "")
        _wait("said", SPEAK_WITHIN_S)
    except RuntimeError:  # torchrun, which holds the notes, has ended itself
        pass
    sys.stdout.flush()
    os._exit(1)


@cache
def _notes() -> Any:
    """Where processes leave each other notes; torchrun holds it, so that it outlives them."""
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)  # type: ignore[attr-defined]
    return dist.PrefixStore(f"training/{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)  # type: ignore[attr-defined]


def _wait(note: str, at_most: float = float("inf")) -> None:
    """In the interpreter, where signals are heard."""
    until = time.monotonic() + at_most
    while not _notes().check([note]) and time.monotonic() < until:
        time.sleep(LOOK_EVERY_S)
