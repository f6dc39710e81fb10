"""docs/pipeline.svg is what docs/draw_pipeline.py draws."""

import importlib.util
import xml.etree.ElementTree as ET
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
SVG = "{http://www.w3.org/2000/svg}"


def drawn() -> str:
    spec = importlib.util.spec_from_file_location("draw_pipeline", DOCS / "draw_pipeline.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.draw()


def test_the_committed_figure_is_the_scripts_output():
    committed = (DOCS / "pipeline.svg").read_bytes().decode("utf-8")
    assert committed == drawn(), "run `python docs/draw_pipeline.py` and commit docs/pipeline.svg"


def test_the_figure_is_drawn_the_same_every_time():
    assert drawn() == drawn()


def test_the_figure_names_both_rows_and_fits_a_page():
    root = ET.fromstring(drawn())
    words = " ".join("".join(element.itertext()) for element in root.iter(f"{SVG}text"))
    assert int(root.get("width")) <= 900
    for name in ("Training", "Sampling", "Encoder", "Decoder", "Velocity network", "ODE solver", "Score"):
        assert name in words
