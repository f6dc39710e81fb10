"""What libraries and the system raise becomes one line that says what to do: cases that tests/fuzz found."""

import errno
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from datasets_prep.image_dataset import DatasetFacts, ImageDataset
from datasets_prep.latent_cache import build_latent_cache
from evaluation.sources import open_source
from exits import INTERRUPTED, LONGEST_MESSAGE, explain, guarded_imports
from models.autoencoders.kl import new_autoencoder_kl
from models.autoencoders.loading import AutoencoderOptions, load_autoencoder
from models.edm_unet import EdmUNetOptions
from models.registry import build_network
from options import UsageError
from runtime.distributed import join_processes
from runtime.precision import Machine
from runtime.weights import check_finite
from tests.plain_autoencoder import PlainAutoencoder

HUGE = 2**62


def raised(work):
    """The error that `work` raises."""
    with pytest.raises(Exception) as caught:  # noqa: PT011
        work()
    return caught.value


@pytest.mark.parametrize(
    "work",
    [
        lambda: torch.empty(HUGE, dtype=torch.uint8),
        lambda: torch.empty(HUGE, HUGE),
        lambda: torch.nn.Linear(2**64, 1),
        lambda: np.empty((HUGE,), np.uint8),
        lambda: np.empty((HUGE, HUGE)),
        lambda: bytearray(HUGE),
        lambda: (_ for _ in ()).throw(RuntimeError("std::bad_alloc")),
        lambda: (_ for _ in ()).throw(RuntimeError("can't start new thread")),
        lambda: (_ for _ in ()).throw(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))),
    ],
    ids=["torch", "torch, product", "torch, 64 bits", "numpy", "numpy, product", "Python", "C++", "threads", "system"],
)
def test_exhausted_memory_is_no_bug(work):
    explanation = explain(raised(work))
    assert explanation.exit_code == 2
    assert explanation.line.startswith(
        "error: not enough memory: use smaller batches, images or networks, or fewer threads"
    )
    assert "\n" not in explanation.line


@pytest.mark.parametrize(
    "number", [errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.EMFILE, errno.EPERM, errno.ESTALE]
)
def test_errors_of_the_system_are_no_bugs(number):
    explanation = explain(OSError(number, os.strerror(number), "n" * 5000))
    assert explanation.exit_code == 2
    assert explanation.line.startswith(f"error: {os.strerror(number)}: nnn")
    assert len(explanation.line) < LONGEST_MESSAGE + 10


@pytest.mark.parametrize(
    "error",
    [
        TypeError("expected int"),
        RuntimeError("shape '[2]' is invalid"),
        OSError("text"),
        OSError(errno.EBADF, "bad"),
        KeyError(1),
    ],
)
def test_bugs_keep_their_traceback(error):
    assert explain(error) is None


def test_a_message_is_one_line_of_limited_length():
    explanation = explain(UsageError("cannot read a:\n  first\n  second " + "x" * 5000 + " end"))
    assert explanation.line.startswith("error: cannot read a: first second xxx")
    assert explanation.line.endswith("x end")
    assert len(explanation.line) < LONGEST_MESSAGE + 10


def test_a_message_gives_the_systems_errors_in_words_and_a_path_once():
    error = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "a/b.npz")
    assert explain(UsageError(f"cannot read a/b.npz: {error}")).line == (
        "error: cannot read a/b.npz: No such file or directory"
    )
    assert explain(UsageError(f"no labels ({error}): check")).line == (
        "error: no labels (No such file or directory: 'a/b.npz'): check"
    )
    assert explain(UsageError("no hub ([Errno -2] Name or service not known), stop")).line == (
        "error: no hub (Name or service not known), stop"
    )


def test_imports_end_scripts_in_one_line(capsys, monkeypatch):
    with pytest.raises(SystemExit) as ended, guarded_imports():
        import no_such_package.part  # noqa: F401
    assert ended.value.code == 2
    assert "lacks the package no_such_package: run `source .venv/bin/activate`" in capsys.readouterr().err
    with pytest.raises(ModuleNotFoundError), guarded_imports():  # a bug, or another version
        import runtime.no_such_module  # noqa: F401
    with pytest.raises(SystemExit) as ended, guarded_imports():
        raise KeyboardInterrupt
    assert ended.value.code == INTERRUPTED
    assert capsys.readouterr().err == "interrupted\n"


