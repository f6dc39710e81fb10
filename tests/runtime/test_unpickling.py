"""Arrays pickled by any version of Python and numpy can be read, and no code from a file runs."""

import io
import os
import pickle

import numpy as np
import pytest

from runtime.files import UNREADABLE
from runtime.unpickling import load_numpy_pickle
from tests.python2_pickle import python2_pickle

CONTENT = {
    "bytes": np.arange(256, dtype=np.uint8).reshape(4, 64),
    "big endian": np.array([1.5, -2.25], ">f8"),
    "columns first": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "numbers": [1, 2.5, True, None],
    "text": np.array(["a", "bc"]),
}


def load(data):
    return load_numpy_pickle(io.BytesIO(data))


def assert_same(found, expected):
    assert list(found) == list(expected)
    for key, value in expected.items():
        if isinstance(value, np.ndarray):
            assert found[key].dtype.str[1:] == value.dtype.str[1:]  # numpy may change the byte order
            np.testing.assert_array_equal(found[key], value)
        else:
            assert found[key] == value


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("core", [b"numpy._core.", b"numpy.core."])
def test_pickles_of_every_protocol(protocol, core):
    data = pickle.dumps(CONTENT, protocol)
    if protocol < 4:  # later protocols store the length of a name
        data = data.replace(b"numpy._core.", core)
    assert_same(load(data), CONTENT)


def test_pickles_of_python_2():
    content = {key: value for key, value in CONTENT.items() if key != "text"}
    data = python2_pickle(content)
    assert b"_codecs" not in data
    assert_same(load(data), content)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_objects_within_an_array(protocol):
    content = np.array({"mu": np.zeros(2)}, dtype=object)
    assert_same(load(pickle.dumps(content, protocol)).item(), {"mu": np.zeros(2)})


class Call:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def test_a_malicious_pickle_does_not_run(tmp_path):
    for function, argument in [(os.system, f"touch {tmp_path}/a"), (eval, f"open('{tmp_path}/b', 'w')")]:
        with pytest.raises(pickle.UnpicklingError, match="is not a numpy array"):
            load(pickle.dumps({"data": np.zeros(2), "labels": Call(function, argument)}))
    assert list(tmp_path.iterdir()) == []


class State:
    """An array with the pickled state `state`."""

    def __init__(self, *state):
        self.state = state

    def __reduce__(self):
        return (*np.zeros(0).__reduce__()[:2], self.state)


@pytest.mark.parametrize(
    "value",
    [
        Call(np.ndarray, (1,), "O", b"A" * 8),
        State(1, (1,), np.dtype("O"), False, b"A" * 8),
        State(1, (2,), np.dtype("O"), False, [None]),
        State(1, (1,), np.dtype([("a", "O")]), False, b"A" * 8),
        State(1, (1000,), np.dtype("f8"), False, b"A" * 8),
    ],
    ids=["constructor", "objects", "too few objects", "records", "too few bytes"],
)
def test_no_object_is_created_from_bytes(value):
    with pytest.raises(UNREADABLE):
        load(pickle.dumps(value, protocol=2))


@pytest.mark.parametrize("length", [0, 1, 40, -1])
def test_a_truncated_pickle_is_an_error(length):
    with pytest.raises(UNREADABLE):
        load(pickle.dumps(CONTENT)[:length])
