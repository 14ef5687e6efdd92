"""Trains the toy from nothing: `python tools/host.py python -m toy.train`.

Two stages, each with a budget in minutes: the autoencoder, then the U-Net with its text encoder; then both are
written as one checkpoint. A stage that finds its result in the run's folder is not trained again. Stopping is
safe at any time: with `--resume` a run goes on from its last save (one every three minutes).

On a CPU that others use too, `--processes 2`, one thread each, is the fastest.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file
from subject_patches.training.files import save_whole

from .command import on_any_device, parsed, parser_of, together
from .runs import Peers

CHECKPOINT = Path(__file__).parent / "weights" / "subject-patches-toy.safetensors"


def export(folder: Path, checkpoint: Path) -> None:
    """Writes the trained parts as one Stable-Diffusion-shaped checkpoint in fp16."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "diffusion.safetensors").items():
        part, rest = name.split(".", 1)
        prefix = {"unet": "model.diffusion_model.", "text": "cond_stage_model.transformer."}[part]
        tensors[prefix + rest] = tensor
    projection = "cond_stage_model.transformer.text_projection.weight"
    # Nothing uses the pooled output; an identity keeps it defined.
    tensors[projection] = torch.eye(len(tensors[projection]))
    for name, tensor in load_file(folder / "autoencoder.safetensors").items():
        tensors["first_stage_model." + name] = tensor
    save_whole(checkpoint, {k: v.half() for k, v in tensors.items()}, {"modelspec.title": "Subject Patches toy"})
    print(f"wrote {checkpoint} ({checkpoint.stat().st_size / 1e6:.1f} MB)", flush=True)


def parts_of(checkpoint: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The inverse of `export`: the trained parts of a checkpoint, in fp32, by the stage that trains them."""
    parts: dict[str, dict[str, torch.Tensor]] = {"diffusion": {}, "autoencoder": {}}
    prefixes = {
        "model.diffusion_model.": ("diffusion", "unet."),
        "cond_stage_model.transformer.": ("diffusion", "text."),
        "first_stage_model.": ("autoencoder", ""),
    }
    for name, tensor in load_file(checkpoint).items():
        prefix = next(p for p in prefixes if name.startswith(p))
        stage, new = prefixes[prefix]
        parts[stage][new + name.removeprefix(prefix)] = tensor.float()
    return parts


def unpack(checkpoint: Path, folder: Path) -> None:
    """Writes the trained parts of a checkpoint as the stages' results in a run's folder."""
    for stage, tensors in parts_of(checkpoint).items():
        save_whole(folder / f"{stage}.safetensors", tensors)


def work(arguments: argparse.Namespace, peers: Peers) -> None:
    """What each process does: the stages asked for, one after the other."""
    from . import train_autoencoder, train_diffusion

    common = (arguments.folder, torch.device(arguments.device), peers, arguments.workers)
    stages = ("autoencoder", "diffusion", "export") if arguments.stage == "all" else (arguments.stage,)
    if arguments.start:
        stages = ("diffusion", "export")
    for stage in stages:
        done = arguments.stage == "all" and not arguments.start and (arguments.folder / f"{stage}.safetensors").exists()
        if stage == "autoencoder" and not done:
            train_autoencoder.train(
                arguments.minutes_autoencoder, *common, arguments.batch_autoencoder, arguments.seed, arguments.resume
            )
        elif stage == "diffusion" and not done:
            train_diffusion.train(
                arguments.minutes_diffusion, *common, arguments.batch_diffusion, arguments.seed, arguments.resume
            )
        elif stage == "export" and peers.rank == 0:
            export(arguments.folder, arguments.checkpoint)
        peers.wait()


def main() -> None:
    parser = on_any_device(parser_of(__doc__.splitlines()[0], "default", CHECKPOINT))
    parser.add_argument("--minutes-autoencoder", type=float, default=40, help="training time of the autoencoder")
    parser.add_argument(
        "--minutes-diffusion", type=float, default=120, help="training time of the U-Net and text encoder"
    )
    parser.add_argument("--stage", choices=("all", "autoencoder", "diffusion", "export"), default="all")
    parser.add_argument("--batch-autoencoder", type=int, default=16)
    parser.add_argument("--batch-diffusion", type=int, default=32)
    arguments = parsed(parser)
    if arguments.start:
        unpack(arguments.start, arguments.folder)
    together(work, arguments)


if __name__ == "__main__":
    main()
