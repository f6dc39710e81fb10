"""The pairs of noise and samples that a run trains on, if its objective needs them."""

from pathlib import Path

from datasets_prep.pairs.pair_cache import PairCache, open_pairs, teachers_autoencoder
from flow.flow_maps.reflow import ReflowOptions
from flow.paths import PathOptions
from models.autoencoders.protocol import Autoencoder
from models.autoencoders.statistics import inherit_scale
from options import UsageError

__all__ = ["open_training_pairs"]


def open_training_pairs(
    options: PathOptions, autoencoder: Autoencoder, image_size: int, classes: int, *, dense: bool
) -> PairCache | None:
    """Open the pairs that an objective's options name; None for an objective without pairs.

    Args:
        options: the objective's.
        autoencoder: the run's.
        image_size: side of the run's images in pixels.
        classes: number of classes of the network.
        dense: whether the network takes a dense condition.

    Raises:
        UsageError: the objective needs pairs and the options name none, or they do not fit the run.
    """
    if not isinstance(options, ReflowOptions):
        return None
    if not options.pairs:
        raise UsageError(
            "--objective reflow needs pairs of noise and samples: build them with python -m datasets_prep.build_pairs, and "
            "name their folder with --pairs"
        )
    if dense:
        raise UsageError("--objective reflow: pairs have no masks or label maps, so the network must not take any")
    if options.coupling != "independent":
        raise UsageError(f"--coupling {options.coupling} would exchange the noise of pairs: leave it out with reflow")
    if teachers := teachers_autoencoder(Path(options.pairs)):
        inherit_scale(autoencoder, teachers)
    side = image_size // autoencoder.factor
    shape = autoencoder.latent_channels, side, side
    return open_pairs(Path(options.pairs), autoencoder.describe(), shape, classes)