# By case: the script, its flags, and what its error line says.
CASES = {
    "beyond 64 bits": ("datasets_prep/masks.py", ["OUT", "--seed", 10**30], "--seed: expected an integer of 64 bits"),
    "huge side": ("datasets_prep/masks.py", ["OUT", "--size", 2**40], "--size must be at most 4096"),
    "huge images": ("train_autoencoder.py", ["--image_size", 10**9], "--image_size must be at most 65536"),
    "threads": ("train_autoencoder.py", ["--num_threads", 2**31], "--num_threads must be at most 1024"),
    "long name": ("datasets_prep/unpack_imagenet.py", ["--datadir", "x" * 5000], "File name too long: xxx"),
}


@pytest.mark.parametrize("case", CASES)
def test_scripts_refuse_in_one_line(case, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script, flags, expected = CASES[case]
    code, _, stderr = call(script, [tmp_path / "out.png" if flag == "OUT" else flag for flag in flags])
    assert code == 2
    assert stderr.count("\n") == 1
    assert expected in stderr
    assert list(tmp_path.iterdir()) == []


def test_images_smaller_than_a_latent_are_refused(tmp_path):
    facts = DatasetFacts("folder", 1, 3, None, False, ("a",))
    dataset = ImageDataset(
        facts, "train", np.zeros(2, np.int64), lambda index: torch.zeros(3, 1, 1, dtype=torch.uint8), "f"
    )
    with pytest.raises(
        UsageError, match="--image_size 1 is too small: this autoencoder makes one latent of 2 x 2 pixels"
    ):
        build_latent_cache(tmp_path / "cache", dataset, PlainAutoencoder(3), Machine(torch.device("cpu"), "fp32"))
    assert not (tmp_path / "cache").exists()


def test_names_that_are_not_text_are_scored(tmp_path):
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "\udce4\udcff.png")
    source = open_source(tmp_path)
    assert source.count == 1
    assert len(source.meta["fingerprint"]) == 64


@pytest.mark.parametrize("name", ["WORLD_SIZE", "LOCAL_RANK"])
@pytest.mark.parametrize("value", ["", "two", "1.5", "9" * 30])
def test_variables_of_launchers_that_hold_no_number_are_named(name, value, monkeypatch):
    given = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for variable, content in (given | {name: value}).items():
        monkeypatch.setenv(variable, content)
    with pytest.raises(UsageError, match=rf"{name}.* holds '{value}', but an integer was expected"), join_processes():
        raise AssertionError("there is nobody to join")


@pytest.mark.parametrize(
    ("dtype", "own"), [(torch.complex64, None), (torch.complex64, torch.ones(2)), (torch.int64, torch.ones(2))]
)
def test_weights_of_another_type_are_refused(dtype, own):
    with pytest.raises(UsageError, match=rf"the file has weights of another type .*: b \({str(dtype)[6:]}\)$"):
        check_finite(
            {"a": torch.ones(1), "b": torch.ones(2).to(dtype)}, "the file", None if own is None else {"b": own}
        )


def test_weights_in_half_precision_and_counters_are_accepted():
    own = {"a": torch.ones(2), "count": torch.zeros((), dtype=torch.int64)}
    check_finite({"a": torch.ones(2).half(), "count": torch.ones((), dtype=torch.int64)}, "the file", own)


@pytest.mark.parametrize("kind", ["adm", "ddpm++"])
def test_an_odd_number_of_channels_is_refused(kind):
    options = EdmUNetOptions(nf=5, ch_mult=(1,), num_res_blocks=1, num_in_channels=3, num_out_channels=3)
    with pytest.raises(UsageError, match=f"--nf 5: {re.escape(kind)} embeds times in pairs of sines and cosines"):
        build_network(kind, 8, options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_autoencoder_of_several_precisions_is_computed_in_one(dtype, tmp_path):
    new_autoencoder_kl(3, (8, 16), 2, 16, {}).save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    name = sorted(weights)[0]
    save_file(weights | {name: weights[name].to(dtype)}, file)
    autoencoder = load_autoencoder(AutoencoderOptions(str(tmp_path)), 3)
    assert {value.dtype for value in autoencoder.network.state_dict().values()} == {torch.float32}
