"""Pickling of any object into a stream and the large buffers that stay out of it (pickle protocol 5, PEP 574).

The bytes of arrays never go through the stream: they are copied from the object straight into a slot, and what is
rebuilt on the other side looks at them there.
"""

from __future__ import annotations

import contextlib
import copyreg
import io
import pickle
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["MODULES", "OUT_OF_BAND_BYTES", "dumps", "extra_reducers", "loads", "write_pickle"]

# A buffer shorter than this stays in the stream: an object that looks at the slot keeps the slot.
OUT_OF_BAND_BYTES = 1024


class _TorchTensors:
    """Reducer of torch's tensors, whose own pickles hold a copy of the data."""

    module = "torch"

    @staticmethod
    def types(torch: Any) -> list[type]:
        return [torch.Tensor]

    @staticmethod
    def reduce(tensor: Any) -> Any:
        import torch

        plain = tensor.detach()
        if (
            plain.device.type != "cpu"
            or plain.layout is not torch.strided
            or plain.is_quantized
            or plain.is_conj()
            or plain.is_neg()
            or vars(tensor)
            or plain.numel() * plain.element_size() < OUT_OF_BAND_BYTES
        ):
            return tensor.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        plain = plain.contiguous()
        raw = plain.reshape(-1).view(torch.uint8).numpy()
        dtype = str(plain.dtype).removeprefix("torch.")
        return _torch_tensor, (pickle.PickleBuffer(raw), dtype, tuple(plain.shape), tensor.requires_grad)


def _torch_tensor(data: Any, dtype: str, shape: tuple[int, ...], requires_grad: bool) -> Any:
    import torch

    view = memoryview(data)
    # A tensor can be written to, and a slot cannot: writing to one over the slot would end the process.
    memory = bytearray(view) if view.readonly else view
    tensor = torch.frombuffer(memory, dtype=getattr(torch, dtype)).reshape(shape)
    return tensor.requires_grad_() if requires_grad else tensor


class _PolarsFrames:
    """Reducer of polars' frames: Arrow's stream format, beside the pickle instead of in it."""

    module = "polars"

    @staticmethod
    def types(polars: Any) -> list[type]:
        return [polars.DataFrame]

    @staticmethod
    def reduce(frame: Any) -> Any:
        import polars

        if any(dtype.base_type() is polars.Object for dtype in frame.dtypes):
            return frame.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        stream = io.BytesIO()
        frame.write_ipc_stream(stream)
        return _polars_frame, (pickle.PickleBuffer(stream.getvalue()),)


def _polars_frame(data: Any) -> Any:
    import polars

    return polars.read_ipc_stream(io.BytesIO(data))


# Kinds of objects whose own pickles hold their data in the stream. Looked at only where their package is loaded.
_KINDS: tuple[Any, ...] = (_TorchTensors, _PolarsFrames)
_reducers: dict[type, Any] = {}
_waiting = list(_KINDS)
MODULES = tuple(kind.module for kind in _KINDS)


def extra_reducers() -> dict[type, Any]:
    """Return the reducers of packages that this process has loaded."""
    for kind in tuple(_waiting):
        module = sys.modules.get(kind.module)
        # A module that is being imported by another thread has not got its types yet.
        if module is None or getattr(getattr(module, "__spec__", None), "_initializing", False):
            continue
        for cls in kind.types(module):
            _reducers[cls] = kind.reduce
        with contextlib.suppress(ValueError):  # another thread has just done the same
            _waiting.remove(kind)
    return _reducers


def write_pickle(obj: Any, keep: Callable[[Any], bool], pickler: type[pickle.Pickler] | None = None) -> bytes:
    """Pickle an object, protocol 5, by a pickler class or with the reducers of loaded packages.

    Parameters
    ----------
    obj : object
        Whatever pickle takes.
    keep : callable
        The pickler's buffer_callback.
    pickler : type, optional
        Called with (file, protocol, fix_imports, buffer_callback).
    """
    stream = io.BytesIO()
    if pickler is None:
        writer = pickle.Pickler(stream, 5, buffer_callback=keep)
        writer.dispatch_table = {**copyreg.dispatch_table, **extra_reducers()}
    else:
        writer = pickler(stream, 5, True, keep)
    writer.dump(obj)
    return stream.getvalue()


dumps = pickle.dumps
loads: Callable[..., Any] = pickle.loads
