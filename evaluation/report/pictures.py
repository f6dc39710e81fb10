"""Pictures inside the page, as data URIs. Large ones are reduced, so that the page stays small."""

import base64
import io
from html import escape
from pathlib import Path

from PIL import Image

from evaluation.report.run_record import RunRecord
from runtime.files import UNREADABLE

__all__ = ["embed_picture"]

MOST_BYTES = 150_000  # larger PNG files become WebP
MOST_PIXELS = 1400  # width or height of a picture that is encoded again
QUALITY = 82


def embed_picture(path: Path, description: str, run: RunRecord) -> str:
    """An img element with the picture, or "" and an entry in the run's problems if it cannot be read.

    Args:
        path: a PNG file.
        description: what it shows, in words.
        run: the run it belongs to.
    """
    try:
        kind, content, (width, height) = _encoded(path)
    except UNREADABLE as error:
        run.problems.append(f"cannot read {path}: {error}")
        return ""
    data = base64.b64encode(content).decode()
    return (
        f'<img src="data:image/{kind};base64,{data}" alt="{escape(description)}" width="{width}" height="{height}" '
        'loading="lazy">'
    )


def _encoded(path: Path) -> tuple[str, bytes, tuple[int, int]]:
    """Format, bytes and size of a picture; the file itself if it is small."""
    content = path.read_bytes()
    with Image.open(io.BytesIO(content)) as picture:
        picture.load()
        if len(content) <= MOST_BYTES and picture.format == "PNG":
            return "png", content, picture.size
        smaller = picture.convert("RGB")
    smaller.thumbnail((MOST_PIXELS, MOST_PIXELS))
    buffer = io.BytesIO()
    smaller.save(buffer, format="WEBP", quality=QUALITY)
    return "webp", buffer.getvalue(), smaller.size
