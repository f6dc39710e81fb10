"""The InceptionV3 features of the FID, with pytorch_fid's layers and weights.

The weights come from the TensorFlow graph of 2015 that every published FID uses. For speed, batch normalization is folded into
the convolutions and tensors are in channels_last memory format. Both change the features only by rounding errors
(benchmarks/scoring.py).
"""

from collections.abc import Collection, Mapping

import torch
from torch import nn
from torch.nn.functional import interpolate
from torch.nn.utils import fuse_conv_bn_eval
from torchvision.models.inception import BasicConv2d, Inception3, InceptionAux, InceptionB, InceptionD

from evaluation.features.protocol import PRECISIONS
from evaluation.features.weights import download_weights, read_weights_file
from options import UsageError
from runtime.weights import weights_hash

__all__ = ["INCEPTION_DIMS", "InceptionFeatures"]

# pytorch_fid's blocks, keyed by their number of output features. They end after the first and the second pooling, before the
# auxiliary classifier, and after the last layer.
BLOCKS = {
    64: ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "maxpool1"),
    192: ("Conv2d_3b_1x1", "Conv2d_4a_3x3", "maxpool2"),
    768: (*(f"Mixed_5{letter}" for letter in "bcd"), *(f"Mixed_6{letter}" for letter in "abcde")),
    2048: ("Mixed_7a", "Mixed_7b", "Mixed_7c"),
}
INCEPTION_DIMS = tuple(BLOCKS)
SIDE = 299  # input size in pixels
SPATIAL_LAYER = (2, 6)  # block and layer index of Mixed_6d, called mixed_6 in the TensorFlow graph
SPATIAL_CHANNELS = 7  # of 768; yields about as many features as average pooling (Nash et al. 2021)
SPATIAL_WIDTH = SPATIAL_CHANNELS * 17 * 17


class InceptionFeatures:
    """Average-pooled activations of InceptionV3. Grayscale images are repeated to RGB.

    With 2048 features, the network has two more outputs: "spatial", the first 7 channels of Mixed_6d after the ReLU, and
    "logits" without the bias, as always used for the Inception Score.

    Args:
        weights_file: state dict in pytorch_fid's format. None: pytorch_fid's own weights, downloaded once.
        device: where the network runs.
        dims: number of features, which selects the layer: 64, 192, 768 or 2048 (used by the FID).
        precision: a key of PRECISIONS, the dtype of weights and activations.

    Raises:
        UsageError: invalid `dims`, or weights that cannot be read, downloaded or loaded.
    """

    classes: tuple[str, ...] = ()

    def __init__(
        self, weights_file: str | None, device: torch.device | str, dims: int = 2048, precision: str = "fp32"
    ) -> None:
        if dims not in INCEPTION_DIMS:
            raise UsageError(f"--dims {dims}: expected one of {', '.join(map(str, INCEPTION_DIMS))} for InceptionV3")
        whole = dims == INCEPTION_DIMS[-1]
        self.weights_file, self.device, self.dims, self.precision = weights_file, device, dims, precision
        self.name = "inception" if whole else f"inception_{dims}"
        self.label = "FID" if whole else f"FID ({dims} features)"
        network, classifier = _build(weights_file, dims)
        self.sha256 = weights_hash(network.state_dict())
        self.classifier = classifier.to(device)
        further = {"spatial": SPATIAL_WIDTH, "logits": len(classifier)} if whole else {}
        self.outputs: Mapping[str, int] = {"features": dims, **further}
        _fold_batch_norm(network)
        self.dtype = PRECISIONS[precision]
        self.network = network.to(device, self.dtype).to(memory_format=torch.channels_last)

    def exact(self) -> "InceptionFeatures":
        """Return this network in float32, or itself if it already is in float32."""
        return self if self.precision == "fp32" else InceptionFeatures(self.weights_file, self.device, self.dims)

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor, outputs: Collection[str]) -> dict[str, torch.Tensor]:
        """Compute `outputs` for images uint8 [B, 1 or 3, H, W] of any size.

        Returns:
            The requested outputs in float32: "features" [B, dims], "spatial" [B, 2023] and "logits" [B, 1008].
        """
        found: dict[str, torch.Tensor] = {}
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            x = self._prepare(images)
            for block_index, block in enumerate(self.network):
                for layer_index, layer in enumerate(block.children()):
                    x = layer(x)
                    if (block_index, layer_index) == SPATIAL_LAYER and "spatial" in outputs:
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
    """Build the blocks up to the layer with `dims` features, without average pooling; also return `fc.weight` [1008, 2048].

    torchvision assembles the network from pytorch_fid's layers, because pytorch_fid's own constructor always downloads weights.
    """
    from pytorch_fid import inception  # the pip package, not this repository's folder

    url = inception.FID_WEIGHTS_URL
    weights = (
        download_weights(url, "Inception", "--feature_weights", check_hash=True)
        if weights_file is None
        else read_weights_file(weights_file)
    )
    layers = [
        BasicConv2d, inception.FIDInceptionA, InceptionB, inception.FIDInceptionC, InceptionD, inception.FIDInceptionE_1,
        InceptionAux,
    ]  # fmt: skip
    network = Inception3(num_classes=1008, aux_logits=False, inception_blocks=layers, init_weights=False)
    network.Mixed_7c = inception.FIDInceptionE_2(2048)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise UsageError(
            f"cannot load --feature_weights {weights_file} into pytorch_fid's InceptionV3: expected the state dict "
            f"published at {url}, but its weights have other names or shapes"
        ) from error
    network.eval().requires_grad_(False)
    needed = INCEPTION_DIMS[: INCEPTION_DIMS.index(dims) + 1]
    blocks = [nn.Sequential(*(network.get_submodule(name) for name in BLOCKS[width])) for width in needed]
    return nn.ModuleList(blocks), weights["fc.weight"].float()


def _fold_batch_norm(module: nn.Module) -> None:
    """Fold batch normalization into the preceding convolutions, in place."""
    for child in module.children():
        if isinstance(child, BasicConv2d):
            child.conv, child.bn = fuse_conv_bn_eval(child.conv, child.bn), nn.Identity()
        else:
            _fold_batch_norm(child)
