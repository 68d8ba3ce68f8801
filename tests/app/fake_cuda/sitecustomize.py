"""A GPU that is none: onnxruntime's CUDA is its CPU, the GPU's memory the CPU's, and CUDA's runtime a few lines.

Tests install it with a monkeypatch. A process with this folder on its PYTHONPATH has it from the start, and loses its
GPU as soon as it finds the file that FAKE_CUDA_LOSS names; whichever process finds it takes it away, so that one does.

Stricter than CUDA where CUDA would be silently wrong: a copy is done only once it is waited for, a graph is replayed by
the thread and with the addresses that it was captured with, and nothing runs beside the thread that owns the GPU.
"""

# ruff: noqa: N802 - the names are CUDA's

import ctypes
import os
import threading
from pathlib import Path
from typing import ClassVar

import onnxruntime

from app import cuda

ILLEGAL_ACCESS = 700


class FakeRuntime:
    """CUDA's runtime library; once `code` is set, all calls fail with it."""

    def __init__(self):
        self.code = 0
        self.pinned = {}
        self._copies = {}

    def cudaHostAlloc(self, address, size, flags):
        memory = ctypes.create_string_buffer(size)
        address._obj.value = ctypes.addressof(memory)
        self.pinned[address._obj.value] = memory
        return self.code

    def cudaFreeHost(self, address):
        del self.pinned[address.value]
        return self.code

    def cudaMemcpyAsync(self, to, source, size, kind, stream):
        assert (kind, stream) == (4, 2)  # in any direction, on the thread's own stream
        self._copies.setdefault(threading.get_ident(), []).append((to, source, size))
        return self.code

    def cudaStreamSynchronize(self, stream):
        for to, source, size in self._copies.pop(threading.get_ident(), []):
            ctypes.memmove(to, source, size)
        return self.code

    def cudaDeviceSynchronize(self):
        return self.code

    def cudaGetErrorString(self, code):
        return {2: b"out of memory", ILLEGAL_ACCESS: b"an illegal memory access was encountered"}[code]


class FakeSession(onnxruntime.InferenceSession):
    """On "CUDA" if it was asked for; `opened` are all that were, the newest last."""

    opened: ClassVar = []
    refuses_graphs = False
    """Opening one with graphs fails, as that of a network with nodes on the CPU does."""
    on_run = staticmethod(lambda size, graph: None)
    """Called before every run."""

    def __init__(self, model, options=None, providers=(), **others):
        asked = dict(provider if isinstance(provider, tuple) else (provider, {}) for provider in providers)
        self.order = list(asked)
        self.cuda_options = asked.get(cuda.CUDA)
        if self.refuses_graphs and self.cuda_options and self.cuda_options["enable_cuda_graph"] == "1":
            raise RuntimeError("This session cannot use the graph capture feature as requested by the user\nmore")
        super().__init__(model, options, ["CPUExecutionProvider"], **others)
        self.failure = None
        self.ran = []
        """Images and graph of every run; graph -1 is none."""
        self._graphs = {}
        self._running = threading.Lock()
        if self.cuda_options is not None:
            self.opened.append(self)

    def get_providers(self):
        return super().get_providers() if self.cuda_options is None else self.order

    def get_provider_options(self):
        return super().get_provider_options() if self.cuda_options is None else {cuda.CUDA: self.cuda_options}

    def run(self, names, feeds, options=None):
        assert self.cuda_options is None, "on a GPU, networks are run by IO binding"
        return super().run(names, feeds, options)

    def run_with_iobinding(self, binding, options=None):
        assert self._running.acquire(blocking=False), "two threads at once on a GPU"
        try:
            self._lose()
            if self.failure is not None:
                raise self.failure
            graph = int(options.get_run_config_entry("gpu_graph_id"))
            self.on_run(binding._size, graph)
            if graph != -1:
                assert self.cuda_options["enable_cuda_graph"] == "1"
                binding, thread = self._graphs.setdefault(graph, (binding, threading.get_ident()))
                assert thread == threading.get_ident(), "captured by another thread"
            super().run_with_iobinding(binding, options)
            self.ran.append((binding._size, graph))
        finally:
            self._running.release()

    def io_binding(self):
        return _FakeBinding(self)

    def _lose(self):
        if loss := os.environ.get("FAKE_CUDA_LOSS"):
            try:
                Path(loss).unlink()
            except FileNotFoundError:
                return
            self.lose()

    def lose(self):
        """From now on nothing can be done on the GPU."""
        cuda.device._runtime.code = ILLEGAL_ACCESS
        self.failure = RuntimeError("CUDNN failure 5000: CUDNN_STATUS_EXECUTION_FAILED ; GPU=0 ; expr=...\nmore")


class _FakeBinding(onnxruntime.IOBinding):
    def bind_input(self, name, device_type, device_id, element_type, shape, buffer_ptr):
        self._size = shape[0]
        super().bind_input(name, device_type, device_id, element_type, shape, buffer_ptr)


def install(setattr_=setattr):
    """Put it in the place of what is there, by `setattr` or a monkeypatch's."""
    setattr_(onnxruntime, "InferenceSession", FakeSession)
    setattr_(onnxruntime, "preload_dlls", lambda: None)
    setattr_(cuda, "obstacle", lambda: None)
    setattr_(cuda, "MEMORY", "cpu")
    setattr_(cuda, "device", cuda.Device(FakeRuntime()))


if __name__ == "sitecustomize":
    install()
