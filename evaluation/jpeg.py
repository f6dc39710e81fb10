"""The published protocol of LFM's scores: samples are written as JPEG files before they are scored. Here without the files."""

import io
from concurrent.futures import ThreadPoolExecutor

import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

__all__ = ["through_jpeg"]

ENCODERS = 8  # threads


def through_jpeg(images: torch.Tensor) -> torch.Tensor:
    """Images uint8 [B, 1 or 3, H, W] encoded as JPEG at PIL's default quality (75, chroma at half resolution) and decoded."""
    if len(images) == 1:
        return _round_trip(images[0].cpu())[None]
    with ThreadPoolExecutor(ENCODERS) as encoders:
        return torch.stack(list(encoders.map(_round_trip, images.cpu())))


def _round_trip(image: torch.Tensor) -> torch.Tensor:
    buffer = io.BytesIO()
    to_pil_image(image).save(buffer, format="JPEG")
    with Image.open(buffer) as decoded:
        return pil_to_tensor(decoded)
