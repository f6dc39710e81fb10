"""CelebA-HQ, FFHQ and LSUN as LMDBs in their makers' formats, read back bit for bit by threads and forked processes."""

import io
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import lmdb
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from datasets_prep.datasets import DatasetOptions, open_dataset
from datasets_prep.images import center_crop, read_image
from datasets_prep.lmdb_file import open_lmdb_file
from options import UsageError


def write_lmdb(path, values, keys=None):
    path.mkdir(parents=True, exist_ok=True)
    environment = lmdb.open(str(path), map_size=1 << 26)
    with environment.begin(write=True) as transaction:
        for index, value in enumerate(values):
            transaction.put(keys[index] if keys else str(index).encode(), value)
    environment.close()
    return path


def encode(image, format="PNG", **settings):
    buffer = io.BytesIO()
    image.save(buffer, format, **settings)
    return buffer.getvalue()


def open_split(datadir, split="train", name="celeba_256", size=64, **settings):
    return open_dataset(DatasetOptions(dataset=name, datadir=str(datadir), image_size=size, **settings), split)


@pytest.fixture
def nvae(tmp_path, squares):
    """NVAE's layout of raw images: 20 for training, 4 for validation."""
    write_lmdb(tmp_path / "train.lmdb", [image.tobytes() for image in squares[:20]])
    write_lmdb(tmp_path / "validation.lmdb", [image.tobytes() for image in squares[20:]])
    return tmp_path


@pytest.mark.parametrize("name", ["celeba_256", "ffhq_256"])
def test_raw_images_are_read_exactly(nvae, squares, name):
    train, validation = open_split(nvae, name=name), open_split(nvae, "validation", name=name)
    assert (len(train), len(validation)) == (20, 4)
    for index, image in enumerate(squares):
        found = train[index] if index < 20 else validation[index - 20]
        np.testing.assert_array_equal(found.permute(1, 2, 0).numpy(), image)
    facts = train.facts
    assert (facts.name, facts.flips, facts.crop, facts.channels, facts.class_names) == (name, True, None, 3, ())
    assert train.labels.tolist() == [0] * 20


@pytest.mark.parametrize("size", [32, 48, 100])
def test_resizing_equals_adms(nvae, squares, size):
    found = open_split(nvae, size=size)[11]
    np.testing.assert_array_equal(found.permute(1, 2, 0).numpy(), center_crop(Image.fromarray(squares[11]), size))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("name", ["celeba_512", "celeba_1024"])
def test_encoded_images_are_decoded_like_files(tmp_path, photographs, name, format):
    values = [encode(picture, format) for picture in photographs[:5]]
    write_lmdb(tmp_path / "train.lmdb", values)
    dataset = open_split(tmp_path, name=name, size=48)
    for index, value in enumerate(values):
        (tmp_path / "file").write_bytes(value)
        assert torch.equal(dataset[index], read_image(tmp_path / "file", 48))


def test_an_encoded_image_as_long_as_a_raw_one(tmp_path, squares):
    value = encode(Image.fromarray(squares[0]))
    value += bytes(3 * 200**2 - len(value))  # bytes after the end of an encoded image are ignored
    write_lmdb(tmp_path / "train.lmdb", [value])
    np.testing.assert_array_equal(open_split(tmp_path)[0].permute(1, 2, 0).numpy(), squares[0])


def test_one_lmdb_holds_out_its_last_tenth(tmp_path, squares):
    write_lmdb(tmp_path, [image.tobytes() for image in squares])
    train, validation = open_split(tmp_path), open_split(tmp_path, "validation")
    assert (len(train), len(validation)) == (22, 2)
    np.testing.assert_array_equal(train[21].permute(1, 2, 0).numpy(), squares[21])
    np.testing.assert_array_equal(validation[1].permute(1, 2, 0).numpy(), squares[23])
    assert train.fingerprint != validation.fingerprint


