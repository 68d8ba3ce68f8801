"""Memory of models that have gone is the system's again."""

import ctypes
import gc

import onnx
import pytest

from app.session import Session
from app.settings import Settings
from model.contract import MODEL_FILE

MIB = 1 << 20


class _Mallinfo(ctypes.Structure):
    """glibc's struct mallinfo2: ten sizes, the fifth that of blocks mapped for themselves."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in "abcdefghij")


def mapped_bytes():
    function = ctypes.CDLL(None).mallinfo2
    function.restype = _Mallinfo
    return function().e


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
def test_weights_are_mapped_for_themselves_and_go_with_their_session(bundled):
    folder = bundled.parents[1] / "cifar10" / "1"
    weights = [initializer.raw_data for initializer in onnx.load(folder / MODEL_FILE).graph.initializer]
    large = sum(len(data) for data in weights if len(data) >= MIB)
    for _ in range(3):  # of the first, glibc would have mapped them without a word
        before = mapped_bytes()
        session = Session(folder, Settings(provider="cpu", threads=1))
        assert mapped_bytes() - before >= large > 10 * MIB
        del session
        gc.collect()
        assert mapped_bytes() - before < MIB
