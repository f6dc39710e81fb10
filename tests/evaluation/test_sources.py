import io

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.jpeg import through_jpeg
from evaluation.sources import image_batches, open_source, transformed
from options import UsageError

PIXELS = np.random.default_rng(0).integers(0, 255, (5, 8, 8, 3), dtype=np.uint8)
IMAGES = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)


def everything(source, batch_size: int = 2) -> torch.Tensor:
    batches = list(image_batches(source, batch_size))
    assert [index for _, indices in batches for index in indices] == list(range(source.count))
    return torch.cat([images for images, _ in batches])


def encoded(pixels: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


def test_a_folder_may_be_nested_and_mix_formats(tmp_path):
    for index, (place, kind) in enumerate([("a/0", "png"), ("a/b/1", "webp"), ("c/2", "bmp")]):
        path = tmp_path / f"{place}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(PIXELS[index], kind) if kind != "webp" else encoded_lossless(PIXELS[index]))
    source = open_source(tmp_path)
    assert source.names == ("a/0", "a/b/1", "c/2")
    assert torch.equal(everything(source), IMAGES[:3])


def encoded_lossless(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="WEBP", lossless=True)
    return buffer.getvalue()


def test_batches_end_where_the_size_changes(tmp_path):
    for index, (width, height) in enumerate([(4, 4), (4, 4), (8, 5), (4, 4)]):
        Image.new("RGB", (width, height)).save(tmp_path / f"{index}.png")
    shapes = [tuple(images.shape) for images, _ in image_batches(open_source(tmp_path), 3)]
    assert shapes == [(2, 3, 4, 4), (1, 3, 5, 8), (1, 3, 4, 4)]
    same = [tuple(images.shape) for images, _ in image_batches(open_source(tmp_path, image_size=4), 3)]
    assert same == [(3, 3, 4, 4), (1, 3, 4, 4)]


def test_a_bad_image_is_named(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"bad\.png"):
        everything(open_source(tmp_path))


@pytest.mark.parametrize("key", ["images", "arr_0"])
def test_an_npz_of_images(tmp_path, key):
    np.savez(tmp_path / "s.npz", **{key: PIXELS})
    assert torch.equal(everything(open_source(tmp_path / "s.npz")), IMAGES)


def test_other_files_are_refused(tmp_path):
    np.savez(tmp_path / "s.npz", images=PIXELS.astype(np.float32))
    (tmp_path / "text.npz").write_text("no archive")
    for name in ("s.npz", "text.npz", "missing", "photo.jpg"):
        with pytest.raises(UsageError, match=name):
            open_source(tmp_path / name)


def test_an_lmdb_of_encoded_and_of_raw_images(tmp_path):
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(tmp_path / "d.lmdb"), map_size=1 << 20) as database, database.begin(write=True) as transaction:
        for index, pixels in enumerate(PIXELS):
            value = encoded(pixels, "PNG") if index % 2 else pixels.tobytes()
            transaction.put(str(index).encode(), value)
        transaction.put(b"length", b"5")
    assert torch.equal(everything(open_source(tmp_path / "d.lmdb")), IMAGES)
    with (
        lmdb.open(str(tmp_path / "bad.lmdb"), map_size=1 << 20) as database,
        database.begin(write=True) as transaction,
    ):
        transaction.put(b"0", b"1234")
    with pytest.raises(UsageError, match=r"b'0' in .*bad\.lmdb"):
        everything(open_source(tmp_path / "bad.lmdb"))


def test_jpeg_uses_pils_default_quality(tmp_path):
    for images in (IMAGES, IMAGES[:, :1], IMAGES[:1]):
        decoded = through_jpeg(images)
        for image, result in zip(images, decoded, strict=True):
            picture = Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy())
            picture.save(tmp_path / "x.jpg", quality=75)
            expected = np.asarray(Image.open(tmp_path / "x.jpg"))
            assert np.array_equal(result.permute(1, 2, 0).squeeze(2).numpy(), expected)
        assert not torch.equal(decoded, images)


def test_a_transformed_source_describes_the_transform(tmp_path):
    np.savez(tmp_path / "s.npz", images=PIXELS)
    source = transformed(open_source(tmp_path / "s.npz"), through_jpeg, "jpg")
    assert source.meta["image_format"] == "jpg"
    assert torch.equal(everything(source), through_jpeg(IMAGES))