def test_other_keys_are_taken_in_order(tmp_path, squares):
    keys = [f"512-{index:05d}".encode() for index in range(12)]
    write_lmdb(tmp_path / "train.lmdb", [*(image.tobytes() for image in squares[:12]), b"12"], [*keys, b"length"])
    dataset = open_split(tmp_path, name="celeba_512")
    assert len(dataset) == 12
    np.testing.assert_array_equal(dataset[7].permute(1, 2, 0).numpy(), squares[7])


def test_missing_and_damaged_images_are_named(tmp_path, squares, capsys):
    values = [image.tobytes() for image in squares]
    values[3] = values[3][:-1]
    write_lmdb(tmp_path / "train.lmdb", values)
    write_lmdb(tmp_path / "validation.lmdb", values[:3], [b"0", b"1", b"3"])
    with pytest.raises(UsageError, match=r"'3' of .*train\.lmdb: expected 12288 bytes .* found 12287"):
        open_split(tmp_path)[3]
    with pytest.raises(UsageError, match=r"no image '2' of .*validation\.lmdb, which has 3 entries"):
        open_split(tmp_path, "validation")
    kept = open_split(tmp_path, skip_bad_images=True)
    assert len(kept) == 23
    np.testing.assert_array_equal(kept[3].permute(1, 2, 0).numpy(), squares[4])
    assert "left out 1 of 24 images: '3' of" in capsys.readouterr().err
    assert kept.fingerprint != open_split(tmp_path).fingerprint


def test_damaged_encoded_images_are_named(tmp_path, photographs):
    values = [encode(picture, "JPEG") for picture in photographs[:4]]
    values[1] = values[1][:500]
    write_lmdb(tmp_path / "train.lmdb", values)
    with pytest.raises(UsageError, match=r"cannot read the image '1' of .*train\.lmdb: .*Truncated.*--skip_bad_images"):
        open_split(tmp_path)[1]


def test_missing_empty_and_truncated_files(nvae, tmp_path):
    with pytest.raises(UsageError, match=r"expected .*absent/train\.lmdb .*build_lmdb --source FOLDER --datadir"):
        open_split(tmp_path / "absent")
    write_lmdb(tmp_path / "empty" / "train.lmdb", [])
    with pytest.raises(UsageError, match="is empty"):
        open_split(tmp_path / "empty")
    data = nvae / "train.lmdb" / "data.mdb"
    os.truncate(data, data.stat().st_size - 4096)
    with pytest.raises(UsageError, match=r"data\.mdb is truncated"):
        open_split(nvae)
    data.write_bytes(b"no database" * 1000)
    with pytest.raises(UsageError, match=r"cannot open the LMDB .*train\.lmdb"):
        open_split(nvae)


def test_the_fingerprint_is_kept_by_copies_but_not_by_changed_data(nvae, squares, tmp_path):
    before = open_split(nvae).fingerprint
    shutil.copytree(nvae / "train.lmdb", tmp_path / "copy" / "train.lmdb")
    assert open_split(tmp_path / "copy").fingerprint == before
    values = [image.tobytes() for image in squares[:20]]
    for number, changed in enumerate([values[:19], values[1:] + values[:1], [*values[:19], values[0]]]):
        write_lmdb(tmp_path / str(number) / "train.lmdb", changed)
        assert open_split(tmp_path / str(number)).fingerprint != before


def test_an_lmdb_opened_twice_shares_one_handle(nvae):
    train, again = open_split(nvae), open_split(nvae)
    assert torch.equal(train[0], again[0])
    assert open_lmdb_file(nvae / "train.lmdb") is open_lmdb_file(nvae / "." / "train.lmdb")


