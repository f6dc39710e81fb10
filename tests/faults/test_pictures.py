"""Training, scoring, statistics, LMDBs and masks read the same pixels from one zoo of files."""

import io
from collections.abc import Callable
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image

from datasets_prep.build_lmdb import BuildLmdbOptions, build_lmdb
from datasets_prep.celebamask import _read_part
from datasets_prep.datasets import DatasetOptions, open_dataset
from datasets_prep.image_dataset import DatasetFacts
from datasets_prep.images import (
    BadImageError,
    center_crop,
    crop_map,
    decode_image,
    image_extent,
    read_image,
    read_map,
)
from datasets_prep.label_maps.segmented_dataset import MapClasses
from datasets_prep.label_maps.segmented_files import open_segmented_files
from datasets_prep.masks import MaskSetOptions, mask_set
from evaluation.sources import ImageSource, dataset_source, open_source
from options import UsageError
from tests.faults.zoo import exif_block, pictures

SIDE = 6
ZOO = pictures()
NAMES = sorted(ZOO)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """The zoo in the layouts of folder and ImageNet (train/a/*, val/a/*), and in LMDBs in those of NVAE and LSUN."""
    root = tmp_path_factory.mktemp("zoo")
    for split, names in (("train", NAMES), ("val", NAMES[:1])):
        (root / split / "a").mkdir(parents=True)
        for name in names:
            (root / split / "a" / name).write_bytes(ZOO[name].data)
    for place, key in (("train.lmdb", str), ("church_outdoor_train_lmdb", lambda index: NAMES[index])):
        with lmdb.open(str(root / place), map_size=1 << 22) as database, database.begin(write=True) as transaction:
            for index, name in enumerate(NAMES):
                transaction.put(key(index).encode(), ZOO[name].data)
    return root


def shown(name: str, size: int | None = None) -> np.ndarray:
    """The pixels [H, W, 3] that must be read from a picture."""
    pixels = np.ascontiguousarray(ZOO[name].pixels)
    return pixels if size is None else center_crop(Image.fromarray(pixels), size)


def check(read: Callable[[int], torch.Tensor], size: int | None, names: list[str] = NAMES) -> None:
    wrong = [
        name
        for index, name in enumerate(names)
        if not np.array_equal(read(index).permute(1, 2, 0).numpy(), shown(name, size))
    ]
    assert wrong == []


def in_zoo_order(source: ImageSource, file_names: bool) -> Callable[[int], torch.Tensor]:
    """LMDBs list "10" before "2"; folders are sorted like NAMES."""
    order = list(range(len(NAMES))) if file_names else sorted(range(len(NAMES)), key=str)
    return lambda index: source.read(order.index(index))


@pytest.mark.parametrize("dataset", ["folder", "imagenet_256", "celeba_256", "lsun_church"])
def test_datasets_show_what_a_viewer_shows(root, dataset):
    opened = open_dataset(DatasetOptions(dataset, str(root), SIDE), "train")
    assert len(opened) == len(NAMES)
    check(opened.__getitem__, SIDE)
    check(dataset_source(opened).read, SIDE)  # of statistics and references


@pytest.mark.parametrize("size", [None, SIDE])
@pytest.mark.parametrize("place", ["train/a", "train.lmdb", "church_outdoor_train_lmdb"])
def test_sets_to_score_do_too(root, place, size):
    source = open_source(root / place, size)
    assert source.count == len(NAMES)
    read = in_zoo_order(source, place != "train.lmdb")
    check(read, size)
    assert [source.extent(index) for index in range(source.count)] == [
        tuple(source.read(index).shape[1:]) for index in range(source.count)
    ]


