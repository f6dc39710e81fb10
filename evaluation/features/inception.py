"""pytorch_fid's InceptionV3, the network of the FID, arranged to run fast.

Every published FID uses the weights of one TensorFlow graph from 2015. Batch normalisation is folded into the convolutions,
and tensors lie in memory channels-last; neither changes a feature by more than rounding (benchmarks/scoring.py).
"""

from collections.abc import Collection, Mapping
from unittest import mock

import torch
from torch import nn
from torch.nn.functional import interpolate
from torch.nn.utils import fuse_conv_bn_eval
from torchvision.models.inception import BasicConv2d

from evaluation.features.protocol import PRECISIONS
from evaluation.features.weights import download_weights, read_weights_file
from options import UsageError
from runtime.torch_files import weights_hash

__all__ = ["INCEPTION_DIMS", "InceptionFeatures"]

INCEPTION_DIMS = (64, 192, 768, 2048)  # after the first and second pooling, before the auxiliary classifier, at the end
SIDE = 299  # pixels that the network sees
SPATIAL_LAYER = (2, 6)  # block and place of Mixed_6d, which the TensorFlow graph calls mixed_6
SPATIAL_CHANNELS = 7  # of 768, which gives about as many features as pooling does (Nash et al. 2021)
SPATIAL_WIDTH = SPATIAL_CHANNELS * 17 * 17


class InceptionFeatures:
    """Average-pooled activations of InceptionV3; grey images are repeated to RGB.

    At 2048 features it also has "spatial", the first 7 channels of Mixed_6d (ReLU included), and "logits" without the bias,
    from which the Inception Score has always been computed.

    Args:
        weights_file: state dict in pytorch_fid's format; None: the published one, downloaded once.
        device: where the network runs.
        dims: the layer, by its number of features: 64, 192, 768 or 2048 (the FID's).
        precision: a key of PRECISIONS, for the network's weights and activations.
    """

    classes: tuple[str, ...] = ()  # the logits' 1008 classes have no names here

    def __init__(
        self, weights_file: str | None, device: torch.device | str, dims: int = 2048, precision: str = "fp32"
    ) -> None:
        if dims not in INCEPTION_DIMS:
            raise UsageError(f"--dims {dims}: InceptionV3 has layers of {', '.join(map(str, INCEPTION_DIMS))} features")
        whole = dims == INCEPTION_DIMS[-1]
        self.weights_file, self.device, self.dims, self.precision = weights_file, device, dims, precision
        self.name = "inception" if whole else f"inception_{dims}"
        self.label = "FID" if whole else f"FID ({dims} features)"
        network, classifier = _build(weights_file, dims)
        self.sha256 = weights_hash(network.state_dict())
        self.classifier = classifier.to(device)
        further = {"spatial": SPATIAL_WIDTH, "logits": len(classifier)} if whole else {}
        self.outputs: Mapping[str, int] = {"features": dims, **further}
        _fold_normalisation(network)
        self.dtype = PRECISIONS[precision]
        self.network = network.to(device, self.dtype).to(memory_format=torch.channels_last)

    def exact(self) -> "InceptionFeatures":
        """The same network in float32: itself, if it already is."""
        return self if self.precision == "fp32" else InceptionFeatures(self.weights_file, self.device, self.dims)

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor, outputs: Collection[str]) -> dict[str, torch.Tensor]:
        """Compute `outputs` of images uint8 [B, 1 or 3, H, W] of any size.

        Returns:
            Features [B, dims], spatial [B, 2023] and logits [B, 1008], as far as `outputs` names them, in float32.
        """
        found: dict[str, torch.Tensor] = {}
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            x = self._prepare(images)
            for number, block in enumerate(self.network):
                for place, layer in enumerate(block.children()):
                    x = layer(x)
                    if (number, place) == SPATIAL_LAYER and "spatial" in outputs:
                        found["spatial"] = x[:, :SPATIAL_CHANNELS].float().flatten(1)
                        if len(outputs) == 1:
                            return found
        found["features"] = x.float().mean((2, 3))
        if "logits" in outputs:
            found["logits"] = found["features"] @ self.classifier.T
        return {name: found[name] for name in outputs}

    def _prepare(self, images: torch.Tensor) -> torch.Tensor:
        pixels = images.to(self.device).float() / 255
        if pixels.shape[2:] != (SIDE, SIDE):
            pixels = interpolate(pixels, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        pixels = (2 * pixels - 1).expand(-1, 3, -1, -1)
        return pixels.to(self.dtype).contiguous(memory_format=torch.channels_last)


def _build(weights_file: str | None, dims: int) -> tuple[nn.ModuleList, torch.Tensor]:
    """The blocks up to the layer of `dims` features, without its pooling, and the classifier's weight [1008, 2048]."""
    from pytorch_fid import inception  # pip's

    url = inception.FID_WEIGHTS_URL
    weights = (
        download_weights(url, "Inception", check_hash=True) if weights_file is None else read_weights_file(weights_file)
    )
    last = inception.InceptionV3.BLOCK_INDEX_BY_DIM[dims]
    # The constructor downloads unconditionally; for its duration it gets the weights that are already here.
    with mock.patch.object(inception, "load_state_dict_from_url", return_value=weights):
        try:
            blocks = inception.InceptionV3([last]).eval().requires_grad_(False).blocks
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise UsageError(
                f"--feature_weights {weights_file} does not fit pytorch_fid's InceptionV3: expected the state dict "
                f"published at {url}, but: {reason}"
            ) from error
    if isinstance(blocks[-1][-1], nn.AdaptiveAvgPool2d):
        blocks[-1] = blocks[-1][:-1]
    return blocks, weights["fc.weight"].float()


def _fold_normalisation(module: nn.Module) -> None:
    """Fold every convolution's batch normalisation into its weights, in place."""
    for child in module.children():
        if isinstance(child, BasicConv2d):
            child.conv, child.bn = fuse_conv_bn_eval(child.conv, child.bn), nn.Identity()
        else:
            _fold_normalisation(child)
