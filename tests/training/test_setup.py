import pytest

from command_line import parse_options
from options import UsageError
from runtime.distributed import Processes
from training.setup import TRAINING_GROUPS, prepare


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fsdp", "--precision", "fp16"], "--fsdp: the scale of fp16's losses .* use --precision bf16"),
        (["--fsdp", "--optimizer", "muon"], "--fsdp shares every matrix out, and --optimizer muon needs it whole"),
        (["--batch_size", "10", "--grad_accumulation", "4"], "--grad_accumulation 4 .* must divide --batch_size 10"),
    ],
)
def test_options_that_cannot_be_together_are_refused(flags, message):
    with pytest.raises(UsageError, match=message):
        prepare(parse_options("", TRAINING_GROUPS, ["--device", "cpu", *flags]), Processes())
