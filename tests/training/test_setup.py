import numpy as np
import pytest
import torch

from command_line import parse_options
from datasets_prep.datasets import DatasetFacts, ImageDataset
from options import UsageError
from runtime.distributed import Processes
from runtime.precision import Machine
from training.preparation.configuration import configuration_of
from training.setup import prepare, training_groups


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fsdp", "--precision", "fp16"], "--fsdp does not support --precision fp16.* use --precision bf16"),
        (["--fsdp", "--optimizer", "muon"], "--optimizer muon needs whole matrices, which --fsdp shards"),
        (["--batch_size", "10", "--grad_accumulation", "4"], "--grad_accumulation 4 must divide --batch_size 10"),
    ],
)
def test_contradicting_options_are_refused(flags, message):
    with pytest.raises(UsageError, match=message):
        prepare(parse_options("", training_groups(), ["--device", "cpu", *flags]), Processes())


def test_pairings_within_a_processs_batch_resume_in_as_many_processes():
    dataset = ImageDataset(DatasetFacts("tiny", 4, 1, None, False, ()), "train", np.zeros(4, int), [].__getitem__, "f")
    for flags, policy in (([], None), (["--coupling", "optimal_transport"], "on_request")):
        options = parse_options("", training_groups(), flags)
        configuration = configuration_of(options, Machine(torch.device("cpu"), "fp32"), Processes(0, 2), dataset)
        assert configuration.policies.get("processes") == policy
