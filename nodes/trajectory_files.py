"""Save and Load Inversion Trajectory: an inversion's file (Layout-and-Retouch)."""

from __future__ import annotations

import os
import posixpath
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..patches.mechanisms.inversion import CACHE_MEGABYTES, Inversion, read_trajectory, to_file
from ..training.files import save_whole
from .checks import MEGABYTES_MAX, check_number
from .inputs import cache_input
from .saved_files import next_file
from .types import RETOUCH, TrajectoryType

FOLDER = "trajectories"


class SaveTrajectoryNode(io.ComfyNode):
    """Writes a TRAJECTORY to the output folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SubjectPatchesSaveTrajectory",
            display_name="Save Inversion Trajectory",
            category=RETOUCH,
            search_aliases=["DDIM inversion", "export trajectory"],
            description="Saves a trajectory as a safetensors file, so that a picture need not be inverted again.",
            inputs=[
                TrajectoryType.Input("trajectory", tooltip="From Invert to Trajectory."),
                io.String.Input(
                    "filename_prefix",
                    default=f"{FOLDER}/trajectory",
                    tooltip=f"The file's name in the output folder's {FOLDER}, where Load Inversion Trajectory looks; "
                    "a number is added, as for pictures. May name a subfolder.",
                ),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, trajectory: Inversion, filename_prefix: str) -> io.NodeOutput:
        output = Path(folder_paths.get_output_directory())
        # Elsewhere it could be saved but never be chosen.
        inside = posixpath.normpath(filename_prefix.replace("\\", "/")).removeprefix(f"{FOLDER}/")
        file = next_file(inside, output / FOLDER)
        save_whole(file, *to_file(trajectory))
        return io.NodeOutput(ui={"text": (file.relative_to(output).as_posix(),)})


def _saved() -> list[str]:
    """The trajectory files of the input and output folders and their subfolders, as the host annotates names."""
    found = []
    for base, mark in ((folder_paths.get_input_directory(), ""), (folder_paths.get_output_directory(), " [output]")):
        top = Path(base)
        files = sorted(path.relative_to(top).as_posix() for path in (top / FOLDER).rglob("*.safetensors"))
        found += [f"{file}{mark}" for file in files]
    return found


class LoadTrajectoryNode(io.ComfyNode):
    """Reads a TRAJECTORY."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SubjectPatchesLoadTrajectory",
            display_name="Load Inversion Trajectory",
            category=RETOUCH,
            search_aliases=["DDIM inversion", "import trajectory"],
            description="Loads what Save Inversion Trajectory wrote.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=_saved(),
                    tooltip=f"A file of the folder {FOLDER} or below it, in the input folder or in the output folder.",
                ),
                cache_input(CACHE_MEGABYTES),
            ],
            outputs=[TrajectoryType.Output(display_name="trajectory", tooltip="The trajectory as it was saved.")],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, cache_megabytes: int = CACHE_MEGABYTES) -> Any:
        found = os.stat(folder_paths.get_annotated_filepath(file))
        return (file, found.st_mtime_ns, found.st_size, cache_megabytes)

    @classmethod
    def execute(cls, file: str, cache_megabytes: int = CACHE_MEGABYTES) -> io.NodeOutput:
        check_number("cache_megabytes", cache_megabytes, 0, MEGABYTES_MAX)
        return io.NodeOutput(read_trajectory(folder_paths.get_annotated_filepath(file), file, cache_megabytes))
