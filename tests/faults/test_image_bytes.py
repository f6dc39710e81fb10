"""PNGs with damaged metadata and sound pixels, and files named like images that hold something else."""

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets_prep.images import BadImageError, decode_image, image_extent, read_image, read_map
from tests.faults.zoo import exif_block

ROOT = Path(__file__).parents[2]
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
HEADER_END = 8 + 12 + 13  # of the signature and the header chunk


def encoded(image: Image.Image, **settings) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **settings)
    return file.getvalue()


PNG = encoded(Image.fromarray(PIXELS))


def chunk(name: bytes, content: bytes, sound: bool = True) -> bytes:
    checksum = zlib.crc32(name + content) ^ (not sound)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


def with_chunks(*chunks: bytes, data: bytes = PNG, late: bool = False) -> bytes:
    """A PNG with chunks after its header or, with `late`, after its pixels."""
    place = len(data) - 12 if late else HEADER_END
    return data[:place] + b"".join(chunks) + data[place:]


def pixels_of(data: bytes) -> np.ndarray:
    height, width = image_extent(io.BytesIO(data), "image")
    pixels = decode_image(data, None, "image").permute(1, 2, 0).numpy()
    assert pixels.shape[:2] == (height, width)
    return pixels


INFLATED = zlib.compress(b"a" * 3_000_000)
DAMAGED = {
    "profile": chunk(b"iCCP", b"name\0\0" + zlib.compress(b"profile"), sound=False),
    "density": chunk(b"pHYs", b"\0\0\0\1\0\0\0\1\1", sound=False),
    "short density": chunk(b"pHYs", b"\0"),
    "unknown": chunk(b"abCd", b"anything", sound=False),
    "text": chunk(b"tEXt", b"key\0value", sound=False),
    "large profile": chunk(b"iCCP", b"name\0\0" + INFLATED),
    "large text": chunk(b"zTXt", b"key\0\0" + INFLATED),
    "large international text": chunk(b"iTXt", b"key\0\1\0\0\0" + INFLATED),
    "unknown compression": chunk(b"iCCP", b"name\0\7content"),
    "many texts": b"".join(chunk(b"tEXt", b"key%d\0" % number + b"a" * 1_000_000) for number in range(68)),
}


@pytest.mark.parametrize("late", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_metadata_leaves_the_pixels(name, late):
    np.testing.assert_array_equal(pixels_of(with_chunks(DAMAGED[name], late=late)), PIXELS)


def test_a_damaged_exif_chunk_before_the_pixels_is_ignored():
    np.testing.assert_array_equal(pixels_of(with_chunks(chunk(b"eXIf", exif_block(6)[6:], sound=False))), PIXELS)


def test_a_sound_orientation_and_transparency_survive_damaged_metadata():
    turned = with_chunks(DAMAGED["profile"], chunk(b"eXIf", exif_block(6)[6:]))
    np.testing.assert_array_equal(pixels_of(turned), np.rot90(PIXELS, -1))
    seen = encoded(Image.fromarray(PIXELS), transparency=tuple(int(value) for value in PIXELS[2, 3]))
    shown = PIXELS.copy()
    shown[2, 3] = 0
    np.testing.assert_array_equal(pixels_of(with_chunks(DAMAGED["text"], data=seen)), shown)


@pytest.mark.parametrize("metadata", [b"", DAMAGED["profile"]], ids=["none", "damaged"])
def test_damaged_pixels_are_refused(metadata):
    data = with_chunks(metadata)
    middle = data.index(b"IDAT") + 20
    for damaged in (data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :], data[:middle]):
        with pytest.raises(BadImageError, match="^cannot read the image damaged"):
            decode_image(damaged, None, "damaged")


def test_damaged_transparency_is_refused():
    """Without it, hidden colors would become visible."""
    data = encoded(Image.fromarray(PIXELS), transparency=(1, 2, 3))
    place = data.index(b"tRNS") + 4
    with pytest.raises(BadImageError):
        decode_image(data[:place] + b"\xff" + data[place + 1 :], None, "damaged")


def test_label_maps_with_damaged_metadata_are_read(tmp_path):
    ids = Image.fromarray(np.arange(35, dtype=np.uint8).reshape(5, 7) % 3)
    (tmp_path / "image.png").write_bytes(with_chunks(DAMAGED["density"]))
    (tmp_path / "map.png").write_bytes(with_chunks(DAMAGED["profile"], data=encoded(ids)))
    found = read_map(tmp_path / "map.png", tmp_path / "image.png", 5, 3)
    np.testing.assert_array_equal(found.numpy(), np.array(ids)[:, 1:6])


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "it is empty"),
        (bytes(300), "it holds only zero bytes"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", r"it holds a HEIF \(HEIC\) image; convert it"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "it holds a Git LFS pointer"),
        (b"\n <!DOCTYPE HTML><p>Quota exceeded", "it holds a web page; download the image again"),
        (b"\xef\xbb\xbf<html>", "it holds a web page"),
        (b"PK\x03\x04 and more", "it holds a zip archive; unpack it"),
        (b"\xff\x0a and more", "it holds a JPEG XL image"),
        (b"\0\x05\x16\x07\0\2\0\0Mac OS X", "it holds metadata of macOS"),
        (b"a letter", "it is not in a known image format"),
    ],
)
def test_a_file_that_holds_something_else_is_told_apart(tmp_path, content, found):
    (tmp_path / "named.jpg").write_bytes(content)
    for read in (lambda path: read_image(path, 8), lambda path: image_extent(path, str(path))):
        with pytest.raises(BadImageError, match=rf"^cannot read the image .*named\.jpg: {found}") as caught:
            read(tmp_path / "named.jpg")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("suffix", "format"), [("jpg", "WEBP"), ("png", "GIF"), ("jpg", "TIFF"), ("webp", "BMP"), ("bmp", "PNG")]
)
def test_the_content_decides_not_the_suffix(tmp_path, suffix, format):
    color = Image.new("RGB", (6, 4), (255, 0, 0))
    color.save(tmp_path / f"image.{suffix}", format, **({"lossless": True} if format == "WEBP" else {}))
    found = read_image(tmp_path / f"image.{suffix}", None)
    assert found.shape == (3, 4, 6)
    assert found.flatten(1).unique(dim=1).flatten().tolist() == [255, 0, 0]


def test_pillow_does_not_warn_of_what_is_read(tmp_path):
    """Its warnings fill the terminal: one for each image with a broken EXIF block, and one for each large image."""
    for number in range(3):
        tags = struct.pack("<HHII", 0x0112, 3, 1, 6) + struct.pack("<HHII", 0x0102, 4, 4 + number, 0x7FFFFF00)
        block = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + tags + struct.pack("<I", 0)
        Image.fromarray(PIXELS).save(tmp_path / f"{number}.jpg", exif=block)
    Image.new("1", (30_000, 3_000)).save(tmp_path / "large.png")
    program = (
        "import sys; from pathlib import Path; from datasets_prep.images import read_image\n"
        "for path in sorted(Path(sys.argv[1]).iterdir()): print(read_image(path, 8).shape)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert len(run.stdout.splitlines()) == 4
    assert run.stderr == ""
