"""The projects whose files are read and written, by name in PROJECTS, and the recognition of their files."""

from checkpoints.lfm_files import PublishedFile
from checkpoints.projects.lightningdit import LIGHTNING_DIT
from checkpoints.projects.meanflow import MEAN_FLOW
from checkpoints.projects.project import Project
from checkpoints.projects.rae import DITDH
from checkpoints.projects.repa import REPA
from checkpoints.projects.sit import SIT
from options import UsageError

__all__ = ["PROJECTS", "find_project", "fitting_projects"]

PROJECTS = {project.name: project for project in (SIT, REPA, LIGHTNING_DIT, MEAN_FLOW, DITDH)}


def find_project(file: PublishedFile, path: object, model_type: str = "") -> Project | None:
    """The project whose file this is, by `model_type` or else by names and shapes; None: LFM's.

    Args:
        file: contents of the file.
        path: its path, for messages.
        model_type: the user's --model_type; "" if it was not given.

    Raises:
        UsageError: several projects' networks have these names and shapes.
    """
    if model_type:
        return PROJECTS.get(model_type.partition("/")[0].partition("-")[0])
    fitting = fitting_projects(file)
    if len(fitting) > 1:
        names = [project.name for project in fitting]
        size = fitting[0].describe(fitting[0].read(file.sampled), {})["model_type"].removeprefix("DiT")
        raise UsageError(
            f"{path}: these weights can be {', '.join(names)} or LFM's DiT, whose times run in different directions, and "
            f"nothing in the file shows which: add --model_type {', '.join(name + size for name in names)}, or DiT{size} with "
            "--dataset and --image_size for LFM's"
        )
    return fitting[0] if fitting else None


def fitting_projects(file: PublishedFile) -> list[Project]:
    """The projects whose networks have these names and shapes; none for LFM's and this project's training states."""
    if file.ours or file.arguments or file.step is not None:
        return []
    return [project for project in PROJECTS.values() if project.fits(file.sampled)]
