"""The classes, solvers and tabs that the page offers for a checkpoint, and explanations of missing tabs and controls."""

from dataclasses import dataclass
from functools import cached_property

from checkpoints.header import Header
from checkpoints.tasks import GENERATE, INPAINT, SEMANTIC, TASKS
from datasets_prep.image_dataset import shown_side
from datasets_prep.label_maps.celebamask_hq import CELEBA_CLASSES
from datasets_prep.label_maps.segmented_dataset import MapClasses
from flow.objectives import OBJECTIVES
from flow.solvers import SOLVERS

__all__ = ["HIGH_RESOLUTION", "TABS", "Abilities"]

TABS = ("samples", "interpolation", "inpainting", "map")
HIGH_RESOLUTION = 128  # pixels; from this side on, the page shows fewer samples at first
ADAPTIVE = "dopri5"  # the only adaptive solver that is offered
_FOR_HOLES = "This network was trained to fill holes, so it cannot sample without an image. Use the tab Inpaint."
_FOR_MAPS = "This network was trained on label maps, so it needs one. Use the tab Map."
_NO_MAPS = (
    "This network was not trained on label maps. Train one with `bash run.sh train_args/fashion_mnist_semantic.txt`, for "
    "example."
)
# Task to tab to the reason why the tab is empty.
MISSING: dict[str, dict[str, str]] = {
    GENERATE.name: {"map": _NO_MAPS},
    INPAINT.name: {"samples": _FOR_HOLES, "interpolation": _FOR_HOLES, "map": _NO_MAPS},
    SEMANTIC.name: {"samples": _FOR_MAPS, "interpolation": _FOR_MAPS, "inpainting": _FOR_MAPS},
}
MAP_CLASSES = {"celeba": CELEBA_CLASSES, "celeba_256": CELEBA_CLASSES}
WITHOUT_BACKGROUND = ("coco",)


@dataclass(frozen=True)
class Abilities:
    """The page's offer for the network that `header` describes."""

    header: Header

    @property
    def side(self) -> int:
        """Side of the images in pixels, without the dataset's padding."""
        return shown_side(self.header.dataset)

    @cached_property
    def missing(self) -> dict[str, str]:
        """For each tab that the network cannot fill, a sentence that says why."""
        return MISSING[self.header.task]

    @cached_property
    def classes(self) -> list[tuple[str, int]]:
        """Names and ids of the classes, then of the null class if the network has one; empty if it is unconditional."""
        count, names = self.header.num_classes, self.header.dataset.class_names
        if count == 1:
            return []
        known = names if len(names) == count else [f"class {number}" for number in range(count)]
        null = [("any class", count)] if self.header.drops_labels else []
        return [*((name, number) for number, name in enumerate(known)), *null]

    @property
    def guidance(self) -> bool:
        """Whether the network supports classifier-free guidance."""
        return self.header.drops_labels or self.header.drops_dense

    @property
    def few_steps(self) -> bool:
        """Whether the network predicts average velocities, so that a few steps suffice."""
        return self.header.network.takes_until

    @property
    def methods(self) -> list[str]:
        """The solvers that the network supports. Of the adaptive ones, only ADAPTIVE is listed."""
        return [
            name
            for name, method in SOLVERS.items()
            if (self.few_steps or not method.averages) and (not method.adaptive or name == ADAPTIVE)
        ]

    @property
    def method(self) -> str:
        """The solver at first."""
        return "flow_map" if self.few_steps and OBJECTIVES[self.header.objective].trains_averages else "dpm"

    @property
    def steps(self) -> int:
        """The number of steps at first."""
        return 2 if self.method == "flow_map" else 8

    @property
    def guidance_scale(self) -> float:
        """The scale of guidance at first, which acts on the times 0.2 to 0.7."""
        return 2.5 if self.guidance and self.method != "flow_map" else 1.0

    def samples(self, most: int) -> int:
        """The number of samples at first, at most `most`."""
        classes = self.header.num_classes
        wanted = 4 if self.side >= HIGH_RESOLUTION else classes if 1 < classes <= 10 else 8
        return min(wanted, most)

    @property
    def map_classes(self) -> MapClasses | None:
        """The classes of the network's label maps; None if it takes none."""
        dense, facts = self.header.dense, self.header.dataset
        if dense is None or dense.classes is None:
            return None
        known = MAP_CLASSES.get(facts.name, MapClasses(("background", *facts.class_names)))
        if known.count == dense.classes:
            return known
        names = tuple(f"class {number}" for number in range(dense.classes))
        return MapClasses(names, background=facts.name not in WITHOUT_BACKGROUND)

    def describe(self) -> str:
        """One line about the network and its training."""
        header, facts = self.header, self.header.dataset
        steps = "" if header.step is None else f", {header.step:,} steps"
        pixels = f"{facts.name}, {self.side} x {self.side} pixels"
        return f"{header.model_type} for {TASKS[header.task].purpose} on {pixels} ({header.objective}{steps})"
