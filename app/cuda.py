"""All that is CUDA's alone: what it takes to be had, and a network run on a GPU in memory that stays where it is.

One thread of the process does everything on the GPU: it runs one batch at a time anyway, onnxruntime keeps captured
graphs by thread, and while one is captured no other thread may allocate. Lanes fill and empty their own memory beside.

onnxruntime's Python gives pinned memory to plugin providers only, so that CUDA's own runtime is asked for it. It is
asked whether the GPU is lost, too: after an error that ends a context, every call fails with it, whatever the text was
that onnxruntime, cuDNN or cuBLAS put around the first one.
"""

import contextlib
import ctypes
import io
import logging
import math
import os
import re
import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from queue import LifoQueue
from typing import Any, ParamSpec, TypeVar

import numpy as np
import onnxruntime

from app.errors import DeviceLostError, DeviceMemoryError, InferenceError
from app.inference import Outputs
from app.settings import Settings
from model.contract import IMAGE, ModelCard, TensorSpec, branch_map_name

CUDA = "CUDAExecutionProvider"
MEMORY = "cuda"
"""onnxruntime's name of the memory that a network's inputs and outputs lie in."""
OUT_OF_MEMORY = re.compile(
    r"out of memory|Failed to allocate memory|smaller than requested bytes|_STATUS_ALLOC_FAILED", re.IGNORECASE
)
"""In what onnxruntime says: CUDA's own words, those of its arena without and with a limit, cuBLAS' and cuDNN's."""
ANY_DIRECTION, OWN_STREAM = 4, 2
"""cudaMemcpyDefault and cudaStreamPerThread."""
NO_GRAPH = -1
"""As `gpu_graph_id`: neither capture nor replay."""
ROUNDS = 15
"""Runs of each size that decide whether it is captured."""

P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger(__name__)


