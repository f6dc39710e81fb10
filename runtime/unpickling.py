"""Reading pickles that hold numpy arrays and Python's own containers, without running anything that a file says.

A pickle names functions and calls them. Here a name is looked up in a list of four, which stand for numpy's own and check
what they are given: numpy's would build an array of Python objects over arbitrary bytes, and so read any memory. Arrays have
numbers, booleans or text as their elements, or a list of objects that were themselves unpickled here.
"""

import math
import pickle
from collections.abc import Callable
from typing import Any, BinaryIO, ClassVar

import numpy as np

__all__ = ["load_numpy_pickle"]

PLAIN_KINDS = "biufcSU"  # booleans, numbers, text


def load_numpy_pickle(file: BinaryIO) -> Any:
    """The object pickled in `file`, from where it stands, by any version of Python and numpy.

    Strings of Python 2 are decoded as Latin-1, which keeps the bytes of its arrays.

    Raises:
        runtime.files.UNREADABLE: the pickle is damaged, or holds anything but numpy arrays, containers, numbers and text.
    """
    return _ArrayUnpickler(file, encoding="latin1").load()


class _Dtype:
    """A dtype in the making: numpy's own would take any flags from the file, object arrays' among them."""

    def __init__(self, code: str) -> None:
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if len(state) > 4 and any(part is not None for part in state[2:5]):
            raise pickle.UnpicklingError("an array of records is not admitted")
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """An array in the making, which checks its values before numpy takes them."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, declared, fortran, values = state
        dtype = declared.dtype
        content = list if dtype.kind == "O" else (bytes, str)  # str: Python 2's bytes
        if dtype.kind not in PLAIN_KINDS + "O" or not isinstance(values, content):
            raise pickle.UnpicklingError(f"an array of {dtype} is not admitted")
        if isinstance(values, list) and len(values) != math.prod(shape):
            raise pickle.UnpicklingError(f"{len(values)} objects do not fill an array of {shape}")
        super().__setstate__((1, shape, dtype, fortran, values))  # type: ignore[arg-type] # str is admitted too


def _dtype(code: str, align: bool, copy: bool) -> _Dtype:
    return _Dtype(code)


def _ndarray() -> None:
    """Stands for the class in `_reconstruct`; calling it makes nothing."""
    raise pickle.UnpicklingError("numpy.ndarray may not be called")


def _reconstruct(kind: object, shape: tuple[int, ...], code: object) -> _Array:
    return np.ndarray.__new__(_Array, (0,))


def _frombuffer(values: Any, declared: _Dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    """Protocol 5's arrays."""
    if declared.dtype.kind not in PLAIN_KINDS:
        raise pickle.UnpicklingError(f"an array of {declared.dtype} is not admitted")
    return np.frombuffer(bytes(values), declared.dtype).reshape(shape, order=order)  # type: ignore[call-overload]


def _encode(text: str, encoding: str) -> bytes:
    """Protocol 2's bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding} are not admitted")
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
            raise pickle.UnpicklingError(f"{module}.{name} is no numpy array")
        return self.admitted[key]
