"""Files that trainings of real families read, shared by the tests."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from subject_patches.toy.groups import scene_of
from subject_patches.toy.pairs import reference_of
from subject_patches.toy.scenes import sample_emblem
from torch import Tensor


def png(array: Tensor) -> bytes:
    """A picture of 0 to 1."""
    stream = io.BytesIO()
    Image.fromarray((array * 255).byte().numpy()).save(stream, "png")
    return stream.getvalue()


def group_files(rng: np.random.Generator, count: int) -> dict[str, bytes]:
    """One sample's of a toy's scene of so many emblems."""
    emblems = [sample_emblem(rng) for _ in range(count)]
    drawn, places = scene_of(emblems, rng)
    made = {"picture.png": png(torch.from_numpy(drawn.image) / 255), "txt": drawn.scene.caption.encode()}
    for number, (place, emblem) in enumerate(zip(places, emblems, strict=True), 1):
        end = "" if number == 1 else number
        image, mask = reference_of(emblem, rng)
        made[f"mask{end}.png"] = png(torch.from_numpy(drawn.masks[place]).float())
        made[f"subject{end}.png"] = png(torch.cat([image[0], mask[0, ..., None]], -1))
    return made


def written_samples(folder: Path, samples: list[dict[str, bytes]]) -> Path:
    folder.mkdir(exist_ok=True)
    for number, files in enumerate(samples):
        for name, content in files.items():
            (folder / f"{number:03}.{name}").write_bytes(content)
    return folder
