import pytest
import torch

from models.autoencoders.losses.adversarial import hinge_loss
from options import UsageError
from training.autoencoder.terms.adversarial import warn_of_late_start


@pytest.fixture
def plain(runs):
    return runs.SmallRun()


@pytest.fixture
def adversarial(runs):
    """The discriminator trains from step 1 on, and the autoencoder's loss starts at step 2."""
    return runs.SmallRun(**runs.ADVERSARIAL)


def discriminator(run):
    return run.loss.modules["discriminator"].module


@pytest.mark.parametrize("step", [0, 1])
def test_until_its_start_the_network_learns_as_without_bit_for_bit(runs, plain, adversarial, step):
    ours, expected = adversarial.evaluate(step), plain.evaluate(step)
    assert torch.equal(ours.total, expected.total)
    pairs = zip(runs.gradients(adversarial, ours.total), runs.gradients(plain, expected.total), strict=True)
    assert all(torch.equal(own, other) for own, other in pairs)


def test_the_discriminator_trains_ahead_of_the_start(runs, adversarial):
    weights = list(discriminator(adversarial).parameters())
    norms = []
    for step in range(3):
        losses = adversarial.evaluate(step)
        gradients = torch.autograd.grad(losses.total, weights, materialize_grads=True, allow_unused=True)
        norms.append(sum(each.norm() for each in gradients).item())
    assert norms[0] == 0
    assert min(norms[1:]) > 0


def test_the_discriminators_gradient_is_the_hinge_losss_alone(runs, adversarial):
    losses, module = adversarial.evaluate(2), discriminator(adversarial)
    weights = list(module.parameters())
    found = torch.autograd.grad(losses.total, weights, retain_graph=True)
    batch = adversarial.batch(2)
    with torch.no_grad():
        mean, logvar = adversarial.coder.encode(batch.pixels).chunk(2, dim=1)
        z = mean + (0.5 * logvar).exp() * batch.draws.normal("posterior", mean.shape[1:])
        decoded = adversarial.coder.decode(z)
    hinge = hinge_loss(module(batch.pixels), module(decoded))
    for own, expected in zip(found, torch.autograd.grad(hinge, weights), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-6)


def test_the_adversarial_gradient_has_the_reconstructions_norm_times_the_weight_at_the_last_layer(
    runs, plain, adversarial
):
    layers = [run.network.decoder.conv_out.weight for run in (adversarial, plain)]
    (total,) = runs.gradients(adversarial, adversarial.evaluate(2).total, layers[:1])
    (reconstruction,) = runs.gradients(plain, plain.evaluate(2).total, layers[1:])
    assert ((total - reconstruction).norm() / reconstruction.norm()).item() == pytest.approx(0.5, rel=1e-3)


def test_the_encoder_learns_from_the_adversarial_loss(runs, plain, adversarial):
    ours, others = (
        runs.gradients(run, run.evaluate(2).total, [run.network.encoder.conv_in.weight])[0]
        for run in (adversarial, plain)
    )
    assert (ours - others).norm() > 1e-3 * others.norm()


def test_the_reported_loss_is_the_reconstructions(plain, adversarial):
    ours, expected = adversarial.evaluate(3), plain.evaluate(3)
    torch.testing.assert_close(ours.total, expected.total)
    logged = dict(zip(adversarial.loss.names, ours.logged.tolist(), strict=True))
    assert logged["discriminator"] == pytest.approx(1, abs=0.5)  # near the hinge loss of undecided scores
    assert logged["adversarial"] != 0
    assert logged["adversarial_weight"] > 0


def test_held_out_images_have_no_adversarial_loss(plain, adversarial):
    pixels, draws = adversarial.batch(3)
    with torch.no_grad():
        ours, expected = (run.loss(run.coder, pixels, draws, 3, held_out=True) for run in (adversarial, plain))
    assert torch.equal(ours.total, expected.total)


def test_images_that_transforms_make_too_small_are_left_out(runs):
    """A discriminator with two layers needs 12 pixels, and transformed images have 4 to 16."""
    run = runs.SmallRun(**(runs.ADVERSARIAL | {"discriminator_layers": 2}), equivariance=1.0)
    weights = [run.loss.names.index("adversarial_weight"), run.loss.names.index("discriminator")]
    sides, found = [], []
    run.network.decoder.register_forward_hook(lambda layer, inputs, output: sides.append(output.shape[2]))
    for number in range(8):
        found.append(run.step(run.batch(0).pixels, run.batch(number).draws, 5).logged[weights])
    assert {side < 12 for side in sides} == {True, False}
    assert all((values.min() == 0) == (side < 12) for side, values in zip(sides, found, strict=True))


def test_training_updates_the_discriminator_with_its_own_rate(runs, adversarial):
    before = {name: value.clone() for name, value in discriminator(adversarial).state_dict().items()}
    adversarial.advance(1)
    assert all(torch.equal(value, before[name]) for name, value in discriminator(adversarial).state_dict().items())
    adversarial.advance(2)
    changes = [(value - before[name]).abs().max() for name, value in discriminator(adversarial).state_dict().items()]
    assert 0 < torch.stack(changes).median() <= max(changes) < 2.5e-3  # two steps of Adam
    halved = runs.SmallRun(**(runs.ADVERSARIAL | {"discriminator_lr": 5e-4}))
    assert halved.loss.modules["discriminator"].optimizer.param_groups[0]["relative_lr"] == 0.5


def test_losses_are_float32_in_bfloat16_training(runs):
    machine = runs.Machine(torch.device("cpu"), "bf16")
    run = runs.SmallRun(machine=machine, **runs.ADVERSARIAL).advance(3)
    assert all(weights.dtype == torch.float32 for weights in discriminator(run).parameters())
    assert all(value.isfinite().all() for value in run.weights().values())


def test_images_smaller_than_a_patch_are_refused(runs):
    with pytest.raises(
        UsageError, match="--discriminator_layers 3 needs images of at least 24 x 24 .* 16 x 16: use fewer"
    ):
        runs.SmallRun(adversarial_weight=0.5)


@pytest.mark.parametrize(("weight", "steps", "warns"), [(0.5, 2, True), (0.5, 3, False), (0.0, 2, False)])
def test_a_start_after_the_last_step_is_reported(runs, capsys, weight, steps, warns):
    options = runs.autoencoder_options(adversarial_weight=weight, adversarial_start=2)
    warn_of_late_start(options, steps)
    assert ("the adversarial loss never starts: lower --adversarial_start 2" in "".join(capsys.readouterr())) == warns
