"""Headers survive a round trip through JSON, older versions can be read, and unknown entries are refused by name."""

import json

import pytest

from checkpoints.header import FORMAT, Header, PowerAverage, PublishedForm
from datasets_prep.image_dataset import DatasetFacts
from flow.auxiliary.losses import AuxiliaryOptions
from flow.losses.options import FlowMatchingOptions
from flow.objectives import OBJECTIVES
from models.autoencoders.protocol import AutoencoderFacts
from models.conditions import DenseInput
from models.dit import DiTOptions
from models.edm_unet import EdmUNetOptions
from options import UsageError
from tests.headers import header_of

UNET = EdmUNetOptions(8, 4, label_dropout=0.1, ch_mult=(1, 2), attn_resolutions=(4, 2), label_dim=2)


@pytest.fixture(autouse=True)
def another_objective(monkeypatch):
    """Registers the objective in FULL, which is not the default one."""
    monkeypatch.setitem(OBJECTIVES, "another", OBJECTIVES["flow_matching"])


FULL = Header(
    model_type="adm",
    network=UNET,
    latent_size=8,
    autoencoder=AutoencoderFacts("owner/name", "ab" * 32, 0.5, (0.25, -1.0, 0.0, 1.0), (2.0, 2.0, 2.0, 0.1)),
    dataset=DatasetFacts("folder", 32, 3, 28, True, ("cat", "dög")),
    task="semantic",
    dense=DenseInput(4, classes=6, dropout=0.2),
    path=FlowMatchingOptions("logit_normal", 0.5, 1.5, sigma_min=1e-3),
    objective="another",
    contrast_means=(0.5, -1.25),
    auxiliary=AuxiliaryOptions(dispersive=0.25, auxiliary_until=7),
    encoder=AutoencoderFacts("a_model", "12" * 32),
    training={"lr": 1e-4, "adam_betas": [0.9, 0.999], "use_ema": True},
    precision="bf16",
    compiled=True,
    reproducible=False,
    step=12,
    epoch=3,
    ended=True,
    average=PowerAverage(0.05, 11),
    git="0123456789ab-dirty",
    versions={"python": "3.11.0", "torch": "2.7"},
    published_file="model_475.pth",
    published_form=PublishedForm("REPA", "ema", "module."),
    weights_sha256="cd" * 32,
)
# Written by a version that had one task and one objective, and no conditions.
OLD = {
    "format": FORMAT,
    "model_type": "adm",
    "network": {
        "num_in_channels": 3, "num_out_channels": 3, "label_dropout": 0.1, "nf": 32, "ch_mult": [1, 2],
        "num_res_blocks": 1, "attn_resolutions": [4], "label_dim": 2,
    },
    "latent_size": 8,
    "latent_channels": 3,
    "num_classes": 2,
    "autoencoder": {"id": "none", "sha256": "none"},
    "dataset": {
        "name": "folder", "image_size": 8, "channels": 3, "crop": None, "flips": True, "class_names": ["cat", "dog"],
    },
    "path": {"sigma_min": 1e-5},
    "training": {"lr": 1e-4, "adam_betas": [0.9, 0.999]},
    "precision": "fp32",
    "step": 7,
    "epoch": 1,
    "weights_sha256": "ef" * 32,
}  # fmt: skip


@pytest.mark.parametrize("header", [FULL, header_of(DiTOptions())], ids=["full", "least"])
def test_json_round_trip(header, monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "another", OBJECTIVES["flow_matching"])
    assert Header.from_json(json.loads(json.dumps(header.to_json()))) == header


def test_the_full_header_changes_every_default():
    least = header_of(DiTOptions())
    assert [name for name, value in vars(FULL).items() if value == getattr(least, name)] == []


def test_the_file_includes_derived_entries():
    """These entries are for readers that do not know our network families."""
    stored = FULL.to_json()
    assert (stored["format"], stored["latent_channels"], stored["num_classes"]) == (FORMAT, 4, 2)
    assert stored.keys() == {"format", "latent_channels", "num_classes", *vars(FULL)}


def test_entries_derived_from_the_network():
    assert FULL.latent_shape == (4, 8, 8)
    assert FULL.architecture == ("adm", 8, UNET, DenseInput(4, classes=6, dropout=0.2))
    assert (FULL.num_classes, FULL.drops_labels, FULL.drops_dense) == (2, True, True)
    plain = header_of(DiTOptions())
    assert (plain.num_classes, plain.drops_labels, plain.drops_dense) == (1, False, False)
    assert not header_of(DiTOptions(5, 4), dense=DenseInput(1)).drops_dense