class Device:
    """The process' GPU: the first of CUDA_VISIBLE_DEVICES.

    Args:
        runtime: CUDA's runtime library; None: that of onnxruntime's CUDA, opened when it is first needed.
    """

    def __init__(self, runtime: Any = None) -> None:
        self.lost: str | None = None
        """Why this process cannot use it any more. Its context is gone then, and only another process gets one."""
        self._given = runtime
        self._thread = ThreadPoolExecutor(1, "cuda")

    @cached_property
    def _runtime(self) -> Any:
        return self._given or _open_runtime()

    def do(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do something on the GPU, after whatever is under way."""
        return self._thread.submit(work, *args, **kwargs).result()

    def require(self) -> None:
        """For those who would use it, or say that it can be used.

        Raises:
            DeviceLostError: it was lost.
        """
        if self.lost:
            raise DeviceLostError(f"the GPU was lost ({self.lost}). Ask again once this process was started anew.")

    def pinned(self, shape: Sequence[int], dtype: str) -> np.ndarray:
        """Memory of the CPU that the GPU copies from and to by itself."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        address = ctypes.c_void_p()
        self._check(self._runtime.cudaHostAlloc(ctypes.byref(address), size, 0))
        memory = (ctypes.c_uint8 * size).from_address(address.value or 0)
        weakref.finalize(memory, self._runtime.cudaFreeHost, address).atexit = False  # the array holds `memory`
        return np.ctypeslib.as_array(memory).view(dtype).reshape(shape)

    def copy(self, to: int, source: int, size: int) -> None:
        """Begin to copy bytes between addresses of the CPU and the GPU; `wait` ends it."""
        self._check(self._runtime.cudaMemcpyAsync(to, source, size, ANY_DIRECTION, OWN_STREAM))

    def wait(self) -> None:
        """Until this thread's copies are done."""
        self._check(self._runtime.cudaStreamSynchronize(OWN_STREAM))

    def failure(self, error: Exception) -> InferenceError:
        """What an error of a run is to those who asked; looks whether the GPU is lost."""
        if isinstance(error, InferenceError):
            return error
        said = str(error).partition("\n")[0].rstrip(". ")
        if self.lost is None and (code := self._runtime.cudaDeviceSynchronize()):
            self.lost = self._describe(code)
            logger.critical("the GPU was lost: %s. The first to fail: %s", self.lost, said)
        if self.lost is not None:
            return DeviceLostError(f"the GPU was lost while these images were on it ({self.lost}). Ask again.")
        if OUT_OF_MEMORY.search(str(error)):
            return DeviceMemoryError(f"the GPU's memory did not suffice for this batch ({said}). Ask again.")
        return InferenceError(f"inference failed ({said}).")

    def _check(self, code: int) -> None:
        if code:
            raise RuntimeError(self._describe(code))

    def _describe(self, code: int) -> str:
        return f"CUDA failure {code}: {self._runtime.cudaGetErrorString(code).decode()}"


device = Device()


def _open_runtime() -> ctypes.CDLL:
    runtime = ctypes.CDLL(f"libcudart.so.{_major()}")  # onnxruntime has loaded it
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    runtime.cudaHostAlloc.argtypes = [pointer, size, ctypes.c_uint]
    runtime.cudaFreeHost.argtypes = [pointer]
    runtime.cudaMemcpyAsync.argtypes = [pointer, pointer, size, ctypes.c_int, pointer]
    runtime.cudaStreamSynchronize.argtypes = [pointer]
    runtime.cudaGetErrorString.restype = ctypes.c_char_p
    return runtime


def _major() -> int:
    """Of the CUDA that onnxruntime was built with."""
    return int(onnxruntime.cuda_version.partition(".")[0])


def provider_options(settings: Settings, *, graphs: bool) -> dict[str, str]:
    """What onnxruntime's CUDA is told.

    A GPU that others use, too, is asked for no more memory than is needed at the moment. TF32 is what PyTorch's
    convolutions do as well: ten bits of each factor, summed in float32.
    """
    options = {
        "cudnn_conv_algo_search": "HEURISTIC",  # a search by trial would take a second for each size of a batch
        "use_tf32": str(int(settings.cuda_tf32)),
        "enable_cuda_graph": str(int(graphs)),
        "arena_extend_strategy": (
            "kSameAsRequested" if settings.workers > 1 or settings.cuda_memory else "kNextPowerOfTwo"
        ),
    }
    if settings.cuda_memory:
        options["gpu_mem_limit"] = str(settings.cuda_memory // settings.workers)
    return options


def obstacle() -> str | None:
    """What stands against CUDA, before anything is opened: onnxruntime would print pages, and not always the cause."""
    if CUDA not in onnxruntime.get_available_providers():
        return f"the installed onnxruntime, {onnxruntime.__version__}, has no CUDA (the package onnxruntime-gpu has)"
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver (libcuda.so.1 does not load)"
    version, count = ctypes.c_int(), ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    if version.value // 1000 < _major():
        return (
            f"the NVIDIA driver is for CUDA {version.value // 1000}.{version.value % 1000 // 10}, and onnxruntime "
            f"{onnxruntime.__version__} needs one for {onnxruntime.cuda_version}"
        )
    code = driver.cuInit(0)
    if code or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        seen = "" if visible is None else f"; CUDA_VISIBLE_DEVICES is {visible!r}"
        return f"the NVIDIA driver has no GPU for us (cuInit gave {code}, {count.value} devices{seen})"
    return None


def open_session(
    create: Callable[[list], onnxruntime.InferenceSession], settings: Settings
) -> tuple[onnxruntime.InferenceSession | None, str | None]:
    """A session on CUDA, or what stands against it.

    Args:
        create: a session of a list of providers.
        settings: the model's graphs, TF32 and memory.
    """
    if against := obstacle():
        return None, against
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        onnxruntime.preload_dlls()
    for graphs in {"on": [True], "off": [False], "auto": [True, False]}[settings.cuda_graphs]:
        try:
            session = create([(CUDA, provider_options(settings, graphs=graphs)), "CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors share no base class
            against = f"CUDA cannot run it ({str(error).partition(chr(10))[0].rstrip('. ')})"
            continue
        if session.get_providers()[0] == CUDA:
            return session, None
        reason = printed.getvalue().partition("\n")[0] or "onnxruntime's message above says why"
        return None, f"CUDA does not start ({reason}; the extra `gpu` installs its libraries)"
    return None, against


class CudaNetwork:
    """A network on the GPU, for batches of a few sizes; smaller ones run in the next larger one's place.

    Inputs and outputs lie at addresses of their own for good, bound to the session once for each size. So a size can be
    captured as a CUDA graph, which is launched as one; there must be no node on the CPU then. What a batch leaves
    behind its own images is of former ones, and is not read.

    Args:
        session: opened by `open_session`.
        card: describes its inputs and outputs.
        sizes: of batches, ascending.
        lanes: threads that run it at a time.
    """

    def __init__(
        self, session: onnxruntime.InferenceSession, card: ModelCard, sizes: Sequence[int], lanes: int
    ) -> None:
        self.graphs: set[int] = set()
        """Sizes that run as a CUDA graph."""
        self._session = session
        self._input = card.inputs[IMAGE]
        self._outputs = card.outputs
        specs = {IMAGE: self._input, **self._outputs}
        self._on_device = {
            name: onnxruntime.OrtValue.ortvalue_from_shape_and_type(_shape(spec, sizes[-1]), _dtype(spec), MEMORY)
            for name, spec in specs.items()
        }
        self._bindings = {size: self._bind(size) for size in sizes}
        self._options = {number: _graph_id(number) for number in (NO_GRAPH, *sizes)}
        maps = {branch_map_name(branch) for branch in range(len(card.stages))}  # large, and rarely asked for
        self._idle: LifoQueue[dict[str, np.ndarray]] = LifoQueue()
        for _ in range(lanes):
            self._idle.put(
                {
                    name: device.pinned(_shape(spec, sizes[-1]), spec.dtype)
                    for name, spec in specs.items()
                    if name not in maps
                }
            )

    def run(self, images: np.ndarray, names: Sequence[str]) -> Outputs:
        """As `app.session.Session.run`, of as many images as the largest size.

        Raises:
            ValueError: images of another shape, or too many.
        """
        return self._run(images, names, self.graphs)

    def capture(self, choice: str) -> None:
        """Decide which sizes run as CUDA graphs: all if "on", none if "off", and those that are quicker so if "auto".

        Raises:
            Exception: the graph cannot be captured; the session is of no use then.
        """
        if choice == "off" or self._session.get_provider_options()[CUDA].get("enable_cuda_graph") == "0":
            return
        for size in self._bindings:
            images = np.zeros(_shape(self._input, size), self._input.dtype)
            seconds: dict[bool, list[float]] = {True: [], False: []}
            for _ in range(ROUNDS if choice == "auto" else 1):
                for captured, taken in seconds.items():
                    started = time.perf_counter()
                    self._run(images, [], {size} if captured else set())
                    taken.append(time.perf_counter() - started)
            # medians: the first of each is longer, by the search for algorithms and by the capture
            if choice == "on" or statistics.median(seconds[True]) < statistics.median(seconds[False]):
                self.graphs.add(size)

    def _bind(self, size: int) -> onnxruntime.IOBinding:
        binding = self._session.io_binding()
        image, spec = self._on_device[IMAGE], self._input
        binding.bind_input(IMAGE, MEMORY, 0, _dtype(spec), _shape(spec, size), image.data_ptr())
        for name, spec in self._outputs.items():
            binding.bind_output(name, MEMORY, 0, _dtype(spec), _shape(spec, size), self._on_device[name].data_ptr())
        return binding

    def _run(self, images: np.ndarray, names: Sequence[str], graphs: set[int]) -> Outputs:
        count = len(images)
        size = next((size for size in self._bindings if size >= count), None)
        if size is None or images.shape[1:] != self._input.shape[1:]:
            raise ValueError(f"{images.shape} are no images of {self._input}, {max(self._bindings)} at most")
        pinned = self._idle.get()
        try:
            pinned[IMAGE][:count] = images
            values = {}
            for name in names:
                spec = self._outputs[name]
                values[name] = pinned[name][:count] if name in pinned else np.empty(_shape(spec, count), spec.dtype)
            device.do(self._run_on_device, pinned[IMAGE][:count], size, size if size in graphs else NO_GRAPH, values)
            return {name: value.copy() if name in pinned else value for name, value in values.items()}
        finally:
            self._idle.put(pinned)

    def _run_on_device(self, images: np.ndarray, size: int, graph: int, values: Outputs) -> None:
        device.copy(self._on_device[IMAGE].data_ptr(), images.ctypes.data, images.nbytes)
        device.wait()
        self._session.run_with_iobinding(self._bindings[size], self._options[graph])
        for name, value in values.items():
            device.copy(value.ctypes.data, self._on_device[name].data_ptr(), value.nbytes)
        device.wait()


def _graph_id(number: int) -> onnxruntime.RunOptions:
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(number))
    return options


def _shape(spec: TensorSpec, count: int) -> tuple[int, ...]:
    """For so many images."""
    return count, *(size or 0 for size in spec.shape[1:])


def _dtype(spec: TensorSpec) -> Any:
    """As onnxruntime takes it."""
    return np.dtype(spec.dtype).type