def test_an_npz_of_the_pixels_is_the_same_set(root, tmp_path):
    """Images of the zoo that lie on their side fill another npz."""
    for sideways in (False, True):
        names = [name for name in NAMES if (shown(name).shape[0] > shown(name).shape[1]) == sideways]
        assert len(names) > 3
        np.savez(tmp_path / "images.npz", images=np.stack([shown(name) for name in names]))
        for size in (None, SIDE):
            check(open_source(tmp_path / "images.npz", size).read, size, names)
    gray = np.stack([shown("gray.png"), shown("deep.png")])[..., :1]
    np.savez(tmp_path / "gray.npz", arr_0=gray)
    found = open_source(tmp_path / "gray.npz", SIDE)
    assert np.array_equal(found.read(0)[0].numpy(), shown("gray.png", SIDE)[..., 0])
    assert found.read(1).shape == (1, SIDE, SIDE)


@pytest.mark.parametrize("kind", ["png", "raw"])
def test_a_built_lmdb_holds_them(root, tmp_path, kind):
    paths = [root / "train" / "a" / name for name in NAMES]
    options = BuildLmdbOptions(image_size=SIDE, format=kind)
    assert build_lmdb(tmp_path / "train.lmdb", paths, root, options) == len(NAMES)
    check(open_dataset(DatasetOptions("celeba_256", str(tmp_path), SIDE), "train").__getitem__, SIDE)
    check(in_zoo_order(open_source(tmp_path / "train.lmdb"), False), SIDE)


def test_masks_are_holes_where_the_pictures_are_bright(root):
    masks = mask_set(MaskSetOptions(mask_dir=str(root / "train" / "a")), SIDE)
    for index, name in enumerate(NAMES):
        expected = crop_map(Image.fromarray(shown(name)).convert("L"), SIDE) >= 128
        assert np.array_equal(masks(index).numpy(), expected), name
        gray = np.asarray(Image.fromarray(shown(name)).convert("L"))
        assert np.array_equal(_read_part(root / "train" / "a" / name), gray), name


def test_label_maps_turn_with_their_images(root, tmp_path):
    """Each map's upper half has another class, as the image is stored."""
    paths = [root / "train" / "a" / name for name in NAMES]
    classes = MapClasses(("lower", "upper"))
    maps: list[Path] = []
    (tmp_path / "maps").mkdir()
    for path in paths:
        labels = np.zeros((8, 12), np.uint8)
        labels[:4] = 1
        maps.append(tmp_path / "maps" / f"{path.name}.png")
        Image.fromarray(labels).save(maps[-1])
    facts = DatasetFacts("zoo", SIDE, 3, None, True, ())
    dataset = open_segmented_files(facts, "train", root.parent, paths, maps, classes)
    check(dataset.__getitem__, SIDE)
    upright = np.repeat(np.arange(SIDE)[:, None] < SIDE // 2, SIDE, axis=1)
    for index, name in enumerate(NAMES):
        turned = "turned" in name and not name.startswith("turned_")  # by 90 degrees clockwise
        expected = {
            **dict.fromkeys(("turned_3.png", "turned_4.png"), ~upright),
            **dict.fromkeys(("turned_5.png", "turned_8.png"), upright.T),
            **dict.fromkeys(("turned_6.png", "turned_7.png"), ~upright.T),
        }.get(name, ~upright.T if turned else upright)
        assert np.array_equal(dataset.label_map(index).numpy(), expected), name


def test_whatever_the_exif_block_holds_the_pixels_are_read():
    generator = np.random.default_rng(0)
    values = generator.integers(0, 256, (5, 5, 3), dtype=np.uint8)
    for number in range(300):
        block = bytearray(exif_block(1, broken=bool(number % 2)))
        for _ in range(generator.integers(1, 8)):
            block[generator.integers(0, len(block))] = generator.integers(0, 256)
        for kind, settings in (("PNG", {}), ("WEBP", {"lossless": True})):
            file = io.BytesIO()
            Image.fromarray(values).save(file, kind, exif=bytes(block), **settings)
            with Image.open(file) as image:
                found = read_image(io.BytesIO(file.getvalue()), None).permute(1, 2, 0).numpy()  # type: ignore[arg-type]
                assert image.size == (5, 5)
            turns = [np.rot90(side, turn) for side in (values, values[::-1]) for turn in range(4)]
            assert any(np.array_equal(found, turn) for turn in turns), number


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 65536.0])
def test_gray_values_without_a_meaning_are_refused(tmp_path, value):
    gray = np.full((8, 8), 100, np.float32)
    gray[3, 4] = value
    Image.fromarray(gray).save(tmp_path / "odd.tif")
    with pytest.raises(BadImageError, match=r"odd\.tif: expected finite gray values up to 65535, but found"):
        read_image(tmp_path / "odd.tif", 8)


