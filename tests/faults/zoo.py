"""One small picture in every mode and container that real folders hold, each with the pixels that a viewer shows."""

import io
import struct
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image

__all__ = ["Picture", "exif_block", "pictures"]

WIDTH, HEIGHT = 12, 8
ORIENTATION, THUMBNAIL = 0x0112, 0x0102


class Picture(NamedTuple):
    """A file's bytes, and its pixels uint8 [H, W, 3] with EXIF orientation, transparency and depth applied."""

    data: bytes
    pixels: np.ndarray


def pictures() -> dict[str, Picture]:
    """Every picture by its file name."""
    return _deep() | _transparent() | _other_modes() | _animated() | _with_exif()


def exif_block(orientation: int, broken: bool = False) -> bytes:
    """An EXIF block; a broken one has a readable orientation and a tag of a wrong type and length."""
    tags = [struct.pack("<HHIHH", ORIENTATION, 3, 1, orientation, 0)]
    tags += [struct.pack("<HHII", THUMBNAIL, 9, 1, 0xFFFFFFFF)] if broken else []
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(tags) + struct.pack("<I", 0)


def _colors(seed: int = 0) -> np.ndarray:
    """Random colors, whose left half is dark and whose right half is bright: uint8 [H, W, 3]."""
    values = np.random.default_rng(seed).integers(0, 100, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    values[:, WIDTH // 2 :] += 150
    return values


def _gray() -> np.ndarray:
    return _colors()[..., 0]


def _as_rgb(gray: np.ndarray) -> np.ndarray:
    return np.repeat(gray[..., None], 3, axis=2)


def _encoded(image: Image.Image, kind: str, **settings: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def _png(values: np.ndarray, color_type: int, transparent: bytes = b"") -> bytes:
    """A PNG of 16 bits per channel, which Pillow can write for gray only: uint16 [H, W] or [H, W, C]."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0))
    extra = chunk(b"tRNS", transparent) if transparent else b""
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def _deep() -> dict[str, Picture]:
    """16-bit, 32-bit and floating-point values."""
    gray, colors = _gray().astype(np.uint16), _colors().astype(np.uint16)
    header = f"P5 {WIDTH} {HEIGHT} 65535\n".encode()
    hidden = np.where(gray == gray[0, 0], 0, gray).astype(np.uint8)
    made = {
        "deep.png": (_png(257 * gray, 0), gray),
        "deep_hidden.png": (_png(257 * gray, 0, struct.pack(">H", 257 * gray[0, 0])), hidden),
        "deep.pgm": (header + (257 * gray).astype(">u2").tobytes(), gray),
        "deep.tif": (_encoded(Image.fromarray(257 * gray), "TIFF"), gray),
        "deep_motorola.tif": (_encoded(Image.fromarray((257 * gray).astype(">u2")), "TIFF"), gray),
        "long.tif": (_encoded(Image.fromarray((257 * gray).astype(np.int32)), "TIFF"), gray),
        "float_1.tif": (_encoded(Image.fromarray((gray / 255).astype(np.float32)), "TIFF"), gray),
        "float_255.tif": (_encoded(Image.fromarray(gray.astype(np.float32)), "TIFF"), gray),
        "float_65535.tif": (_encoded(Image.fromarray((257 * gray).astype(np.float32)), "TIFF"), gray),
    }
    found = {name: Picture(data, _as_rgb(values.astype(np.uint8))) for name, (data, values) in made.items()}
    # Pillow keeps the upper byte of a color with 16 bits.
    return found | {"deep_colors.png": Picture(_png(257 * colors, 2), colors.astype(np.uint8))}


def _transparent() -> dict[str, Picture]:
    """Colors that lie hidden under transparency; they are laid on black."""
    colors, gray = _colors(), _gray()
    alpha = np.full((HEIGHT, WIDTH), 255, np.uint8)
    alpha[2:4], alpha[4:5] = 0, 51  # a fifth of 255
    laid = np.round(colors * (alpha[..., None] / 255)).astype(np.uint8)
    gray_laid = np.round(gray * (alpha / 255)).astype(np.uint8)
    palette = Image.fromarray((np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 3).astype(np.uint8), mode="P")
    table = np.array([[10, 20, 30], [250, 240, 230], [200, 200, 90]], np.uint8)
    palette.putpalette(table.tobytes())
    shown = table.copy()
    shown[1] = 0
    indices = np.asarray(palette)
    rgba = Image.fromarray(np.dstack([colors, alpha]))
    return {
        "alpha.png": Picture(_encoded(rgba, "PNG"), laid),
        "alpha.tif": Picture(_encoded(rgba, "TIFF"), laid),
        "alpha_gray.png": Picture(_encoded(Image.fromarray(np.dstack([gray, alpha])), "PNG"), _as_rgb(gray_laid)),
        "palette.png": Picture(_encoded(palette, "PNG"), table[indices]),
        "palette_hidden.png": Picture(_encoded(palette, "PNG", transparency=1), shown[indices]),
        "palette_hidden.gif": Picture(_encoded(palette, "GIF", transparency=1), shown[indices]),
    }


def _other_modes() -> dict[str, Picture]:
    colors, gray = _colors(), _gray()
    bits = np.where(gray > 128, 255, 0).astype(np.uint8)
    ink = Image.fromarray(np.dstack([255 - colors, np.zeros((HEIGHT, WIDTH), np.uint8)]), mode="CMYK")
    jpeg = _encoded(Image.fromarray(colors).convert("CMYK"), "JPEG")
    return {
        "colors.bmp": Picture(_encoded(Image.fromarray(colors), "BMP"), colors),
        "colors.png": Picture(_encoded(Image.fromarray(colors), "PNG"), colors),
        "gray.png": Picture(_encoded(Image.fromarray(gray), "PNG"), _as_rgb(gray)),
        "bits.png": Picture(_encoded(Image.fromarray(bits).convert("1", dither=0), "PNG"), _as_rgb(bits)),
        "ink.tif": Picture(_encoded(ink, "TIFF"), colors),
        "ink.jpg": Picture(jpeg, np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))),
    }


def _animated() -> dict[str, Picture]:
    first, others = Image.fromarray(_colors()), [Image.fromarray(_colors(seed)) for seed in (1, 2)]
    made = {
        "moving.webp": _encoded(first, "WEBP", lossless=True, save_all=True, append_images=others),
        "moving.png": _encoded(first, "PNG", save_all=True, append_images=others),
        "pages.tif": _encoded(first, "TIFF", save_all=True, append_images=others),
    }
    found = {name: Picture(data, _colors()) for name, data in made.items()}
    frames = [Image.fromarray(np.where(_colors(seed)[..., 0] > 128, 255, 0).astype(np.uint8)) for seed in (0, 1)]
    moving = _encoded(frames[0], "GIF", save_all=True, append_images=[frames[1].transpose(Image.Transpose.ROTATE_180)])
    return found | {"moving.gif": Picture(moving, _as_rgb(np.asarray(frames[0])))}


def _with_exif() -> dict[str, Picture]:
    colors = _colors()
    turned = {  # what a viewer shows, by orientation
        1: colors, 2: colors[:, ::-1], 3: colors[::-1, ::-1], 4: colors[::-1], 5: colors.swapaxes(0, 1),
        6: np.rot90(colors, -1), 7: colors[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(colors),
    }  # fmt: skip
    image = Image.fromarray(colors)
    found = {
        f"turned_{number}.png": Picture(_encoded(image, "PNG", exif=exif_block(number)), shown)
        for number, shown in turned.items()
    }
    for kind, settings in (("webp", {"lossless": True}), ("tif", {}), ("jpg", {"quality": 100})):
        name = {"jpg": "JPEG", "tif": "TIFF", "webp": "WEBP"}[kind]
        plain = np.asarray(Image.open(io.BytesIO(_encoded(image, name, **settings))))
        exif = Image.Exif()
        exif[ORIENTATION] = 6
        block = exif if kind == "tif" else exif_block(6)
        found[f"turned.{kind}"] = Picture(_encoded(image, name, exif=block, **settings), np.rot90(plain, -1))
        if kind == "tif":
            continue
        data = _encoded(image, name, exif=b"Exif\0\0garbage!!", **settings)
        found[f"broken.{kind}"] = Picture(data, plain)
        data = _encoded(image, name, exif=exif_block(6, broken=True), **settings)
        found[f"broken_turned.{kind}"] = Picture(data, np.rot90(plain, -1))
    found["broken.png"] = Picture(_encoded(image, "PNG", exif=b"Exif\0\0garbage!!"), colors)
    found["broken_turned.png"] = Picture(_encoded(image, "PNG", exif=exif_block(6, broken=True)), np.rot90(colors, -1))
    return found
