"""What a server of tests and of `tools/soak.py` has besides its own: loaders of small models, and small files of every
kind that nodes load, some of them broken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sd
import torch
from hosting.paths import ROOT
from hosting.random_models import generator
from safetensors.torch import save_file
from soaking.served import add_pack
from subject_patches.nodes.image_prompt import layer_channels
from subject_patches.nodes.model_files import ADAPTERS, RESIDUAL_TOKENS, SUBJECT_ENCODERS
from subject_patches.nodes.trajectory_files import FOLDER as TRAJECTORIES
from subject_patches.patches.families import family_of
from subject_patches.patches.mechanisms.image_prompt import in_file_order
from subject_patches.patches.mechanisms.inversion import Inversion, to_file
from subject_patches.patches.mechanisms.residual import ResidualToken, file_contents
from subject_patches.toy.family import LATENT_CHANNELS, WIDTH, register

from .semantics import contents
from .small_flux import write_anystory
from .small_vision import VISION
from .subject_encoders import file_for, written

_LOADERS = """
from small_checkpoint import SmallCheckpoint
from small_loaders import LOADERS
NODE_CLASS_MAPPINGS = {"SmallCheckpoint": SmallCheckpoint, **LOADERS}
"""
TOY = ROOT / "toy" / "weights" / "subject-patches-toy.safetensors"
# How the files that fit the small models begin; the others are broken.
GOOD = "soak-"


def add_loaders(base: Path) -> None:
    """Gives a server's base directory the loaders, before it starts."""
    add_pack(base, "small_loaders", _LOADERS, ROOT / "tests" / "shared")


def add_files(base: Path) -> None:
    """AnyStory's weights for the small FLUX.1, and for the toy whatever else a node of the pack loads; in each of these
    folders also files that are none."""
    models = base / "models"
    write_anystory(models, f"{GOOD}anystory")
    register()
    toy = comfy.sd.load_checkpoint_guess_config(str(TOY), output_vae=False, output_clip=False)[0]
    family = family_of(toy).name
    encoders = models / SUBJECT_ENCODERS.name
    written(encoders / f"{GOOD}encoder.safetensors", *file_for(toy, routed=True))
    written(encoders / f"{GOOD}semantics.safetensors", *contents(family, WIDTH))
    residual = ResidualToken(torch.randn(1, WIDTH, generator=generator(1)), "emblem", 1)
    written(_folder(models / RESIDUAL_TOKENS.name) / f"{GOOD}residual.safetensors", *file_contents(residual))
    save_file(_adapter(toy), _folder(models / ADAPTERS.name) / f"{GOOD}adapter.safetensors")
    states = torch.randn(3, 1, LATENT_CHANNELS, 12, 12, generator=generator(2))
    path = Inversion(torch.tensor([5.0, 1.0, 0.0]), states, family)
    written(_folder(base / "input" / TRAJECTORIES) / f"{GOOD}trajectory.safetensors", *to_file(path))
    for folder in (encoders, models / RESIDUAL_TOKENS.name, models / ADAPTERS.name, base / "input" / TRAJECTORIES):
        _break(folder)


def _break(folder: Path) -> None:
    whole = next(folder.glob(f"{GOOD}*.safetensors")).read_bytes()
    (folder / "cut-off.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "text.safetensors").write_text("no weights", encoding="utf-8")
    save_file({"weight": torch.zeros(2, 2)}, folder / "other.safetensors")


def _adapter(model: Any, tokens: int = 2) -> dict[str, torch.Tensor]:
    """An IP-Adapter's plain form, for a MODEL and the small vision models."""
    channels, source = layer_channels(model, "cross"), generator(3)
    tensors = {
        "image_proj.proj.weight": torch.randn(tokens * WIDTH, VISION, generator=source) * 0.1,
        "image_proj.proj.bias": torch.zeros(tokens * WIDTH),
        "image_proj.norm.weight": torch.ones(WIDTH),
        "image_proj.norm.bias": torch.zeros(WIDTH),
    }
    for number, site in enumerate(in_file_order(channels)):
        for part in "kv":
            shape = (channels[site], WIDTH)
            tensors[f"ip_adapter.{2 * number + 1}.to_{part}_ip.weight"] = torch.randn(shape, generator=source) * 0.2
    return tensors


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path
