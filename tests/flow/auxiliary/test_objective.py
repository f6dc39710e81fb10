"""Objectives with auxiliary losses: the objective's own loss stays what it is, and one forward pass gives all terms."""

from functools import partial
from typing import NamedTuple

import pytest
import torch

from flow.auxiliary.losses import TapBatch, latent_loss, velocity_loss
from flow.auxiliary.objective import Term, WithAuxiliary, auxiliary_names, replace_draws, training_losses
from flow.losses.options import FlowMatchingOptions
from flow.losses.terms import TrainingDraws
from flow.objectives import FlowMatching
from flow.paths import PathOptions
from models.conditions import Condition
from training.data import Batch, StepStreams

BASE = FlowMatching(PathOptions(time_sampling="logit_normal"))
DATA, NOISE = torch.randn(2, 6, 2, 4, 4, generator=torch.Generator().manual_seed(0))
TERMS = {
    "auxiliary_velocity": Term(0.5, velocity_loss, ends=False),
    "align_latents": Term(2.0, latent_loss),
}


class Tapped(NamedTuple):
    velocity: torch.Tensor
    latents: torch.Tensor


class Network:
    """Returns half of its input, with a tap of a third of it; records the keywords of its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, t, x, condition, **named):
        self.calls.append(named)
        return (x / 2, Tapped(x / 3, x / 4)) if named.get("tapped") else x / 2


def streams(step=0):
    return StepStreams(7, step, 6, (2, 4, 4), torch.device("cpu"))


def losses_of(objective, network, step=0):
    draws = objective.draw(streams(step))
    return training_losses(objective, network, DATA, NOISE, draws, Condition())


def test_an_objective_without_auxiliary_losses_is_called_plainly():
    network = Network()
    losses = losses_of(BASE, network)
    assert network.calls == [{}]
    expected = BASE.loss(Network(), DATA, NOISE, BASE.draw(streams()), Condition())
    assert torch.equal(losses.total, expected)
    assert list(losses.logged) == ["loss"]
    assert auxiliary_names(BASE) == ()


def test_the_total_is_the_weighted_sum_and_the_logged_loss_is_the_objectives():
    objective, network = WithAuxiliary(BASE, TERMS), Network()
    losses = losses_of(objective, network)
    assert network.calls == [{"tapped": True}]
    flow = losses_of(BASE, Network()).total
    t = BASE.draw(streams()).t.view(-1, 1, 1, 1)
    x_t = (1 - t) * DATA + (1e-5 + (1 - 1e-5) * t) * NOISE
    head = (x_t / 3 - ((1 - 1e-5) * NOISE - DATA)).square().flatten(1).mean(1)
    latents = latent_loss(TapBatch(Tapped(x_t, x_t / 4), DATA, None, None))
    assert torch.equal(losses.logged["loss"], flow)
    torch.testing.assert_close(losses.logged["auxiliary_velocity"], head)
    torch.testing.assert_close(losses.logged["align_latents"], latents)
    torch.testing.assert_close(losses.total, flow + 0.5 * head + 2 * latents)
    assert auxiliary_names(objective) == ("auxiliary_velocity", "align_latents")


def test_the_auxiliary_velocity_has_the_objectives_prediction_terms_and_weights():
    """With contrastive flow matching, a direction loss and a data prediction, it has the loss of a network of its own."""
    options = FlowMatchingOptions(
        contrastive_weight=0.3, velocity_direction=0.5, prediction="data", loss_weighting="min_snr"
    )
    base = FlowMatching(options, options)
    objective, draws = WithAuxiliary(base, {"auxiliary_velocity": TERMS["auxiliary_velocity"]}), base.draw(streams())
    others = {"other_velocity": torch.randn_like(DATA), "contrast": torch.tensor([0.3, 0.3, 0.0, 0.3, 0.0, 0.3])}
    wrapped = replace_draws(objective.draw(streams()), **others)
    draws = replace_draws(draws, **others)
    assert isinstance(draws, TrainingDraws)
    assert torch.equal(wrapped.base.other_velocity, others["other_velocity"])
    found = training_losses(objective, Network(), DATA, NOISE, wrapped, Condition())
    flow, head = (base.loss(lambda t, x, c, n=n: x / n, DATA, NOISE, draws, Condition()) for n in (2, 3))
    assert torch.equal(found.logged["loss"], flow)
    torch.testing.assert_close(found.logged["auxiliary_velocity"], head)
    torch.testing.assert_close(found.total, flow + 0.5 * head)
    plain = draws._replace(contrast=torch.zeros(6))
    assert (base.loss(lambda t, x, c: x / 3, DATA, NOISE, plain, Condition()) - head).abs().max() > 0.1


def test_validation_and_sampling_use_the_objective_alone():
    objective, network, t = WithAuxiliary(BASE, TERMS, routes=True), Network(), torch.linspace(0, 1, 6)
    found = objective.loss(network, DATA, NOISE, objective.at(t), Condition())
    assert torch.equal(found, BASE.loss(Network(), DATA, NOISE, BASE.at(t), Condition()))
    assert network.calls == [{}]
    assert objective.velocity(network) is network


@pytest.mark.parametrize("purpose", ["time", "dropout", "posterior", "noise", "condition"])
def test_routing_draws_from_a_stream_of_its_own(purpose):
    plain, routed = streams(), streams()
    base = BASE.draw(plain)
    draws = WithAuxiliary(BASE, {}, routes=True).draw(routed)
    assert torch.equal(draws.base.t, base.t)
    kind = "uniform" if purpose in ("time", "dropout") else "normal"
    assert torch.equal(getattr(plain, kind)(purpose), getattr(routed, kind)(purpose))
    assert draws.routing.shape == (6, 4, 4)
    assert draws.routing.unique().numel() == 6 * 16
    again, later = (WithAuxiliary(BASE, {}, routes=True).draw(streams(step)).routing for step in (0, 1))
    assert torch.equal(draws.routing, again)
    assert not torch.equal(draws.routing, later)


def test_routing_alone_passes_the_numbers_on():
    objective, network = WithAuxiliary(BASE, {}, routes=True), Network()
    losses_of(objective, network)
    ((name, numbers),) = network.calls[0].items()
    assert name == "routing"
    assert torch.equal(numbers, objective.draw(streams()).routing)


def test_the_network_gets_further_inputs_of_an_objective():
    class Average(FlowMatching):
        def loss(self, network, data, noise, draws, condition):
            return super().loss(partial(network, until=draws.t / 2), data, noise, draws, condition)

    objective, network = WithAuxiliary(Average(FlowMatchingOptions()), TERMS), Network()
    losses_of(objective, network)
    (inputs,) = network.calls
    assert torch.equal(inputs["until"], objective.draw(streams()).base.t / 2)
    assert inputs["tapped"]


@pytest.mark.parametrize(("step", "counts"), [(0, True), (4, True), (5, False), (9, False)])
def test_terms_end_at_their_step_except_the_auxiliary_velocity(step, counts):
    objective = WithAuxiliary(BASE, TERMS, until=5)
    losses = losses_of(objective, Network(), step)
    logged = losses.logged
    expected = logged["loss"] + 0.5 * logged["auxiliary_velocity"] + (2 * logged["align_latents"] if counts else 0)
    torch.testing.assert_close(losses.total, expected)
    never = losses_of(WithAuxiliary(BASE, TERMS), Network(), step)
    assert torch.equal(losses.total, never.total) == counts


def test_parts_of_a_batch_keep_their_rows():
    objective = WithAuxiliary(BASE, TERMS, until=5, routes=True)
    draws = objective.draw(streams())._replace(features=torch.arange(6.0).view(6, 1, 1, 1))
    first, second = Batch(DATA, NOISE, draws, Condition()).split(2)
    assert torch.equal(torch.cat([first.draws.base.t, second.draws.base.t]), draws.base.t)
    assert torch.equal(torch.cat([first.draws.routing, second.draws.routing]), draws.routing)
    assert second.draws.features.flatten().tolist() == [3, 4, 5]
    assert objective.at(torch.zeros(6))[1:] == (None, None, None)
    parts = [training_losses(objective, Network(), *part).total for part in (first, second)]
    whole = training_losses(objective, Network(), DATA, NOISE, draws, Condition())
    torch.testing.assert_close(torch.cat(parts), whole.total)
