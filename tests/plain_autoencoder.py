"""A lossless autoencoder without a posterior, for tests: blocks of 2 x 2 pixels become channels."""

from torch.nn import functional

from models.autoencoders.pixels import images_to_pixels
from models.autoencoders.protocol import AutoencoderFacts

__all__ = ["PlainAutoencoder"]


class PlainAutoencoder:
    factor = 2
    has_posterior = False
    is_pixel_space = False

    def __init__(self, channels, sha256="plain"):
        self.latent_channels = self.moment_channels = 4 * channels
        self.sha256 = sha256

    def describe(self):
        return AutoencoderFacts(id="plain", sha256=self.sha256)

    def to(self, device):
        return self

    def restore_scale(self, stored):
        pass

    def encode(self, images):
        return functional.pixel_unshuffle(images_to_pixels(images), 2)

    def sample(self, moments, noise=None):
        return moments.float()

    def decode(self, latents):
        return functional.pixel_shuffle(latents, 2)

    def lipschitz_bound(self, side):
        return 1.0
