import pytest

from command_line import parse_options
from options import UsageError
from runtime.distributed import Processes
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
