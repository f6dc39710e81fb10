"""The three tasks that networks are trained for, and their run folders."""

from typing import NamedTuple

__all__ = ["GENERATE", "INPAINT", "SEMANTIC", "TASKS", "Task"]


class Task(NamedTuple):
    """A task.

    Args:
        name: name in headers and, as TASK, in arguments files.
        purpose: name in messages.
        runs: folder of its runs below --save_root.
        script: suffix of its scripts' names.
    """

    name: str
    purpose: str
    runs: str
    script: str


GENERATE = Task("generate", "generation", "latent_flow", "")
INPAINT = Task("inpaint", "inpainting", "latent_flow_inpaint", "_inpainting")
SEMANTIC = Task("semantic", "semantic synthesis", "latent_flow_mask2image", "_semantic_syn")
TASKS = {task.name: task for task in (GENERATE, INPAINT, SEMANTIC)}
