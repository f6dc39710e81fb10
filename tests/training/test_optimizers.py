import pytest
import torch

from models.dit import DiT, DiTOptions, hidden_matrices
from models.edm_unet import EdmUNet, EdmUNetOptions
from options import UsageError
from training.optimizers import Muon, OptimizerOptions, make_optimizers, muon_matrices, orthogonalize


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
def test_orthogonalise_keeps_singular_vectors_and_evens_out_singular_values(shape):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    values = left.mT @ orthogonalize(matrices) @ right.mT  # diagonal, because the singular vectors are the same
    diagonal = values.diagonal(dim1=1, dim2=2)
    assert (values - torch.diag_embed(diagonal)).abs().max() < 1e-4
    assert diagonal.min() > 0.6
    assert diagonal.max() < 1.3


def test_steps_equal_torchs_up_to_bfloat16_rounding():
    generator = torch.Generator().manual_seed(1)
    shapes = [(24, 8), (8, 24), (24, 8), (16, 16)]
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    muon = Muon(ours, 0.1, weight_decay=0.5)
    reference = torch.optim.Muon(theirs, 0.1, weight_decay=0.5)
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        muon.step()
        reference.step()
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() < 0.01 * (one - 1).abs().max()


def test_muon_gets_the_matrices_of_the_blocks_and_adamw_the_rest():
    network = DiT(4, 2, 16, 2, 2, DiTOptions(2, 2, num_classes=3, label_dropout=0.1))
    adamw, muon = make_optimizers(
        network, OptimizerOptions(optimizer="muon", lr=1e-3, muon_lr=0.02), hidden_matrices=hidden_matrices(network)
    )
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    of_adamw, of_muon = ({names[id(p)] for p in o.param_groups[0]["params"]} for o in (adamw, muon))
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
    assert of_muon == {f"blocks.{block}.{layer}.weight" for block in range(2) for layer in layers}
    assert of_adamw | of_muon == set(names.values()) - {"pos_embed"}
    assert not of_adamw & of_muon
    assert muon.param_groups[0]["relative_lr"] == pytest.approx(20)


def test_muon_can_leave_the_modulation_to_adamw():
    network = DiT(4, 2, 16, 2, 2, DiTOptions(2, 2, num_classes=3, label_dropout=0.1))
    options = OptimizerOptions(optimizer="muon", muon_matrices="attention_mlp")
    adamw, muon = make_optimizers(network, options, hidden_matrices=hidden_matrices(network))
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    of_adamw, of_muon = ({names[id(p)] for p in o.param_groups[0]["params"]} for o in (adamw, muon))
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert of_muon == {f"blocks.{block}.{layer}.weight" for block in range(2) for layer in layers}
    assert of_adamw == set(names.values()) - {"pos_embed"} - of_muon


@pytest.mark.parametrize("choice", ["blocks", "attention_mlp"])
def test_a_shared_modulation_is_a_modulation(choice):
    network = DiT(4, 2, 16, 2, 2, DiTOptions(2, 2, shared_adaln=True))
    options = OptimizerOptions(optimizer="muon", muon_matrices=choice)
    matrices = {id(matrix) for matrix in muon_matrices(network, options, hidden_matrices(network))}
    assert (id(network.shared_adaLN[1].weight) in matrices) == (choice == "blocks")


def test_muon_is_refused_without_matrices_to_train():
    network = EdmUNet(8, "adm", EdmUNetOptions(nf=32, ch_mult=(1,), num_res_blocks=1, attn_resolutions=()))
    with pytest.raises(UsageError, match="--optimizer muon needs .* such as DiT"):
        make_optimizers(network, OptimizerOptions(optimizer="muon"))


def test_a_convolutions_kernel_is_updated_as_the_matrix_of_its_output_channels():
    generator = torch.Generator().manual_seed(1)
    kernel, matrix = torch.nn.Parameter(torch.ones(8, 4, 3, 3)), torch.nn.Parameter(torch.ones(8, 36))
    optimizers = [Muon([each], 0.1) for each in (kernel, matrix)]
    for _ in range(2):
        matrix.grad = torch.randn(8, 36, generator=generator)
        kernel.grad = matrix.grad.view(8, 4, 3, 3).to(memory_format=torch.channels_last)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(kernel.flatten(1), matrix)
