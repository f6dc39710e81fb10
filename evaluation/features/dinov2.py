"""DINOv2 features (Oquab et al. 2023), recommended by Stein et al. (2023) for the Fréchet distance.

Images are resized to 224 x 224 with bicubic interpolation and normalized with ImageNet's mean and standard deviation, as in
arXiv:2306.04675, Appendix B.
"""

from collections.abc import Collection, Mapping

import timm
import torch
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch.nn.functional import interpolate

from evaluation.features.protocol import PRECISIONS
from evaluation.features.weights import download_weights, read_weights_file
from options import UsageError
from runtime.weights import weights_hash

__all__ = ["DinoFeatures"]

SIDE = 224
DEFAULT_SIZE = "large"
SIZE_OF_WIDTH = {384: "small", 768: "base", 1024: "large", 1536: "giant"}


class DinoFeatures:
    """The class token of a DINOv2 transformer after the final layer norm. Grayscale images are repeated to RGB.

    Args:
        weights_file: state dict in timm's or the original format. Its width determines the model size. None: ViT-L/14,
            downloaded once.
        device: where the network runs.
        precision: a key of PRECISIONS, the dtype of weights and activations.
    """

    classes: tuple[str, ...] = ()

    def __init__(self, weights_file: str | None, device: torch.device | str, precision: str = "fp32") -> None:
        self.weights_file, self.device, self.precision = weights_file, device, precision
        network, size = _build(weights_file)
        self.name = f"dinov2_{size}"
        self.label = f"FD (DINOv2 ViT-{size[0].upper()}/14)"
        self.outputs: Mapping[str, int] = {"features": network.num_features}
        self.sha256 = weights_hash(network.state_dict())
        self.dtype = PRECISIONS[precision]
        self.network = network.to(device, self.dtype)
        facts = network.pretrained_cfg
        self.mean, self.std = (torch.tensor(facts[key], device=device).view(1, 3, 1, 1) for key in ("mean", "std"))

    def exact(self) -> "DinoFeatures":
        """Return this network in float32, or itself if it already is in float32."""
        return self if self.precision == "fp32" else DinoFeatures(self.weights_file, self.device)

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor, outputs: Collection[str]) -> dict[str, torch.Tensor]:
        """Compute the output "features" float32 [B, D] for images uint8 [B, 1 or 3, H, W] of any size."""
        pixels = images.to(self.device).float() / 255
        if pixels.shape[2:] != (SIDE, SIDE):
            resized = interpolate(pixels, size=(SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False)
            pixels = resized.clamp(0, 1)
        found = {"features": self.network(((pixels - self.mean) / self.std).to(self.dtype)).float()}
        return {name: found[name] for name in outputs}


def _build(weights_file: str | None) -> tuple[VisionTransformer, str]:
    if weights_file is None:
        url = timm.get_pretrained_cfg(_timm_name(DEFAULT_SIZE)).url
        weights = download_weights(str(url), "DINOv2", "--feature_weights")
    else:
        weights = read_weights_file(weights_file)
    where = weights_file or "the downloaded weights"
    try:
        size = SIZE_OF_WIDTH[weights["cls_token"].shape[-1]]
        network = timm.create_model(_timm_name(size), pretrained=False, img_size=SIDE, num_classes=0)
        network.load_state_dict(checkpoint_filter_fn(weights, network))
    except (KeyError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"cannot load {where} as --feature_weights: expected the state dict of a DINOv2 transformer with patch size 14 "
            f"and without registers ({reason})"
        ) from error
    return network.eval().requires_grad_(False), size


def _timm_name(size: str) -> str:
    return f"vit_{size}_patch14_dinov2.lvd142m"
