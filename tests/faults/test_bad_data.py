"""For any file content, a reader returns data or raises UsageError. It runs no code and does not exhaust memory."""

import gzip
import io
import json
import os
import pickle
import tracemalloc
import warnings
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save as serialize

from checkpoints.files import read_weights, save_weights
from checkpoints.lfm_files import read_published
from command_line import read_arguments_file
from datasets_prep.idx import read_idx
from datasets_prep.images import BadImageError, decode_image, read_image, read_map
from datasets_prep.latent_cache import open_standalone_cache
from datasets_prep.latents import open_latents
from datasets_prep.lmdb_file import open_lmdb_file
from evaluation.features.weights import read_weights_file
from evaluation.sources import open_source
from evaluation.statistics import load_statistics
from models.dit import DiTOptions
from options import UsageError, option
from runtime.files import UNREADABLE, read_json
from runtime.torch_files import read_torch_file
from runtime.unpickling import load_numpy_pickle
from tests.conftest import smooth_image
from tests.faults.mutations import mutated
from tests.headers import header_of

COUNTS = pytest.mark.parametrize("count", [100, pytest.param(500, marks=pytest.mark.slow)])
BOMB_SIDE = 14_000


class Marker:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def check(originals, count, folder, read):
    """Write `count` damaged files to `folder`. Each must be read or refused, and at least a tenth must be refused."""
    refused = []
    for number, (name, data) in enumerate(mutated(originals, count)):
        path = folder / name
        path.write_bytes(data)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read(path)
        except UsageError as error:
            refused.append(f"number {number}, {name}: {error}")
        except Exception as error:
            raise AssertionError(f"number {number}, {name}: {type(error).__name__}: {error}") from error
    assert len(refused) >= count // 10
    assert [message for message in refused if "\n" in message] == []
    assert not (folder / "executed").exists()


def encoded(image, **settings):
    file = io.BytesIO()
    image.save(file, **settings)
    return file.getvalue()


def images():
    """A small image in many formats."""
    image = Image.fromarray(smooth_image(31, 22, seed=0))
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray(np.arange(31 * 22, dtype=np.uint16).reshape(22, 31) * 90)
    return {
        "rgb.png": encoded(image, format="PNG"),
        "palette.png": encoded(image.quantize(16), format="PNG", transparency=3),
        "deep.png": encoded(deep, format="PNG"),
        "turned.jpg": encoded(image, format="JPEG", exif=exif),
        "progressive.jpg": encoded(image, format="JPEG", progressive=True),
        "cmyk.jpg": encoded(image.convert("CMYK"), format="JPEG"),
        "moving.gif": encoded(image.quantize(8), format="GIF", save_all=True, append_images=[image.quantize(4)]),
        "image.bmp": encoded(image, format="BMP"),
        "packed.tif": encoded(image, format="TIFF", compression="tiff_lzw"),
        "image.webp": encoded(image, format="WEBP"),
        "image.ppm": encoded(image, format="PPM"),
    }


@COUNTS
def test_images(tmp_path, count):
    check(images(), count, tmp_path, lambda path: read_image(path, 8))


@COUNTS
def test_label_maps(tmp_path, count):
    (tmp_path / "image.png").write_bytes(images()["rgb.png"])
    labels = Image.fromarray(np.arange(31 * 22, dtype=np.uint8).reshape(22, 31) % 7)
    palette = labels.copy()
    palette.putpalette(bytes(range(21)))
    maps = {"grey.png": encoded(labels, format="PNG"), "palette.png": encoded(palette, format="PNG")}
    check(maps, count, tmp_path, lambda path: read_map(path, tmp_path / "image.png", 8, 7))


@COUNTS
def test_images_to_score(tmp_path, count):
    originals = {name: data for name, data in images().items() if "rgb" in name or "jpg" in name}

    def read(path):
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / path.name).write_bytes(path.read_bytes())
        source = open_source(tmp_path / "set")
        try:
            for index in range(source.count):
                source.read(index)
        finally:
            (tmp_path / "set" / path.name).unlink()

    check(originals, count, tmp_path, read)


def test_a_decompression_bomb_is_refused(tmp_path):
    """196 megapixels of a single color in a file of a few kilobytes."""
    Image.new("1", (BOMB_SIDE, BOMB_SIDE)).save(tmp_path / "bomb.png", compress_level=9)
    assert (tmp_path / "bomb.png").stat().st_size < 100_000
    with pytest.raises(BadImageError, match=r"bomb\.png.*(196000000 pixels|decompression bomb)"):
        read_image(tmp_path / "bomb.png", 8)


