import numpy as np
import pytest
import torch
from PIL import Image

from datasets_prep.images import NO_CLASS, center_crop, crop_map, read_image, read_map
from options import UsageError


def gradient(width, height):
    """Red increases to the right from 0 to 240, green increases downwards; blue is 100."""
    image = np.full((height, width, 3), 100, np.uint8)
    image[..., 0] = np.linspace(0, 240, width).round()[None, :]
    image[..., 1] = np.linspace(0, 240, height).round()[:, None]
    return image


def save(tmp_path, image, name="image.png", **settings):
    path = tmp_path / name
    image.save(path, **settings)
    return path


def test_image_of_the_right_size_is_untouched(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    image = read_image(save(tmp_path, Image.fromarray(values)), 24)
    assert image.dtype == torch.uint8
    assert image.is_contiguous()
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), values)


@pytest.mark.parametrize(("width", "height"), [(30, 24), (24, 30), (24, 25), (47, 24)])
def test_the_crop_is_centered(width, height):
    values = gradient(width, height)
    left, top = (width - 24) // 2, (height - 24) // 2
    np.testing.assert_array_equal(center_crop(Image.fromarray(values), 24), values[top : top + 24, left : left + 24])


def test_halving_is_a_box_filter():
    values = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    means = values.reshape(32, 2, 32, 2, 3).astype(float).mean((1, 3))
    assert np.abs(center_crop(Image.fromarray(values), 32) - means).max() <= 1  # rounded along each axis


def test_pixels_equal_adms():
    """The function published with guided diffusion (Dhariwal & Nichol 2021), verbatim."""

    def center_crop_arr(pil_image, image_size):
        while min(*pil_image.size) >= 2 * image_size:
            pil_image = pil_image.resize(tuple(x // 2 for x in pil_image.size), resample=Image.BOX)
        scale = image_size / min(*pil_image.size)
        pil_image = pil_image.resize(tuple(round(x * scale) for x in pil_image.size), resample=Image.BICUBIC)
        arr = np.array(pil_image)
        crop_y = (arr.shape[0] - image_size) // 2
        crop_x = (arr.shape[1] - image_size) // 2
        return arr[crop_y : crop_y + image_size, crop_x : crop_x + image_size]

    generator = np.random.default_rng(0)
    for width, height in [(100, 71), (33, 200), (16, 16), (9, 12), (129, 64), (1, 5)]:
        image = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for size in (8, 16, 31):
            expected = center_crop_arr(image, size)
            assert expected.shape == (size, size, 3)
            np.testing.assert_array_equal(center_crop(image, size), expected)


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate a quarter turn clockwise
    stored = gradient(24, 24)
    shown = read_image(save(tmp_path, Image.fromarray(stored), exif=exif), 24)
    np.testing.assert_array_equal(shown.permute(1, 2, 0).numpy(), np.rot90(stored, -1))


def test_transparent_images_are_composited_on_black(tmp_path):
    values = np.full((8, 8, 4), 200, np.uint8)
    values[:4, :, 3] = 0
    values[4:, :, 3] = 255
    image = read_image(save(tmp_path, Image.fromarray(values)), 8)
    assert image[:, :4].unique().tolist() == [0]
    assert image[:, 4:].unique().tolist() == [200]


def test_transparent_palette_entries_are_composited_on_black(tmp_path):
    image = Image.fromarray((np.arange(64).reshape(8, 8) < 32).astype(np.uint8), mode="P")
    image.putpalette([10, 20, 30, 250, 240, 230])
    found = read_image(save(tmp_path, image, transparency=1), 8)
    assert found[:, :4].unique().tolist() == [0]
    assert found[:, 4:].amax((1, 2)).tolist() == found[:, 4:].amin((1, 2)).tolist() == [10, 20, 30]


@pytest.mark.parametrize("brightest", [65535, 200 * 257, 200])  # the last image is nearly black
def test_sixteen_bit_grey_is_scaled(tmp_path, brightest):
    values = np.linspace(0, brightest, 64).round().astype(np.uint16).reshape(8, 8)
    image = read_image(save(tmp_path, Image.fromarray(values)), 8)
    expected = (values / 257).round()
    for channel in image:
        np.testing.assert_array_equal(channel.numpy(), expected)


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "P", "YCbCr"])
def test_other_modes_become_the_same_colours(tmp_path, mode):
    gray = Image.fromarray(np.repeat(np.repeat([[0, 255], [255, 0]], 4, 0), 4, 1).astype(np.uint8))
    suffix = "jpg" if mode in ("CMYK", "YCbCr") else "png"
    path = save(
        tmp_path, gray.convert("RGB").convert(mode), f"image.{suffix}", **({"quality": 100} if suffix == "jpg" else {})
    )
    found = read_image(path, 8).float()
    assert (found - torch.from_numpy(np.array(gray)).float()).abs().max() <= 3


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tif"])
@pytest.mark.parametrize("keep", [0.0, 0.02, 0.6])
def test_truncated_file_is_named(tmp_path, suffix, keep):
    generator = np.random.default_rng(0)
    path = save(tmp_path, Image.fromarray(generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)), f"bad.{suffix}")
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(UsageError, match=rf"cannot read the image .*bad\.{suffix}: .*--skip_bad_images"):
        read_image(path, 32)


