"""The page: controls, tabs and their events, built with Gradio."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import gradio as gr
import torch
from starlette.middleware import Middleware

from demo_page.abilities import Abilities
from demo_page.drawing import DemoModel, Drawing, SamplePaths
from demo_page.local_only import LocalOnly
from demo_page.pictures import enlarged, painted_hole, painted_image, painted_map, sheet, start_map
from demo_page.settings import Settings
from options import UsageError

__all__ = ["build_page", "serve"]

FONTS, CODE_FONTS = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")  # the system's: nothing is downloaded
CSS = """
.gradio-container { max-width: 1200px !important; }
.settings { order: 2; } /* on the right or, on a phone, below */
.sheet img { image-rendering: pixelated; object-fit: contain; }
@media (max-width: 640px) { .tab-container button { padding: 0 9px !important; } }
.legend { display: flex; flex-wrap: wrap; gap: 4px 14px; font-size: 14px; }
.legend span span { display: inline-block; width: 14px; height: 14px; margin-right: 5px; border: 1px solid #888; }
"""
HOLE_COLOR = "#ff3b30"
LARGEST_SEED = 2**31 - 1
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "network", "api_visibility": "private"}
AT_ONCE: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


@dataclass(frozen=True)
class _Page:
    """The parts that all tabs share."""

    model: DemoModel
    abilities: Abilities
    controls: list[Any]  # in the order of Settings' fields

    def drawn(self, drawings: Callable[[], Iterator[Drawing]]) -> Iterator[tuple[Any, str, SamplePaths | None]]:
        """The sheet, the line of text and the paths of each drawing. A mistake is shown in the page."""
        try:
            for images, status, paths in drawings():
                yield gr.skip() if images is None else sheet(images), status, paths
        except UsageError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def class_choice(self, label: str = "Class") -> Any:
        """A menu of one class; invisible for an unconditional network."""
        classes = self.abilities.classes
        start = 0 if classes else None
        return gr.Dropdown(classes, value=start, label=label, visible=bool(classes), interactive=True)


def build_page(model: DemoModel) -> gr.Blocks:
    """Build the page of a checkpoint."""
    abilities = model.abilities
    with gr.Blocks(title="Latent flow", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gr.Markdown(f"# Latent flow\n{abilities.describe()}. File: `{model.path.name}`")
        with gr.Row():
            with gr.Column(scale=1, min_width=280, elem_classes="settings"):
                page = _Page(model, abilities, _controls(model, abilities))
            with gr.Column(scale=3, min_width=300), gr.Tabs():
                tabs = {
                    "Samples": ("samples", _samples),
                    "Interpolate": ("interpolation", _interpolation),
                    "Inpaint": ("inpainting", _inpainting),
                    "Map": ("map", _label_map),
                }
                for title, (name, fill) in tabs.items():
                    with gr.Tab(title):
                        if reason := abilities.missing.get(name):
                            gr.Markdown(reason)
                        else:
                            fill(page)
    return blocks


def serve(blocks: gr.Blocks, host: str, port: int, waiting: int) -> str:
    """Serve the page in threads, and return its address. At most `waiting` requests wait.

    Raises:
        UsageError: the port is in use, or this machine does not have the host's address.
    """
    blocks.queue(max_size=waiting, api_open=False, default_concurrency_limit=8)
    theme = gr.themes.Base(font=FONTS, font_mono=CODE_FONTS)
    try:
        _, address, _ = blocks.launch(
            server_name=host,
            server_port=port,
            share=False,
            inbrowser=False,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            footer_links=[],
            theme=theme,
            css=CSS,
            max_file_size="10mb",
            state_session_capacity=100,
            enable_monitoring=False,
            app_kwargs={"middleware": [Middleware(LocalOnly)], "docs_url": None, "redoc_url": None},
        )
    except OSError as error:
        raise UsageError(f"cannot serve on --host {host} --port {port}: {error}; choose another port") from error
    return address


def _controls(model: DemoModel, abilities: Abilities) -> list[Any]:
    """The controls that all tabs share, in the order of Settings' fields."""
    start, network = abilities.guidance_scale, abilities.header.network
    guided = abilities.guidance
    method = gr.Dropdown(abilities.methods, value=abilities.method, label="Solver")
    steps = gr.Slider(1, model.limits.steps, abilities.steps, step=1, label="Steps")
    seed = gr.Number(0, precision=0, minimum=0, maximum=LARGEST_SEED, label="Seed")
    scale = gr.Slider(0, 8, start, step=0.1, label="Guidance scale", info="1: none", visible=guided)
    low = gr.Slider(0, 1, 0.2, step=0.05, label="Guide from time", info="0: data", visible=guided)
    high = gr.Slider(0, 1, 0.7, step=0.05, label="Guide to time", info="1: noise", visible=guided)
    if not guided:
        gr.Markdown("This network has no null class, so there is no classifier-free guidance.")
    with gr.Accordion("More", open=False):
        internal = gr.Slider(1, 4, 1, step=0.1, label="Internal guidance", visible=network.has_auxiliary_velocity)
        embedded = gr.Slider(1, 8, 1, step=0.1, label="Guidance as an input", visible=network.takes_guidance)
        shift = gr.Slider(0.2, 5, 1, step=0.1, label="Time shift", info="above 1: shorter steps near noise")
    return [method, steps, scale, low, high, internal, embedded, shift, seed]


def _samples(page: _Page) -> None:
    abilities, limits = page.abilities, page.model.limits
    labels = gr.Dropdown(
        abilities.classes, value=[], multiselect=True, label="Classes", info="none: all in turn",
        visible=bool(abilities.classes), interactive=True,
    )  # fmt: skip
    count = gr.Slider(1, limits.samples, abilities.samples(limits.samples), step=1, label="Samples")
    live = gr.Checkbox(abilities.few_steps, label="Sample at every change")
    with gr.Row():
        draw = gr.Button("Sample", variant="primary", min_width=90, size="md")
        another = gr.Button("Next seed", min_width=90, size="md")
        stop = gr.Button("Stop", min_width=80, size="md")
    picture, status = _result("Samples")
    frame = gr.Slider(0, 1, 1, step=1, label="From noise (left) to image (right)", interactive=True)
    shown = gr.Radio(["points on the path", "predicted images"], value="points on the path", show_label=False)
    paths = gr.State(None, time_to_live=3600)

    def run(chosen: list[int], count: int, *values: Any) -> Iterator[tuple[Any, str, Any, Any]]:
        for image, text, found in page.drawn(lambda: page.model.sample(chosen or [], int(count), Settings(*values))):
            last = len(found.points) - 1 if found else 0
            moved = gr.Slider(maximum=last, value=last) if found else gr.skip()
            yield image, text, found, moved

    def run_if(wanted: bool, live: bool, *values: Any) -> Iterator[tuple[Any, ...]]:
        yield from run(*values) if live == wanted else [(gr.skip(), gr.skip(), gr.skip(), gr.skip())]

    def show(number: int, kind: str, found: SamplePaths | None) -> Any:
        if found is None:
            return gr.skip()
        latents = (found.points if kind == "points on the path" else found.data)[
            min(int(number), len(found.points) - 1)
        ]
        return sheet(page.model.show(latents))

    inputs, outputs = [labels, count, *page.controls], [picture, status, paths, frame]
    seed = page.controls[-1]
    event = draw.click(run, inputs, outputs, **ONE_AT_A_TIME)
    stepped = another.click(lambda seed: int(seed or 0) + 1, seed, seed, **AT_ONCE)
    second = stepped.then(partial(run_if, False), [live, *inputs], outputs, **ONE_AT_A_TIME)
    changes = [control.change for control in inputs]
    gr.on(
        changes,
        partial(run_if, True),
        [live, *inputs],
        outputs,
        trigger_mode="always_last",
        show_progress="hidden",
        **ONE_AT_A_TIME,
    )
    stop.click(None, cancels=[event, second], **AT_ONCE)
    looks = [frame.input, shown.input]
    gr.on(looks, show, [frame, shown, paths], picture, trigger_mode="always_last", **AT_ONCE)


def _interpolation(page: _Page) -> None:
    limits = page.model.limits
    with gr.Row():
        other = gr.Number(1, precision=0, minimum=0, maximum=LARGEST_SEED, label="To seed", min_width=120)
        label = page.class_choice()
    count = gr.Slider(2, limits.samples, min(10, limits.samples), step=1, label="Samples on the way")
    draw = gr.Button("Interpolate", variant="primary")
    single = gr.Image(
        alt_text="One sample",
        show_label=False,
        format="png",
        height=260,
        elem_classes="sheet",
        interactive=False,
        buttons=[],
    )
    share = gr.Slider(0, 1, 0, step=1, label="From the seed on the left to the other one", interactive=True)
    picture, status = _result("All samples")
    images = gr.State(None, time_to_live=3600)

    def run(other: int, label: int | None, count: int, *values: Any) -> Iterator[tuple[Any, ...]]:
        found: torch.Tensor | None = None

        def drawings() -> Iterator[Drawing]:
            nonlocal found
            for drawing in page.model.interpolate(label, int(other), int(count), Settings(*values)):
                found = drawing.images
                yield drawing

        for image, text, _ in page.drawn(drawings):
            if found is None:
                yield gr.skip(), text, gr.skip(), gr.skip(), gr.skip()
            else:
                yield image, text, found, gr.Slider(maximum=len(found) - 1, value=0), sheet(found[:1])

    def show(number: int, images: torch.Tensor | None) -> Any:
        return gr.skip() if images is None else sheet(images[min(int(number), len(images) - 1)][None])

    outputs = [picture, status, images, share, single]
    draw.click(run, [other, label, count, *page.controls], outputs, **ONE_AT_A_TIME)
    share.input(show, [share, images], single, trigger_mode="always_last", **AT_ONCE)


def _inpainting(page: _Page) -> None:
    facts, model, free = page.abilities.header.dataset, page.model, page.abilities.header.task == "generate"
    gr.Markdown(
        f"Draw or upload an image, brush over a part of it, and fill that part. Images are cropped to a square and resized to "
        f"{page.abilities.side} x {page.abilities.side} pixels."
        + (" This network was not trained for it: it restores the rest at each Euler step (RePaint)." if free else "")
    )
    with gr.Row():
        label = page.class_choice()
        count = gr.Slider(1, model.limits.samples, min(4, model.limits.samples), step=1, label="Samples")
        again = gr.Slider(1, 10, 5, step=1, label="Repetitions of each step", visible=free)
    editor = _editor(
        "Image", gr.Brush(default_size=40, colors=[HOLE_COLOR], color_mode="fixed"), ("upload", "clipboard")
    )
    with gr.Row():
        example = gr.Button("Draw an image", size="md", min_width=120, visible=free)
        draw = gr.Button("Fill", size="md", variant="primary", min_width=120)
    picture, status = _result("Filled images")

    def start(label: int | None, *values: Any) -> Any:
        try:
            *_, last = model.sample([] if label is None else [label], 1, Settings(*values))
        except UsageError as error:
            raise gr.Error(str(error), print_exception=False) from error
        return enlarged(last.images[0])  # type: ignore[index]

    def run(painting: Any, label: int | None, count: int, again: int, *values: Any) -> Iterator[tuple[Any, str]]:
        def drawings() -> Iterator[Drawing]:
            image = painted_image(painting, facts)
            hole = painted_hole(painting, page.abilities.side)
            return model.inpaint(image, hole, label, int(count), int(again), Settings(*values))

        for image, text, _ in page.drawn(drawings):
            yield image, text

    example.click(start, [label, *page.controls], editor, **ONE_AT_A_TIME)
    draw.click(run, [editor, label, count, again, *page.controls], [picture, status], **ONE_AT_A_TIME)


def _label_map(page: _Page) -> None:
    classes, model = page.abilities.map_classes, page.model
    assert classes is not None
    colors = [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in classes.palette.tolist()]
    swatches = "".join(
        f"<span><span style='background:{color}'></span>{name}</span>"
        for color, name in zip(colors, classes.names, strict=True)
    )
    gr.HTML(f"<div class='legend'>{swatches}</div>")
    with gr.Row():
        label = page.class_choice("Class of the whole image")
        count = gr.Slider(1, model.limits.samples, min(4, model.limits.samples), step=1, label="Samples")
    first = min(1, classes.count - 1)
    brush = gr.Brush(default_size=40, colors=colors, default_color=colors[first], color_mode="fixed")
    editor = _editor("Label map", brush, ("upload",), start_map(classes, page.abilities.side))
    draw = gr.Button("Draw", variant="primary")
    picture, status = _result("Samples for the map")

    def run(painting: Any, label: int | None, count: int, *values: Any) -> Iterator[tuple[Any, str]]:
        def drawings() -> Iterator[Drawing]:
            painted = painted_map(painting, classes, page.abilities.side)
            return model.draw_map(painted, label, int(count), Settings(*values))

        for image, text, _ in page.drawn(drawings):
            yield image, text

    draw.click(run, [editor, label, count, *page.controls], [picture, status], **ONE_AT_A_TIME)


def _result(label: str) -> tuple[Any, Any]:
    """A picture, and below it a line about the work."""
    picture = gr.Image(
        alt_text=label, show_label=False, format="png", elem_classes="sheet", interactive=False, buttons=["download"]
    )
    return picture, gr.Markdown()


def _editor(label: str, brush: Any, sources: tuple[str, ...], value: Any = None) -> Any:
    return gr.ImageEditor(
        value, label=label, brush=brush, sources=sources, layers=False, transforms=(), format="png",
        canvas_size=(448, 448), height=540, buttons=[],
    )  # fmt: skip