def test_threads_and_forked_workers_read_the_same(nvae):
    dataset = open_split(nvae)
    expected = torch.stack([dataset[index] for index in range(20)])
    with ThreadPoolExecutor(8) as readers:
        assert torch.equal(torch.stack(list(readers.map(dataset.__getitem__, range(20)))), expected)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.StackDataset(dataset), batch_size=4, num_workers=2, multiprocessing_context="fork"
    )
    assert torch.equal(torch.cat([batch for (batch,) in loader]), expected)


def test_a_forked_process_opens_its_own_environment(nvae):
    file = open_lmdb_file(nvae / "train.lmdb")
    expected, inherited = file.get(b"5"), file._environment
    child = os.fork()
    if not child:
        own = file.get(b"5") == expected and file._environment is not inherited
        os._exit(0 if own else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert file._environment is inherited
    assert file.get(b"5") == expected


LSUN_LAYOUT = [("lsun_church", "church_outdoor"), ("lsun_bedroom", "bedroom")]


@pytest.fixture
def lsun(tmp_path, photographs):
    """Torchvision's layout for both categories: WebP images with hexadecimal hashes as keys."""
    for number, (_, category) in enumerate(LSUN_LAYOUT):
        for part, chosen in (("train", photographs[number:20]), ("val", photographs[20:])):
            values = [encode(picture, "WEBP", quality=90) for picture in chosen]
            keys = [f"{hash_ * 2654435761 % 2**64:040x}".encode() for hash_ in range(1, len(values) + 1)]
            write_lmdb(tmp_path / f"{category}_{part}_lmdb", values, keys)
    return tmp_path


@pytest.mark.parametrize(("name", "category"), LSUN_LAYOUT)
@pytest.mark.parametrize(("split", "part"), [("train", "train"), ("validation", "val")])
def test_lsun_equals_torchvisions(lsun, tmp_path, monkeypatch, name, category, split, part):
    monkeypatch.chdir(tmp_path)  # torchvision caches its list of keys in the current directory
    copy = tmp_path / "copy"
    shutil.copytree(lsun / f"{category}_{part}_lmdb", copy / f"{category}_{part}_lmdb")
    expected = torchvision.datasets.LSUN(str(copy), classes=[f"{category}_{part}"])
    dataset = open_split(lsun, split, name, size=64)
    assert len(dataset) == len(expected) > 3
    for index in range(len(dataset)):
        np.testing.assert_array_equal(dataset[index].permute(1, 2, 0).numpy(), center_crop(expected[index][0], 64))


class Malicious:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_lsun_keys_are_listed_once_and_nothing_is_unpickled(lsun, monkeypatch, capsys):
    pickled = lsun / "church_outdoor_train_lmdb" / "_cache_tmp"
    pickled.write_bytes(pickle.dumps(Malicious()))
    first = open_split(lsun, name="lsun_church")
    cache = lsun / "church_outdoor_train_lmdb_keys.npy"
    assert np.load(cache, allow_pickle=False).shape == (20,)
    with monkeypatch.context() as patch:
        patch.setattr("datasets_prep.lmdb_file.LmdbFile.keys", lambda self: pytest.fail("listed again"))
        assert torch.equal(open_split(lsun, name="lsun_church")[7], first[7])
    stale = np.load(lsun / "church_outdoor_train_lmdb_keys.npy")
    for damage in (
        lambda: np.save(cache, stale[:-1]),
        lambda: np.save(cache, stale[::-1]),
        lambda: np.save(cache, np.array([Malicious()], dtype=object)),
        lambda: cache.write_bytes(cache.read_bytes()[:50]),
    ):
        damage()
        assert torch.equal(open_split(lsun, name="lsun_church")[7], first[7])
        np.testing.assert_array_equal(np.load(cache, allow_pickle=False), stale)
    assert "must not run" not in capsys.readouterr().out


def test_missing_lsun_is_named(tmp_path):
    with pytest.raises(UsageError, match="bedroom_val_lmdb: unpack LSUN's bedroom_val_lmdb.zip"):
        open_split(tmp_path, "validation", "lsun_bedroom")
