"""JPEG compression in memory. LFM's published scores were computed from samples saved as JPEG files."""

import io
from concurrent.futures import ThreadPoolExecutor

import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

__all__ = ["through_jpeg"]

ENCODER_THREADS = 8


def through_jpeg(images: torch.Tensor) -> torch.Tensor:
    """Compress images uint8 [B, 1 or 3, H, W] as JPEG and decode them again.

    Uses PIL's defaults: quality 75, chroma at half resolution.
    """
    if len(images) == 1:
        return _round_trip(images[0].cpu())[None]
    with ThreadPoolExecutor(ENCODER_THREADS) as encoders:
        return torch.stack(list(encoders.map(_round_trip, images.cpu())))


def _round_trip(image: torch.Tensor) -> torch.Tensor:
    buffer = io.BytesIO()
    to_pil_image(image).save(buffer, format="JPEG")
    with Image.open(buffer) as decoded:
        return pil_to_tensor(decoded)
