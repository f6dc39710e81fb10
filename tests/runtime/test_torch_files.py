"""Which files are of torch.save, told by their first bytes alone."""

import pytest
import torch
from safetensors.torch import save

from runtime.torch_files import is_torch_file, read_torch_file


@pytest.mark.parametrize("zipped", [True, False])
def test_both_formats_of_torch_are_known_and_read(zipped, tmp_path):
    torch.save({"a": torch.arange(3)}, tmp_path / "file", _use_new_zipfile_serialization=zipped)
    assert is_torch_file(tmp_path / "file")
    assert read_torch_file(tmp_path / "file")["a"].tolist() == [0, 1, 2]


def test_no_length_of_a_safetensors_header_is_taken_for_a_pickle(tmp_path):
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
