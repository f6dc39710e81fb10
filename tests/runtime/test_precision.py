import pytest
import torch

from options import UsageError
from runtime.precision import DeviceOptions, Machine, MachineOptions, choose_device, choose_machine


def test_precision_is_the_one_asked_for():
    assert choose_machine(MachineOptions("cpu", precision="fp32")) == Machine(torch.device("cpu"), "fp32")
    assert choose_machine(MachineOptions("cpu", precision="bf16")).precision == "bf16"


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta", "cpu:x"])
def test_a_device_that_cannot_be_used_is_the_users_error(name):
    with pytest.raises(UsageError, match=f"--device {name}: expected auto, cpu, cuda or cuda:N of this machine"):
        choose_device(DeviceOptions(name))


def test_autocast_follows_the_precision():
    with Machine(torch.device("cpu"), "bf16").autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with Machine(torch.device("cpu"), "fp32").autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
