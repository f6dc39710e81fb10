import pytest

from command_line import parse_options
from options import UsageError
from runtime.distributed import Processes
from training.setup import prepare, training_groups


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fsdp", "--precision", "fp16"], "--fsdp: fp16's loss scale .* use --precision bf16"),
        (["--fsdp", "--optimizer", "muon"], "--fsdp shards every matrix, and --optimizer muon needs it whole"),
        (["--batch_size", "10", "--grad_accumulation", "4"], "--grad_accumulation 4 .* must divide --batch_size 10"),
    ],
)
def test_contradicting_options_are_refused(flags, message):
    with pytest.raises(UsageError, match=message):
        prepare(parse_options("", training_groups(), ["--device", "cpu", *flags]), Processes())