@pytest.mark.parametrize("extent", [(1, 60_000), (60_000, 2)])
def test_an_image_that_would_be_enlarged_without_bound_is_refused(tmp_path, extent):
    """With a shorter side of 256, an image of 1 x 60,000 pixels would take 12 GB, and 99.98 % of it would be cropped."""
    Image.new("RGB", extent).save(tmp_path / "thin.png")
    with pytest.raises(
        BadImageError, match=rf"thin\.png: the aspect ratio of {extent[0]} x {extent[1]} pixels is above 200"
    ):
        read_image(tmp_path / "thin.png", 256)
    with pytest.raises(BadImageError, match="aspect ratio .* is above 200"):
        decode_image((tmp_path / "thin.png").read_bytes(), 256, "thin")


def test_a_bomb_in_a_text_chunk_is_not_inflated(tmp_path):
    notes = PngInfo()
    notes.add_text("comment", "x" * 20_000_000, zip=True)
    Image.new("RGB", (9, 9), (3, 1, 4)).save(tmp_path / "noted.png", pnginfo=notes)
    assert (tmp_path / "noted.png").stat().st_size < 200_000
    tracemalloc.start()
    try:
        image = read_image(tmp_path / "noted.png", None)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert image.flatten(1).unique(dim=1).flatten().tolist() == [3, 1, 4]
    assert peak < 5_000_000


@COUNTS
def test_checkpoints(tmp_path, count):
    save_weights(
        tmp_path / "model.safetensors", {"a": torch.arange(40.0), "b": torch.eye(3)}, header_of(DiTOptions(), step=1)
    )
    foreign = serialize({"a": torch.zeros(5)}, metadata={"header": json.dumps({"format": "other"})})
    originals = {"model.safetensors": (tmp_path / "model.safetensors").read_bytes(), "foreign.safetensors": foreign}
    check(originals, count, tmp_path, read_weights)


@COUNTS
@pytest.mark.parametrize("reader", [read_torch_file, read_published, read_weights_file])
def test_files_of_torch(tmp_path, count, reader):
    originals = {}
    for name, value in {
        "plain": {"network": {"a": torch.arange(40.0)}, "ema": {"weights": {}}, "step": 3},
        "code": {"a": torch.zeros(2), "b": Marker(tmp_path / "executed")},
    }.items():
        for zipped in (True, False):
            torch.save(value, tmp_path / "x", _use_new_zipfile_serialization=zipped)
            originals[f"{name}_{zipped}.pth"] = (tmp_path / "x").read_bytes()
    check(originals, count, tmp_path, reader)


@COUNTS
def test_pickles_of_arrays(tmp_path, count):
    originals = {}
    for protocol in range(2, 6):
        content = {"data": np.arange(30, dtype=np.uint8), "labels": [1, 2], "more": {"x": np.eye(2)}}
        originals[f"plain{protocol}"] = pickle.dumps(content, protocol)
        originals[f"code{protocol}"] = pickle.dumps([np.eye(2), Marker(tmp_path / "executed")], protocol)

    def read(path):
        try:
            load_numpy_pickle(io.BytesIO(path.read_bytes()))
        except UNREADABLE as error:
            raise UsageError("cannot read it") from error

    check(originals, count, tmp_path, read)


def statistics_files(folder):
    content = {"mu": np.zeros(3), "sigma": np.eye(3)}
    np.savez(folder / "a.npz", **content, metadata=np.array(json.dumps({"count": 7})))
    np.savez_compressed(folder / "b.npz", **content)
    np.save(folder / "c.npy", content, allow_pickle=True)
    np.save(folder / "d.npy", {"mu": Marker(folder / "executed"), "sigma": np.eye(3)}, allow_pickle=True)
    return {name: (folder / name).read_bytes() for name in ("a.npz", "b.npz", "c.npy", "d.npy")}


@COUNTS
def test_statistics(tmp_path, count):
    check(statistics_files(tmp_path), count, tmp_path, load_statistics)


@pytest.mark.parametrize("metadata", ["3", '"text"', "[1, 2]", "{", "[" * 100_000])
def test_statistics_with_odd_metadata(tmp_path, metadata):
    np.savez(tmp_path / "s.npz", mu=np.zeros(2), sigma=np.eye(2), metadata=np.array(metadata))
    with pytest.raises(UsageError, match="s.npz"):
        load_statistics(tmp_path / "s.npz")


@COUNTS
def test_npz_of_images(tmp_path, count):
    pixels = np.zeros((2, 6, 6, 3), np.uint8)
    np.savez(tmp_path / "a.npz", images=pixels)
    np.savez_compressed(tmp_path / "b.npz", arr_0=pixels)
    check({name: (tmp_path / name).read_bytes() for name in ("a.npz", "b.npz")}, count, tmp_path, open_source)


