import pytest
import torch

from options import UsageError


@pytest.fixture(scope="module")
def options(runs, tmp_path_factory):
    return runs.aligned(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def run(runs, options):
    return runs.SmallRun(**options)


def test_the_gradient_has_the_reconstructions_norm_times_the_weight_at_the_encoders_last_layer(runs, run):
    plain = runs.SmallRun(kl_weight=0.0)
    run = runs.SmallRun(**(run.options.__dict__ | {"kl_weight": 0.0}))
    (total,) = runs.gradients(run, run.evaluate(0).total, [run.network.quant_conv.weight])
    (reconstruction,) = runs.gradients(plain, plain.evaluate(0).total, [plain.network.quant_conv.weight])
    assert ((total - reconstruction).norm() / reconstruction.norm()).item() == pytest.approx(0.1, rel=1e-2)


def test_the_encoder_learns_from_the_alignment_and_the_decoder_does_not(runs, run):
    plain = runs.SmallRun()
    for part, learns in (("encoder", True), ("decoder", False)):
        ours, others = (
            runs.gradients(each, each.evaluate(0).total, list(getattr(each.network, part).parameters()))
            for each in (run, plain)
        )
        assert all(map(torch.equal, ours, others)) != learns


def test_descending_the_alignments_gradient_aligns(runs, options):
    """With a large weight and a fixed batch, the loss falls, and the projection learns."""
    run = runs.SmallRun(**(options | {"align_weight": 10.0}))
    before = run.loss.modules["alignment"].module.projection.weight.clone()
    index = run.loss.names.index("alignment")
    first = run.evaluate(0).logged[index]
    for _ in range(30):
        run.state.advance(run.step, run.batch(0), 3e-3)
    assert run.evaluate(0).logged[index] < 0.8 * first
    assert not torch.equal(run.loss.modules["alignment"].module.projection.weight, before)


def test_the_image_encoder_is_frozen_and_not_part_of_the_state(runs, run):
    run.advance(1)
    (term,) = (term for term in run.loss.terms if "alignment" in term.names)
    assert not any(weights.requires_grad for weights in term.encoder.network.parameters())
    assert [*run.state.content()["modules"]["alignment"]["module"]] == ["projection.weight"]
    assert (term.encoder.grid, term.encoder.factor) == (8, 2)


def test_held_out_images_log_the_alignment_without_adding_it(runs, run):
    pixels, draws = run.batch(1)
    plain = runs.SmallRun()
    with torch.no_grad():
        ours, expected = (each.loss(each.coder, pixels, draws, 1, held_out=True) for each in (run, plain))
    assert torch.equal(ours.total, expected.total)
    assert ours.logged[run.loss.names.index("alignment")] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"align_encoder": ""}, "--align_weight needs --align_encoder as well"),
        ({"align_weight": 0.0}, "--align_encoder needs --align_weight as well"),
        ({"freeze_encoder": True, "initial_weights": "x"}, "--align_weight trains the encoder, which --freeze_encoder"),
        ({"align_encoder": "no_such_model"}, "cannot load --align_encoder no_such_model"),
        ({"l2_weight": 0.0}, "--l2_weight 0 leaves no loss of the reconstructed images"),
    ],
)
def test_options_that_contradict_each_other_are_refused(runs, options, changes, message):
    with pytest.raises(UsageError, match=message):
        runs.SmallRun(**(options | changes))