def test_a_header_of_an_older_version():
    header = Header.from_json(json.loads(json.dumps(OLD)))
    assert (header.task, header.dense, header.objective, header.published_file) == (
        "generate", None, "flow_matching", None,
    )  # fmt: skip
    assert (header.ended, header.compiled, header.reproducible, header.git, header.versions) == (
        False, None, None, None, {},
    )  # fmt: skip
    assert header.network == EdmUNetOptions(
        3, 3, label_dropout=0.1, nf=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), label_dim=2
    )
    assert header.autoencoder == AutoencoderFacts("none", "none", None, (), ())
    assert header.dataset == DatasetFacts("folder", 8, 3, None, True, ("cat", "dog"))
    assert header.path == FlowMatchingOptions(sigma_min=1e-5)
    assert header.training == {"lr": 1e-4, "adam_betas": [0.9, 0.999]}
    assert (header.step, header.epoch, header.precision, header.weights_sha256) == (7, 1, "fp32", "ef" * 32)
    assert (header.latent_shape, header.num_classes, header.drops_labels) == ((3, 8, 8), 2, True)
    assert Header.from_json(header.to_json()) == header  # the rewritten header is equal


def test_the_scale_of_an_older_autoencoder_becomes_tuples():
    scale = {"scale_factor": None, "latents_mean": [0.5, -1.0, 0.0], "latents_std": [2.0, 0.25, 1.0]}
    header = Header.from_json(OLD | {"autoencoder": {"id": "a/b", "sha256": None, **scale}})
    assert header.autoencoder == AutoencoderFacts("a/b", None, None, (0.5, -1.0, 0.0), (2.0, 0.25, 1.0))


def test_a_missing_path_means_the_default_path():
    assert (
        Header.from_json({name: value for name, value in OLD.items() if name != "path"}).path == FlowMatchingOptions()
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"colour": 1, "a_size": 2}, "a_size, colour"),
        ({"network": OLD["network"] | {"wings": 2}}, "wings"),
        ({"model_type": "of tomorrow"}, "of tomorrow"),
        ({"autoencoder": {"id": "none", "sha256": "none", "wings": 2}}, "wings"),
        ({"dataset": OLD["dataset"] | {"wings": 2}}, "wings"),
        ({"objective": "of tomorrow"}, "of tomorrow"),
        ({"path": {"wings": 2}}, "wings"),
        ({"dense": {"channels": 1, "wings": 2}}, "wings"),
    ],
    ids=["header", "network", "model type", "autoencoder", "dataset", "objective", "path", "dense"],
)
def test_an_unknown_entry_is_refused_by_name(changes, named):
    with pytest.raises(UsageError, match=named):
        Header.from_json(OLD | changes)


@pytest.mark.parametrize("name", ["model_type", "network", "latent_size", "autoencoder", "dataset"])
def test_a_missing_entry_is_refused_by_name(name):
    with pytest.raises(UsageError, match=name):
        Header.from_json({entry: value for entry, value in OLD.items() if entry != name})


@pytest.mark.parametrize("name", ["network", "autoencoder", "dataset", "path", "dense"])
@pytest.mark.parametrize("value", [3, "x", [1]], ids=str)
def test_an_entry_of_the_wrong_type_is_refused(name, value):
    with pytest.raises(UsageError, match="cannot read its header"):
        Header.from_json(OLD | {name: value})


def test_at_changes_only_the_position():
    moved = FULL.at(20, 5, ended=False)
    assert (moved.step, moved.epoch, moved.ended) == (20, 5, False)
    assert moved.at(12, 3, ended=True) == FULL


def test_the_correction_of_a_contrastive_network_needs_its_mean_latents():
    network, path = DiTOptions(2, 2, num_classes=3), FlowMatchingOptions(contrastive_weight=0.1)
    assert header_of(network).correction() is None
    for rows in (1, 3):
        correction = header_of(network, path=path, contrast_means=(0.5,) * 32 * rows).correction()
        assert (correction.weight, correction.means.shape, correction.null) == (0.1, (rows, 2, 4, 4), 3)
    for count in (0, 33, 64):
        with pytest.raises(UsageError, match=f"has {count} numbers"):
            header_of(network, path=path, contrast_means=(0.5,) * count).correction()
