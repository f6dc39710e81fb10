"""Read pickles of numpy arrays and Python containers without executing code from the file.

A pickle names functions and calls them. Here, a name can only refer to one of a few replacement functions, which check
their arguments. numpy's own functions would build an array of Python objects over arbitrary bytes, and could thus read any
memory. The elements of an array are numbers, booleans or text, or come from a list of objects that were unpickled here.
"""

import math
import pickle
from collections.abc import Callable
from typing import Any, BinaryIO, ClassVar

import numpy as np

__all__ = ["load_numpy_pickle"]

PLAIN_KINDS = "biufcSU"  # booleans, numbers, text


def load_numpy_pickle(file: BinaryIO) -> Any:
    """Read the pickled object at the current position of `file`, written by any version of Python and numpy.

    Python 2 strings are decoded as Latin-1, which preserves the bytes of its arrays.

    Raises:
        runtime.files.UNREADABLE: the pickle is damaged, or holds anything but numpy arrays, containers, numbers and text.
    """
    return _ArrayUnpickler(file, encoding="latin1").load()


class _Dtype:
    """A dtype under construction; numpy's dtype would accept any flags from the file, even the flags of object arrays."""

    def __init__(self, code: str) -> None:
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if len(state) > 4 and any(part is not None for part in state[2:5]):
            raise pickle.UnpicklingError("structured arrays are not supported")
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """An array under construction, which checks its values before passing them to numpy."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, declared, fortran, values = state
        dtype = declared.dtype
        content = list if dtype.kind == "O" else (bytes, str)  # str: Python 2's bytes
        if dtype.kind not in PLAIN_KINDS + "O" or not isinstance(values, content):
            raise pickle.UnpicklingError(f"arrays of {dtype} are not supported")
        if isinstance(values, list) and len(values) != math.prod(shape):
            raise pickle.UnpicklingError(f"{len(values)} objects do not fill an array of {shape}")
        super().__setstate__((1, shape, dtype, fortran, values))  # type: ignore[arg-type] # str is accepted too


def _dtype(code: str, align: bool, copy: bool) -> _Dtype:
    return _Dtype(code)


def _ndarray() -> None:
    """Placeholder for the class argument of `_reconstruct`; it cannot be called."""
    raise pickle.UnpicklingError("numpy.ndarray may not be called")


def _reconstruct(kind: object, shape: tuple[int, ...], code: object) -> _Array:
    return np.ndarray.__new__(_Array, (0,))


def _frombuffer(values: Any, declared: _Dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    """Create an array from pickle protocol 5."""
    if declared.dtype.kind not in PLAIN_KINDS:
        raise pickle.UnpicklingError(f"arrays of {declared.dtype} are not supported")
    return np.frombuffer(bytes(values), declared.dtype).reshape(shape, order=order)  # type: ignore[call-overload]


def _encode(text: str, encoding: str) -> bytes:
    """Create bytes from pickle protocol 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding} are not supported")
    return text.encode("latin1")


class _ArrayUnpickler(pickle.Unpickler):
    admitted: ClassVar[dict[tuple[str, str], Callable[..., Any]]] = {
        ("numpy", "ndarray"): _ndarray,
        ("numpy", "dtype"): _dtype,
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy.core.numeric", "_frombuffer"): _frombuffer,
        ("_codecs", "encode"): _encode,
    }

    def find_class(self, module: str, name: str) -> Any:
        key = (module.replace("numpy._core", "numpy.core"), name)
        if key not in self.admitted:
            raise pickle.UnpicklingError(f"{module}.{name} is not a numpy array")
        return self.admitted[key]
