import pytest
import torch

from flow.objectives import OBJECTIVES
from models.conditions import DenseInput
from models.dit import DiTOptions
from models.edm_unet import EdmUNetOptions
from models.registry import Architecture
from options import UsageError
from runtime.precision import Machine
from training.objectives.checks import settle_options

FITTING = DiTOptions(num_classes=3, label_dropout=0.1, until_embedding="interval")
PLAIN = DiTOptions(num_classes=3, label_dropout=0.1)


def settle(name, network=FITTING, own=None, given=None, dense=None, precision="fp32", **way):
    options = OBJECTIVES[name].options(**(own or {}))
    architecture = Architecture("DiT-Mi/2", 8, network, dense)
    machine = Machine(torch.device("cpu"), precision)
    chosen = {"global_batch": 4, "fsdp": False, "auxiliary": False} | way
    return settle_options(name, options, architecture, machine, given or {}, **chosen)


def changed(network, **changes):
    return type(network)(**{**vars(network), **changes})


@pytest.mark.parametrize("name", OBJECTIVES)
def test_fitting_options_are_returned(name):
    network = changed(FITTING, log_variance_head=name == "decoupled_mean_flow")
    assert settle(name, network) == OBJECTIVES[name].options()


@pytest.mark.parametrize("name", [name for name, family in OBJECTIVES.items() if family.trains_averages])
@pytest.mark.parametrize("network", [PLAIN, EdmUNetOptions()])
def test_a_network_without_until_is_refused(name, network):
    with pytest.raises(
        UsageError, match=f"--objective {name} trains average velocities .*--until_embedding interval or"
    ):
        settle(name, network)


def test_velocity_objectives_need_no_until():
    settle("reflow", PLAIN)
    settle("flow_matching", EdmUNetOptions())


@pytest.mark.parametrize("name", [name for name, family in OBJECTIVES.items() if family.trains_averages])
def test_only_objectives_without_derivatives_work_with_fsdp(name):
    if OBJECTIVES[name].differentiates:
        assert name.endswith("mean_flow")
        with pytest.raises(UsageError, match="leave out --fsdp, or choose --objective alpha_flow, shortcut or split"):
            settle(name, fsdp=True)
    else:
        settle(name, fsdp=True)
    with pytest.raises(UsageError, match="auxiliary losses and token routing need a single evaluation"):
        settle(name, auxiliary=True)


def test_options_of_other_objectives_are_refused():
    with pytest.raises(
        UsageError, match="--alpha_min has no effect on --objective mean_flow: .* --objective alpha_flow"
    ):
        settle("mean_flow", given={"alpha_min": 0.1})
    with pytest.raises(UsageError, match="--prediction has no effect .* --objective flow_matching"):
        settle("mean_flow", given={"prediction": "data"})
    with pytest.raises(UsageError, match="--flow_share has no effect on --objective flow_matching"):
        settle("flow_matching", given={"flow_share": 0.5})
    settle("mean_flow", given={"alpha_min": 0.005, "time_sampling": "logit_normal", "batch_size": 7})


def test_guided_targets_need_a_null_condition():
    unguided = changed(FITTING, label_dropout=0.0)
    with pytest.raises(UsageError, match="needs a null condition: set --label_dropout above 0"):
        settle("mean_flow", unguided, {"target_kappa": 0.5})
    with pytest.raises(UsageError, match="set --label_dropout or --condition_dropout above 0"):
        settle("mean_flow", unguided, {"target_kappa": 0.5}, dense=DenseInput(1))
    settle("mean_flow", unguided, {"target_kappa": 0.5}, dense=DenseInput(1, dropout=0.1))
    settle("mean_flow", unguided)


def test_guidance_that_no_target_uses_is_refused():
    with pytest.raises(
        UsageError, match="--objective consistency computes its targets without the velocity that --targe"
    ):
        settle("consistency", own={"target_omega": 2.0})
    with pytest.raises(UsageError, match="--target_interval has no effect without guidance inside the target"):
        settle("mean_flow", own={"target_interval": (0.0, 0.7)})
    settle("mean_flow", own={"target_interval": (0.0, 0.7), "target_kappa": 0.5})
    guided = {"target_interval": (0.0, 0.7), "largest_guidance": 8.0}
    settle("improved_mean_flow", changed(FITTING, guidance_embedding=True), guided)


@pytest.mark.parametrize("name", [name for name, family in OBJECTIVES.items() if family.trains_averages])
def test_objectives_that_see_the_data_in_flow_steps_only_need_such_steps(name):
    if name in ("shortcut", "split_mean_flow"):
        with pytest.raises(
            UsageError, match=f"--flow_share 0: all other steps of --objective {name} compare the network"
        ):
            settle(name, own={"flow_share": 0.0})
        settle(name, own={"flow_share": 0.1})
    else:
        settle(name, changed(FITTING, log_variance_head=name == "decoupled_mean_flow"), own={"flow_share": 0.0})


def test_inputs_and_outputs_of_the_network_must_be_trained():
    with pytest.raises(UsageError, match="--largest_guidance .*: add --guidance_embedding"):
        settle("improved_mean_flow", own={"largest_guidance": 8.0})
    takes = changed(FITTING, guidance_embedding=True)
    settle("improved_mean_flow", takes, {"largest_guidance": 8.0})
    for name in ("improved_mean_flow", "mean_flow", "flow_matching", "reflow"):
        with pytest.raises(UsageError, match=f"--objective {name} does not train --guidance_embedding"):
            settle(name, takes)
    with pytest.raises(UsageError, match="add --log_variance_head, or --no-learned_variance"):
        settle("decoupled_mean_flow")
    settle("decoupled_mean_flow", own={"learned_variance": False})
    has = changed(FITTING, log_variance_head=True)
    for name, own in [("alpha_flow", {}), ("flow_matching", {}), ("decoupled_mean_flow", {"learned_variance": False})]:
        with pytest.raises(UsageError, match=f"--objective {name} does not train --log_variance_head"):
            settle(name, has, own)


def test_alpha_flow_in_low_precision_causes_a_note(capsys):
    settle("alpha_flow", precision="bf16")
    assert "--alpha_min 0.005 magnifies the rounding of bf16" in capsys.readouterr().err
    settle("alpha_flow", own={"alpha_min": 0.05}, precision="bf16")
    settle("alpha_flow")
    assert capsys.readouterr().err == ""
