"""Question: what does each switch of the recipe cost in training speed?

    python -m benchmarks.recipe_cost [--variants NAME ...] [--rounds 9] [--num_threads N]

Prepares the default experiment and every variant of benchmarks.recipe as train_flow_latent.py would, and times their training
steps in alternation with the first variant's, by processor time. The printed speed is the median over the rounds, with
quartiles. The runs' folders are temporary.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable

import torch

from benchmarks._timing import markdown_table, processor_seconds
from benchmarks.recipe import VARIANTS, Variant, slug
from command_line import parse_options
from exits import exit_cleanly
from flow.auxiliary.objective import auxiliary_names
from models.registry import NETWORKS
from runtime.distributed import Processes
from tasks.task import GENERATION
from training.data import batches
from training.setup import prepare, training_groups
from training.state import TrainingState

ARGUMENTS = "train_args/fashion_mnist_dit.txt"
STEPS = 10**6  # more than any benchmark takes
HEADER = ["variant", "speed", "quartiles"]


def steps_of(variant: Variant, folder: str, threads: int) -> Callable[[], None]:
    """A function that takes the variant's next training step."""
    words = ["--args_file", ARGUMENTS, "--save_root", folder, "--exp", slug(variant.training)]
    words += ["--num_threads", str(threads), *variant.training]
    run, _ = prepare(parse_options("", training_groups(), words), Processes(), GENERATION)
    options, header = run.training, run.header
    matrices, names = NETWORKS[header.model_type].hidden_matrices, auxiliary_names(run.objective)
    state = TrainingState(
        run.network, run.machine, options.ema_decay, options, hidden_matrices=matrices, auxiliary=names
    )
    stream = batches(
        run.source,
        run.autoencoder,
        run.objective,
        batch_size=options.batch_size,
        first_step=0,
        last_step=STEPS,
        seed=options.seed,
        flips=header.dataset.flips,
        num_classes=header.num_classes,
        label_dropout=header.network.label_dropout,
        device=run.machine.device,
        processes=run.processes,
        path=header.path,
        features=run.features,
    )
    iterator = iter(stream)

    def step() -> None:
        state.advance(run.network, run.objective, next(iterator), options.lr, options.grad_clip)

    return step


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--variants", nargs="+", default=list(VARIANTS), help="as in benchmarks.recipe; default: all names"
    )
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each variant, at least 2; default: 9")
    parser.add_argument("--num_threads", type=int, default=1, help="threads; default: 1")
    own = parser.parse_args()
    if own.rounds < 2:
        parser.error("--rounds: expected at least 2")
    baseline, *others = [Variant.parse(text) for text in own.variants]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        plain = steps_of(baseline, folder, own.num_threads)
        for variant in others:
            step = steps_of(variant, folder, own.num_threads)
            plain(), step()  # memory and caches settle
            ratios = [processor_seconds(plain) / processor_seconds(step) for _ in range(own.rounds)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            rows.append([variant.name, f"{middle:.2f}", f"{low:.2f} to {high:.2f}"])
    print(f"\nrelative to {baseline.name}; {torch.get_num_threads()} threads\n\n{markdown_table(HEADER, rows)}")


if __name__ == "__main__":
    exit_cleanly(main)