def test_errors_offer_what_the_command_has(tmp_path):
    """Only training can leave out images."""
    (tmp_path / "bad.png").write_bytes(b"no image")
    for call in (lambda: read_image(tmp_path / "bad.png", 8), lambda: image_extent(tmp_path / "bad.png", "bad.png")):
        with pytest.raises(BadImageError, match="--skip_bad_images"):
            call()
    with pytest.raises(BadImageError, match="^cannot read the image number 3: it is not in a known image format "):
        decode_image(b"no image", 8, "number 3")
    source = open_source(tmp_path)
    for call in (source.read, source.extent, open_source(tmp_path, 8).read):
        with pytest.raises(UsageError, match=r"bad\.png: .* \(repair or remove it\)$"):
            call(0)


def test_an_image_too_narrow_to_resize_is_named(tmp_path):
    Image.new("RGB", (1, 900)).save(tmp_path / "thin.png")
    with pytest.raises(UsageError, match=r"thin of .*aspect ratio of 1 x 900 pixels is above 200"):
        open_source(tmp_path, 8).read(0)
    with pytest.raises(UsageError, match=r"thin\.png: the aspect ratio"):
        build_lmdb(tmp_path / "x.lmdb", [tmp_path / "thin.png"], tmp_path, BuildLmdbOptions(image_size=8))


def test_lmdbs_may_mix_raw_and_encoded_images(tmp_path):
    """A truncated image is named, even if its length is that of a raw one; raw pixels may begin like a JPEG file."""
    raw = [np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8) for seed in range(5)]
    raw[2][0, 0] = 0xFF, 0xD8, 0xFF
    encoded = io.BytesIO()
    Image.fromarray(raw[1]).save(encoded, "PNG")
    values = [raw[0].tobytes(), encoded.getvalue(), raw[2].tobytes(), encoded.getvalue()[:192], raw[4].tobytes()]
    with lmdb.open(str(tmp_path / "x.lmdb"), map_size=1 << 20) as database, database.begin(write=True) as transaction:
        for index, value in enumerate([*values, encoded.getvalue()[:100]]):
            transaction.put(str(index).encode(), value)
    (tmp_path / "x.lmdb").rename(tmp_path / "train.lmdb")
    sets = [
        open_source(tmp_path / "train.lmdb").read,
        open_dataset(DatasetOptions("celeba_256", str(tmp_path), 8), "train").__getitem__,
    ]
    for read in sets:
        for index in (0, 1, 2, 4):
            assert np.array_equal(read(index).permute(1, 2, 0).numpy(), raw[index])
        with pytest.raises(UsageError, match="'5' of .*train.lmdb"):
            read(5)


def test_a_map_of_an_image_with_a_broken_exif_block(tmp_path):
    image = Image.fromarray(np.zeros((4, 6, 3), np.uint8))
    image.save(tmp_path / "image.png", exif=b"Exif\0\0garbage!!")
    labels = np.arange(24, dtype=np.uint8).reshape(4, 6)
    Image.fromarray(labels).save(tmp_path / "map.png")
    assert np.array_equal(read_map(tmp_path / "map.png", tmp_path / "image.png", 4, 30).numpy(), labels[:, 1:5])
