"""Pickles in the form that Python 2 wrote."""

import io
import pickle
import struct
from typing import Any, ClassVar

__all__ = ["python2_pickle"]


class _Python2Pickler(pickle._Pickler):
    """Pickle protocol 2, with text and bytes both stored as byte strings."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_string(self, value: str | bytes) -> None:
        data = value.encode("ascii") if isinstance(value, str) else value
        self.write(b"T" + struct.pack("<i", len(data)) + data)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_string


def python2_pickle(value: Any) -> bytes:
    """Pickle `value` like Python 2 with numpy 1."""
    file = io.BytesIO()
    _Python2Pickler(file, protocol=2).dump(value)
    return file.getvalue().replace(b"numpy._core.", b"numpy.core.")
