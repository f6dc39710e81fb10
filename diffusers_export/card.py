"""The model card of an exported folder: what the model is, how it was trained, its scores, limits and license."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from checkpoints.header import Header
from evaluation.report.run_record import RunRecord, Score, read_runs
from evaluation.report.scores import describe_result
from evaluation.report.sections import score_text
from flow.guidance import GuidanceOptions
from flow.solvers import SOLVERS, SolverOptions
from options import UsageError, as_json

__all__ = ["CardFacts", "write_card"]

PACKAGES = "diffusers torch torchdiffeq tqdm"  # with their own requirements


class CardFacts(NamedTuple):
    """Facts for the card.

    Args:
        name: the model's name.
        checkpoint: the checkpoint's file. Scores are read from its run folder.
        header: its header.
        solver: default solver of the pipeline.
        guidance: default guidance of the pipeline.
        license_name: the license of the weights; "" if unknown.
        command: the command that wrote the folder.
        git: commit of the code that wrote it.
    """

    name: str
    checkpoint: Path
    header: Header
    solver: SolverOptions
    guidance: GuidanceOptions
    license_name: str
    command: str
    git: str


def write_card(facts: CardFacts) -> str:
    """The card as Markdown, with the hub's metadata in front."""
    sections = {
        "Use": _use(facts),
        "Recipe": _recipe(facts.header),
        "Data": _data(facts.header),
        "Scores": _scores(facts),
        "Limits": _limits(facts.header),
        "License": _license(facts),
        "Origin": _origin(facts),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    return f"{_metadata(facts)}\n# {facts.name}\n\n{_summary(facts.header)}\n\n{body}\n"


def _metadata(facts: CardFacts) -> str:
    lines = ["library_name: diffusers", "pipeline_tag: unconditional-image-generation"]
    lines += [f"license: {facts.license_name}"] if facts.license_name else []
    return "\n".join(["---", *lines, "tags:", "- flow-matching", "- latent-flow-matching", "---", ""])


def _summary(header: Header) -> str:
    kind = f"{header.num_classes} classes" if header.num_classes > 1 else "no classes"
    channels, side = header.latent_channels, header.latent_size
    pixels = header.autoencoder.id == "none"
    space = "pixels" if pixels else f"the latents of the autoencoder {header.autoencoder.id}"
    return (
        f"A flow matching model of {_side(header)} x {_side(header)} images with {kind}: a {header.model_type} network on "
        f"{space} ({channels} x {side} x {side})."
    )


def _use(facts: CardFacts) -> str:
    header = facts.header
    labels = f"labels={[*range(min(header.num_classes, 4))]}" if header.num_classes > 1 else "num_images=4"
    steps = "" if SOLVERS[facts.solver.method].adaptive else f", {facts.solver.steps} steps"
    return f"""```
pip install {PACKAGES}
```

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("PATH OR HUB ID OF THIS FOLDER", trust_remote_code=True)
images = pipe({labels}, seed=42).images  # PIL images
```

`trust_remote_code=True` lets diffusers run `pipeline.py`, `network/network.py` and `code/` of this folder on your machine, with
your rights. Read them first, and load only folders whose author you trust. The weights are safetensors files, which cannot
contain code.

Sample i depends only on the seed, i and its label. The defaults are `{facts.solver.method}`{steps} and guidance
{facts.guidance.cfg_scale:g}; `model_index.json` lists all settings, which are keyword arguments of `pipe(...)`."""


def _recipe(header: Header) -> str:
    position = {"step": header.step, "epoch": header.epoch, "ended": header.ended, "precision": header.precision}
    rows = {
        "network": {"model_type": header.model_type, **as_json(header.network)},
        "objective": {"objective": header.objective, **as_json(header.path)},
        "training": as_json(header.training),
        "position": position,
        "weights": _weights(header),
    }
    if header.published_file is not None:
        rows = {"network": rows["network"], "converted from": header.published_file}
    return _table(("part", "options"), [(name, _options(value)) for name, value in rows.items()])


def _weights(header: Header) -> Mapping[str, Any] | str:
    if header.average is not None:
        return {"average": "power function", **as_json(header.average)}
    return "exponential moving average" if header.training.get("use_ema", True) else "as trained, without an average"


def _data(header: Header) -> str:
    data = header.dataset
    names = f" Classes: {', '.join(data.class_names)}." if data.class_names else ""
    known = "is recorded" if header.published_file is None else "is assumed"
    padding = f", padded from {data.crop} x {data.crop}" if data.crop else ""
    return (
        f"The dataset {known} as `{data.name}`: {data.image_size} x {data.image_size} pixels{padding}, {data.channels} "
        f"channel{'s' if data.channels > 1 else ''}, {'with' if data.flips else 'without'} mirror images.{names}"
    )


def _scores(facts: CardFacts) -> str:
    digest = facts.header.weights_sha256
    scores = [score for score in _run(facts.checkpoint).scores if score.result.get("weights_sha256") == digest]
    if not scores or digest is None:
        return "No scores of these weights are recorded."
    rows = [(score.metric, score_text(score), _samples(score), describe_result(score)) for score in scores]
    note = "± is a standard deviation. Compare scores only if samples, features and reference are the same."
    return f"{_table(('metric', 'score', 'samples', 'how it was made'), rows)}\n\n{note}"


def _run(checkpoint: Path) -> RunRecord:
    """The run folder of a checkpoint; empty if the file lies elsewhere."""
    try:
        return read_runs([checkpoint.parent])[0]
    except UsageError:
        return RunRecord(checkpoint.parent, checkpoint.parent.name)


def _samples(score: Score) -> str:
    count = score.result.get("samples", score.result.get("images"))
    return f"{count:,}" if isinstance(count, int) else "not recorded"


def _limits(header: Header) -> str:
    lines = [
        f"Images have {_side(header)} x {_side(header)} pixels; other sizes are not supported.",
        "The model reproduces the content and the biases of its training images. Nobody checked samples for copies of them, "
        "unless this card says so.",
        "On another machine, or in another precision, samples of the same seed differ by rounding.",
    ]
    if not header.drops_labels:
        lines.append("The network has no null class, so `cfg_scale` must stay 1.")
    return "\n".join(f"- {line}" for line in lines)


def _license(facts: CardFacts) -> str:
    weights = f"the license `{facts.license_name}`" if facts.license_name else "no license that this card knows"
    others = "Data and autoencoder keep their own terms"
    return f"The code (`pipeline.py`, `network/network.py`, `code/`) is under Apache-2.0. The weights have {weights}. {others}."


def _origin(facts: CardFacts) -> str:
    header = facts.header
    rows = {
        "command": f"`{facts.command}`" if facts.command else "",
        "checkpoint": facts.checkpoint.name,
        "SHA-256 of the weights": header.weights_sha256 or "",
        "SHA-256 of the autoencoder's weights": header.autoencoder.sha256 or "",
        "commit of the training": header.git or "",
        "commit of the export": facts.git,
        "versions in training": ", ".join(f"{name} {version}" for name, version in header.versions.items()),
    }
    return _table(("fact", "value"), [(name, value) for name, value in rows.items() if value])


def _side(header: Header) -> int:
    return header.dataset.crop or header.dataset.image_size


def _options(values: Mapping[str, Any] | str) -> str:
    if isinstance(values, str):
        return values
    return ", ".join(f"{name} {json.dumps(value)}" for name, value in values.items() if value is not None)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
