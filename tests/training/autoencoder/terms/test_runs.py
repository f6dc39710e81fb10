"""Runs with all losses: resumed exactly, in two processes, and from the options to the saved folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from options import as_json
from runtime.files import read_json
from runtime.torch_files import read_torch_file, save_content
from tests.training.autoencoder.small_images import blobs, dataset_of, train
from training.state_file import CONTENT

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def options(runs, tmp_path_factory):
    """A discriminator from step 1 on, an adversarial loss from step 2 on, and an alignment."""
    return runs.ADVERSARIAL | runs.aligned(tmp_path_factory.mktemp("encoder"))


@pytest.mark.parametrize("interrupted", [1, 3])
def test_an_interrupted_training_ends_with_the_same_bits(runs, options, tmp_path, interrupted):
    """Interrupted before the discriminator's first step, and after it."""
    expected = runs.SmallRun(**options).advance(5).weights()
    first = runs.SmallRun(**options).advance(interrupted)
    save_content(tmp_path / "content.pth", first.state.content())
    second = runs.SmallRun(**options)
    second.state.restore(read_torch_file(tmp_path / "content.pth"))
    found = second.advance(5 - interrupted).weights()
    assert found.keys() == expected.keys() > {"discriminator layers.0.weight", "discriminator 0 exp_avg"}
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def run_to(runs, folder, options, steps, **settings):
    given = options | {"batch_size": 4, "lr_schedule": "constant", "max_steps": steps}
    result = train(
        folder / "ae", dataset_of(blobs(16, runs.SIDE)), dataset_of(blobs(8, runs.SIDE)), **given, **settings
    )
    assert result.complete
    return read_torch_file(folder / "ae.training" / CONTENT), result


def same(one, other):
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_a_run_that_goes_on_equals_a_longer_one(runs, options, tmp_path):
    expected, result = run_to(runs, tmp_path / "at once", options, 4)
    run_to(runs, tmp_path / "in parts", options, 2)
    found, _ = run_to(runs, tmp_path / "in parts", options, 4, resume=True)
    for part in ("network", "modules"):
        ours, others = (torch.utils._pytree.tree_leaves(content[part]) for content in (found, expected))
        assert len(ours) == len(others) > 10
        assert all(map(same, ours, others))
    names = {"adversarial", "discriminator", "adversarial_weight", "alignment", "alignment_weight", "squared_error"}
    assert names <= result.validation.keys()
    record = read_json(tmp_path / "at once" / "ae" / "training.json")
    assert {name: record[name] for name in options} == {name: as_json(value) for name, value in options.items()}


def test_two_processes_agree_with_one(runs, options, tmp_path):
    """Momenta are compared, because Adam turns rounding errors of small gradients into whole steps."""
    path = Path(options["align_encoder_weights"])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    finished = subprocess.run(
        [*command, HERE / "two_autoencoders.py", path.parent],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    run = runs.SmallRun(**options).advance(4, rate=1e-4)
    together, alone = torch.load(path.parent / "together.pth"), run.state.content()
    pairs = [(together["optimizers"][0], alone["optimizers"][0])]
    pairs += [
        (together["modules"][name]["optimizer"], alone["modules"][name]["optimizer"]) for name in alone["modules"]
    ]
    assert len(pairs) == 3
    for ours, theirs in pairs:
        vectors = [
            torch.cat([each["exp_avg"].flatten() for each in state["state"].values()]) for state in (ours, theirs)
        ]
        assert (vectors[0] - vectors[1]).norm() < 1e-3 * vectors[1].norm()
    index = 4 + run.loss.names.index("adversarial_weight")  # after the loss, the norm and two counts
    sums = together["sums"][:, index]
    assert sums[0] == sums[1]
    assert sums[0].item() == pytest.approx(alone["sums"].flatten()[index].item(), rel=1e-3)
