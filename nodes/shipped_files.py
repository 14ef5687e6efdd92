"""What comes with the pack and its workflows load: where the host looks for it, without anybody copying it there."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

PACK = Path(__file__).resolve().parents[1]
CHECKPOINTS = PACK / "toy" / "weights"
LORAS = PACK / "toy" / "loras"
PICTURES = PACK / "workflows" / "input"


def register_shipped_files() -> None:
    """Makes the host's loaders list the toy's checkpoints and the LoRA that `toy.train_anylogo` writes, and puts
    example pictures into the input folder.

    The host knows further folders of models, but one of pictures alone. A picture that is there already, also one that
    somebody has painted on, stays as it is. Calling it again changes nothing."""
    import folder_paths

    folder_paths.add_model_folder_path("checkpoints", str(CHECKPOINTS))
    folder_paths.add_model_folder_path("loras", str(LORAS))
    inputs = Path(folder_paths.get_input_directory())
    for picture in sorted(PICTURES.glob("*.png")):
        there = inputs / picture.name
        if there.exists():
            continue
        try:
            inputs.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(picture, there)
        except OSError as error:
            # The nodes work without; only the example workflows would ask for the picture.
            logging.warning("Subject Patches could not put %s into the input folder (%s).", picture.name, error)
            return
