"""A run folder made by a tiny training, and a reader of the page."""

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from runtime.pictures import save_sheet
from tests.training.test_loop import new_run
from training.loop import train

VOID = {"meta", "img", "br", "input", "link"}
RESULT = {
    "checkpoint": "saved/model_3.safetensors",
    "step": 14,
    "weights_sha256": "0123456789abcdef",
    "seed": 42,
    "solver": {"method": "heun", "num_steps": 8, "step_size": None, "time_grid": "uniform", "time_shift": 2.0},
    "guidance": {"cfg_scale": 2.5, "cfg_interval": [0.2, 0.7]},
    "precision": "fp32",
    "scores": {
        "fid": {"metric": "FD (pebble features)", "value": 0.5, "error": 0.0625},
        "kid": {"metric": "KID (pebble features)", "value": 0.25, "error": None},
    },
    "samples": 1000,
    "features": "pebbles",
    "reference": {"images": 40, "dataset": "stripes", "split": "train"},
    "network_evaluations": 16.0,
    "seconds": 90.0,
    "warnings": ["1000 samples are few"],
    "grid": "elsewhere/samples/model_3_heun.png",
}


class Page(HTMLParser):
    """Text, tags and attributes of a page, whose tags must be balanced."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.text += f"{data}\n"

    def attributes(self, tag: str, name: str) -> list[str]:
        return [values[name] for found, values in self.elements if found == tag and name in values]


@pytest.fixture
def read_page():
    return lambda path: Page(Path(path).read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def trained_folder(tmp_path_factory):
    """The folder of a run of 14 steps on stripes, with config.json and two scores."""
    folder = tmp_path_factory.mktemp("runs") / "pebbles"
    assert train(new_run(folder, experiment={"log_every": 2}), resume=False)
    options = {"lr": 0.01, "batch_size": 8, "processes": 1, "threads": 2, "machine": "cpu, 2 threads", "exp": "pebbles"}
    config = {"options": {**options, "number of training images": 40}, "git": "abc", "versions": {"torch": "2"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "samples" / "model_3_heun.json").write_text(json.dumps(RESULT))
    save_sheet(torch.full((4, 1, 4, 4), 9, dtype=torch.uint8), folder / "samples" / "model_3_heun.png", 2)
    return folder


@pytest.fixture
def run_folder(trained_folder, tmp_path):
    """A copy of that folder."""
    return Path(shutil.copytree(trained_folder, tmp_path / "pebbles"))