@COUNTS
def test_latents(tmp_path, count):
    latent = np.random.default_rng(0).normal(size=(4, 3, 3)).astype(np.float32)
    np.save(tmp_path / "a.npy", latent)
    np.savez_compressed(tmp_path / "b.npz", moments=latent)
    originals = {name: (tmp_path / name).read_bytes() for name in ("a.npy", "b.npz")}

    def read(path):
        folder = tmp_path / "latents"
        folder.mkdir(exist_ok=True)
        (folder / path.name).write_bytes(path.read_bytes())
        try:
            dataset = open_latents("latents", folder, "train", 24)
            dataset.stored(torch.tensor([0]), torch.tensor([False]))
        finally:
            (folder / path.name).unlink()

    check(originals, count, tmp_path, read)


@COUNTS
def test_idx_files(tmp_path, count):
    plain = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 3]) + bytes(range(18))
    originals = {"plain-ubyte": plain, "packed-ubyte.gz": gzip.compress(plain)}
    check(originals, count, tmp_path, lambda path: read_idx(path.parent, path.name.removesuffix(".gz")))


def cache_folder(folder):
    """A tiny finished cache of three images in two shards."""
    import zlib

    folder.mkdir()
    entries = []
    for name, array in [
        ("moments_00000.npy", np.zeros((2, 1, 2, 2, 2), np.float16)),
        ("moments_00001.npy", np.zeros((1, 1, 2, 2, 2), np.float16)),
        ("labels.npy", np.arange(3)),
    ]:
        np.save(folder / name, array)
        entries.append({"file": name, "crc32": zlib.crc32((folder / name).read_bytes())})
    manifest = {"format": "latent-cache-2", "orientations": 1, "moment_shape": [2, 2, 2], "shard_size": 2}
    manifest |= {"labels": entries[2], "shards": entries[:2]}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2))
    return folder


@COUNTS
def test_caches(tmp_path, count):
    """Damages any of a cache's files."""
    cache = cache_folder(tmp_path / "cache")
    assert len(open_standalone_cache(cache)[0]) == 3
    originals = {path.name: path.read_bytes() for path in cache.iterdir()}
    before = dict(originals)

    def read(path):
        (cache / path.name).write_bytes(path.read_bytes())
        try:
            found, _ = open_standalone_cache(cache)
            found.moments(torch.arange(len(found)), torch.zeros(len(found), dtype=torch.bool))
        finally:
            (cache / path.name).write_bytes(before[path.name])

    check(originals, count, tmp_path, read)


@pytest.mark.parametrize("name", ["moments_00000.npy", "moments_00001.npy", "labels.npy"])
def test_every_flipped_bit_of_a_cache_is_found(tmp_path, name):
    cache = cache_folder(tmp_path / "cache")
    whole = (cache / name).read_bytes()
    for bit in range(0, 8 * len(whole), 13):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        (cache / name).write_bytes(data)
        with pytest.raises(UsageError, match=name):
            open_standalone_cache(cache)


@COUNTS
def test_json_files(tmp_path, count):
    originals = {"a.json": json.dumps({"options": {"lr": 1e-3, "x": [1, 2, None]}, "git": "ä"}).encode()}
    check(originals, count, tmp_path, read_json)


@COUNTS
def test_arguments_files(tmp_path, count):
    from dataclasses import dataclass, fields

    @dataclass(frozen=True)
    class Group:
        """Group."""

        model_type: str = option("a", "a")
        nf: int = option(1, "a")
        ch_mult: tuple[int, ...] = option((1,), "a")

    known = {field.name: field for field in fields(Group)}
    command = f"mkdir {tmp_path}/executed"
    text = f"MODEL_TYPE='DiT-B/2'  # $({command})\nNF=128 CH_MULT=1 2 2\nMODEL_TYPE=`{command}`\n"
    check({"a.txt": text.encode()}, count, tmp_path, lambda path: read_arguments_file(path, known))


def write_lmdb(path, entries):
    environment = lmdb.open(str(path), map_size=1 << 22, subdir=False, lock=False)
    with environment, environment.begin(write=True) as transaction:
        for key, value in entries.items():
            transaction.put(key, value)


def test_lmdbs_that_are_cut_or_none(tmp_path):
    """LMDB pages are not damaged here: liblmdb memory-maps the file without checksums."""
    write_lmdb(tmp_path / "whole", {str(i).encode(): bytes(3000) for i in range(20)})
    data = (tmp_path / "whole").read_bytes()
    assert len(open_lmdb_file(tmp_path / "whole")) == 20
    for number, keep in enumerate((0, 1, 100, 4096, 8192, len(data) // 2, len(data) - 4096)):
        path = Path(tmp_path / f"cut{number}")
        path.write_bytes(data[:keep])
        with pytest.raises(UsageError, match=f"cut{number}"):
            open_lmdb_file(path)
    (tmp_path / "noise").write_bytes(np.random.default_rng(0).bytes(20_000))
    with pytest.raises(UsageError, match="noise"):
        open_lmdb_file(tmp_path / "noise")
