"""What networks are trained for: the three tasks by name, and where each keeps its experiments."""

from typing import NamedTuple

__all__ = ["GENERATE", "INPAINT", "SEMANTIC", "TASKS", "Task"]


class Task(NamedTuple):
    """A task.

    Args:
        name: in headers, and TASK in arguments files.
        purpose: for messages.
        runs: the folder below --save_root that holds its experiments.
        script: the ending of its scripts' names.
    """

    name: str
    purpose: str
    runs: str
    script: str


GENERATE = Task("generate", "generation", "latent_flow", "")
INPAINT = Task("inpaint", "inpainting", "latent_flow_inpaint", "_inpainting")
SEMANTIC = Task("semantic", "semantic synthesis", "latent_flow_mask2image", "_semantic_syn")
TASKS = {task.name: task for task in (GENERATE, INPAINT, SEMANTIC)}