def test_foreign_and_missing_files_are_named(tmp_path):
    (tmp_path / "page.png").write_text("<html></html>")
    for name in ["page.png", "absent.png"]:
        with pytest.raises(UsageError, match=name):
            read_image(tmp_path / name, 32)


def write_pair(tmp_path, image, labels, exif=None, **settings):
    """Write an image and its label map. Returns the paths, the map's first."""
    image_path = save(tmp_path, Image.fromarray(image), **({"exif": exif} if exif else {}))
    return save(tmp_path, Image.fromarray(labels), "map.png", **settings), image_path


@pytest.mark.parametrize(("width", "height"), [(24, 24), (100, 71), (33, 200), (57, 24), (17, 19), (211, 305)])
def test_maps_stay_aligned_with_their_images(tmp_path, width, height):
    """The map quantizes the image's red and green levels in steps of 16. Pixels of the crop must lie within their steps."""
    image = gradient(width, height)
    for channel in (0, 1):
        labels = read_map(*write_pair(tmp_path, image, image[..., channel] // 16), 24, 16)
        assert (labels.dtype, labels.shape) == (torch.uint8, (24, 24))
        shown = read_image(tmp_path / "image.png", 24)[channel].int()
        middle = 16 * labels.int() + 8
        pixel = 240 / (24 * (width, height)[channel] / min(width, height))  # levels spanned by a pixel of the crop
        assert (shown - middle).abs().max() <= 8 + pixel / 2 + 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_maps_are_rotated_with_their_images(tmp_path, orientation):
    """Squares of a single class and color, which the box filter preserves."""
    ids = np.random.default_rng(0).integers(0, 20, (8, 12), dtype=np.uint8)
    image = np.kron(10 * ids, np.ones((4, 4), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    for labels in (ids, np.kron(ids, np.ones((4, 4), np.uint8))):  # at the map's original size, or at the image's
        map_path, image_path = write_pair(tmp_path, np.stack([image] * 3, axis=2), labels, exif)
        assert torch.equal(10 * read_map(map_path, image_path, 8, 20), read_image(image_path, 8)[0])


def test_resizing_creates_no_new_classes():
    labels = np.random.default_rng(0).choice(np.array([3, 200], np.uint8), (71, 100))
    for size in (16, 64, 128):
        assert set(np.unique(crop_map(Image.fromarray(labels), size))) == {3, 200}


def test_a_palette_image_is_not_a_map(tmp_path):
    ids = np.arange(64, dtype=np.uint8).reshape(8, 8)
    image = Image.fromarray(ids)
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    image_path = save(tmp_path, Image.fromarray(gradient(8, 8)))
    assert read_map(save(tmp_path, image, "map.png"), image_path, 8, 64).tolist() == ids.tolist()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros((8, 8, 3), np.uint8), "expected a map of 8-bit class ids, but its mode is RGB"),
        (np.zeros((8, 9), np.uint8), "expected the aspect ratio of .*, 8 x 8, but the map has 9 x 8"),
        (np.full((8, 8), 7, np.uint8), f"expected class ids below 7 or {NO_CLASS}, but found 7"),
    ],
)
def test_foreign_maps_are_named(tmp_path, labels, message):
    with pytest.raises(UsageError, match=rf"map\.png: {message}"):
        read_map(*write_pair(tmp_path, gradient(8, 8), labels), 8, 7)


def test_the_damaged_file_of_a_pair_is_named(tmp_path):
    paths = write_pair(tmp_path, gradient(8, 8), np.zeros((8, 8), np.uint8))
    for path in paths:
        whole = path.read_bytes()
        path.write_bytes(whole[:20])
        with pytest.raises(UsageError, match=rf"cannot read the image .*{path.name}"):
            read_map(*paths, 8, 7)
        path.write_bytes(whole)
