"""Files of torch.save are recognized by their first bytes, read completely or refused by name, and never executed."""

import os
import pickle

import pytest
import torch
from safetensors.torch import save

from options import UsageError
from runtime.torch_files import is_torch_file, read_torch_file, save_content

WEIGHTS = {
    "a": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
    "b.half": torch.tensor([1.5, -0.0, float("inf")], dtype=torch.float16),
    "c": torch.arange(6).view(2, 3).t(),  # not contiguous
    "d": torch.tensor(7),
}
CONTENT = {
    "step": 3,
    "seconds": 0.1,
    "best": float("inf"),
    "network": WEIGHTS,
    "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999)}]},
}


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("zipped", [True, False])
def test_both_formats_of_torch_save_are_read(zipped, tmp_path):
    torch.save({"a": torch.arange(3)}, tmp_path / "file", _use_new_zipfile_serialization=zipped)
    assert is_torch_file(tmp_path / "file")
    assert read_torch_file(tmp_path / "file")["a"].tolist() == [0, 1, 2]


def test_safetensors_headers_are_not_mistaken_for_pickles(tmp_path):
    beginnings = set()
    for length in range(0, 400, 8):
        data = save({"a": torch.zeros(1)}, metadata={"header": "x" * length})
        beginnings.add(data[0])
        (tmp_path / "file").write_bytes(data)
        assert not is_torch_file(tmp_path / "file")
    assert 0x80 in beginnings


def test_other_files(tmp_path):
    assert not is_torch_file(tmp_path / "absent")
    for data in (b"", b"PK", b"text of no format"):
        (tmp_path / "file").write_bytes(data)
        assert not is_torch_file(tmp_path / "file")


def test_content_round_trips_bit_for_bit(tmp_path):
    save_content(tmp_path / "content.pth", CONTENT)
    found = read_torch_file(tmp_path / "content.pth")
    assert {name: found[name] for name in ("step", "seconds", "best")} == {
        "step": 3,
        "seconds": 0.1,
        "best": float("inf"),
    }
    assert found["optimizer"]["param_groups"] == CONTENT["optimizer"]["param_groups"]
    for name, value in WEIGHTS.items():
        assert bits(found["network"][name]) == bits(value)


def test_damaged_content_is_named(tmp_path):
    path = tmp_path / "content.pth"
    save_content(path, {"weights": torch.full((1000,), 0.5)})
    data = path.read_bytes()
    inside = (
        data.index(torch.full((8,), 0.5).numpy().tobytes()) + 100
    )  # inside the values, where only a checksum can detect damage
    flipped = bytearray(data)
    flipped[inside] ^= 1
    for damaged in (b"", data[:100], data[: len(data) // 2], data[:-1], b"no checkpoint", bytes(flipped)):
        path.write_bytes(damaged)
        with pytest.raises(UsageError, match=r"cannot read .*content\.pth: \S"):
            read_torch_file(path)
    with pytest.raises(UsageError, match=r"cannot read .*absent\.pth"):
        read_torch_file(tmp_path / "absent.pth")


def test_a_full_disk_raises_os_error_and_keeps_the_old_file(tmp_path):
    """`exit_cleanly` prints OSError as one line. Libraries that write to paths raise other error types for a full disk."""
    path = tmp_path / "content.pth"
    save_content(path, WEIGHTS)
    before = path.read_bytes()
    path.with_name(f"{path.name}.tmp-{os.getpid()}").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        save_content(path, WEIGHTS)
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["content.pth"]


class Trap:
    """Creates a file if it is unpickled without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_pickle_with_code_is_refused_and_never_executed(tmp_path, save):
    marker, path = tmp_path / "executed", tmp_path / "content.pth"
    save({"step": 1, "network": Trap(marker)}, path)
    with pytest.raises(UsageError, match=r"cannot read .*content\.pth"):
        read_torch_file(path)
    assert not marker.exists()
    torch.load(path, weights_only=False) if save is torch.save else pickle.loads(path.read_bytes())
    assert marker.exists()  # the trap works
