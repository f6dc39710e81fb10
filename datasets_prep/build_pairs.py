"""Draw pairs of noise and the sample that a trained flow makes of it, for --objective reflow.

    python -m datasets_prep.build_pairs --checkpoint model_100.safetensors --pairs pairs --n_pairs 50000 --method dopri5

With --num_process_per_node N, the GPUs share the work. After an interruption, repeat the command to resume. Pair i has the
label i mod K, and the noise of sample i (--seed). Then train with --objective reflow --pairs pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoints.tasks import GENERATE
from datasets_prep.datasets import DatasetOptions
from datasets_prep.pairs.pair_cache import build_pair_cache, pair_identity
from flow.guidance import GuidanceOptions
from flow.solvers import SolverOptions, adds_noise, solve
from options import Options, UsageError, option
from runtime.distributed import Processes
from runtime.messages import show
from runtime.outputs import check_folder
from runtime.precision import MachineOptions
from runtime.processes.launch import run_script
from sampling.loading import LoadedSampler, load_sampler
from sampling.request import IGNORED_SAMPLING_FLAGS, SourceOptions, checkpoint_groups, sampler_request
from sampling.sampler import balanced_labels

__all__ = ["GROUPS", "PairBuildOptions", "main"]


@dataclass(frozen=True)
class PairBuildOptions:
    """Pairs."""

    pairs: str = option("", "folder for the pairs", common=True)
    n_pairs: int = option(50000, "number of pairs", minimum=1, common=True)
    batch_size: int = option(200, "samples per batch", minimum=1, common=True)


GROUPS = (
    PairBuildOptions,
    SourceOptions,
    SolverOptions,
    GuidanceOptions,
    DatasetOptions,
    *checkpoint_groups(),
    MachineOptions,
)


@torch.no_grad()
def main(options: Options, processes: Processes) -> None:
    """Draw the missing pairs with the checkpoint, solver and guidance of the options."""
    own = options[PairBuildOptions]
    if not own.pairs:
        raise UsageError("name the folder of the pairs with --pairs")
    check_folder(Path(own.pairs), "--pairs")
    if adds_noise(options[SolverOptions]):
        raise UsageError(
            "this solver adds noise on the way, so its samples do not belong to their first noise: choose a --method without "
            "noise, such as dopri5, and leave out --churn and --reinject_noise"
        )
    batches = own.n_pairs / own.batch_size / processes.count
    loaded = load_sampler(sampler_request(options), processes, (GENERATE,), batches)
    header, sampler = loaded.header, loaded.sampler
    labels = balanced_labels(range(own.n_pairs), sampler.num_classes)
    facts = header.dataset
    teacher = {name: value for name, value in loaded.settings.items() if name != "compiled"}  # it changes rounding only
    identity = pair_identity(
        teacher, sampler.autoencoder.describe(), facts.name, facts.image_size, sampler.latent_shape, own.n_pairs
    )

    def draw(indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        parts = [indices[first : first + own.batch_size] for first in range(0, len(indices), own.batch_size)]
        drawn = [_draw_batch(loaded, part) for part in parts]
        return torch.cat([data for data, _ in drawn]), torch.cat([noise for _, noise in drawn])

    build_pair_cache(Path(own.pairs), identity, labels, draw, sampler.machine.precision, processes)
    show(f"{own.pairs}: {own.n_pairs} pairs; train with:\n  --objective reflow --pairs {own.pairs}")


def _draw_batch(loaded: LoadedSampler, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and noise [B, c, h, w] of the samples `indices`, on the CPU."""
    sampler = loaded.sampler
    noise = sampler.noise(indices)
    velocity = sampler.velocity(balanced_labels(indices, sampler.num_classes))
    return solve(velocity, noise, sampler.solver).x.cpu(), noise.cpu()


if __name__ == "__main__":
    run_script(main, str(__doc__).splitlines()[0], GROUPS, ignored=IGNORED_SAMPLING_FLAGS)
