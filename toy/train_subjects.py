"""Trains the toy's subject encoder: `python tools/host.py python -m toy.train_subjects`.

The first stage of AnyStory's training on a toy checkpoint that stays as it is, with the vision model of
`toy.train_vision`; see `subjects.py`. Writes what Load Subject Encoder loads. Every few minutes it says by how much the
error of the noise in a held-out emblem falls against no reference, which moves long before a picture shows it, and
writes what it has into the run's folder.

Stopping is safe at any time: with `--resume` a run goes on from its last save, with more `--minutes` also one that is
over. `--start` begins with the weights of an earlier file, for other weights of the toy, say. On a CPU that others use
too, `--processes 2`, one thread each, is the fastest.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import pack
from .command import joined, parsed, parser_of, together
from .runs import Peers, Run, held_rate, load_tensors, save_whole
from .train import CHECKPOINT
from .train_vision import FILE as VISION_FILE

ENCODER = Path(__file__).parent / "encoders" / "anystory-toy.safetensors"
TRAINED_BY = "python tools/host.py python -m toy.train_subjects --processes 2"
HELD_OUT = 64


def frozen(checkpoint: Path) -> tuple[Any, Any]:
    """The toy's U-Net and text encoder, and its autoencoder, of a checkpoint; nothing of them is trained."""
    from comfy.taesd.taesd import TAESD

    from .family import LATENT_CHANNELS
    from .train import parts_of
    from .train_diffusion import Model

    parts = parts_of(checkpoint)
    model, autoencoder = Model(), TAESD(latent_channels=LATENT_CHANNELS)
    model.load_state_dict(parts["diffusion"], strict=False)
    autoencoder.load_state_dict(parts["autoencoder"])
    return model.requires_grad_(False), autoencoder.requires_grad_(False)


def train(arguments: argparse.Namespace, peers: Peers) -> None:
    """Trains as a command line asks for and writes the encoder's file."""
    pack.load()
    from subject_patches.toy.subjects import Pairs, Stage, encoder_modules

    from . import vision
    from .data import Words

    torch.manual_seed(arguments.seed)
    model, autoencoder = frozen(arguments.toy)
    stage = Stage(model, vision.load(arguments.vision), Words()([""]))
    modules = encoder_modules(model.unet)
    if arguments.start is not None:
        tensors = {name: tensor.float() for name, tensor in load_tensors(arguments.start).items()}
        modules.load_state_dict({name: each for name, each in tensors.items() if not name.startswith("vision.")})
    run = Run(
        "subjects", modules, arguments.folder / "subjects.state", arguments.minutes, arguments.rate, peers,
        warmup=100, decay=0.999, schedule=held_rate,
    )  # fmt: skip
    if arguments.resume:
        run.resume(torch.device("cpu"))
    held_out = Pairs(autoencoder, np.random.default_rng((2**41, 5)), HELD_OUT)
    held_out.add(HELD_OUT)
    measured = held_out.draw(HELD_OUT, torch.Generator().manual_seed(5))
    # From here on every peer draws for itself.
    own = (arguments.seed * peers.count + peers.rank) * 2**20 + run.step
    torch.manual_seed(own)
    pairs = Pairs(autoencoder, np.random.default_rng((own, 3)), arguments.store)
    while pairs.written < 8 * arguments.batch:
        pairs.add(arguments.batch)
    going, said = True, time.monotonic()
    while going:
        # Encoding a picture costs about as much as a training step on it.
        pairs.add(max(arguments.batch // 16, 1))
        going = run.advance(stage.loss(modules, pairs.draw(arguments.batch)), arguments.batch)
        if peers.rank == 0 and (not going or time.monotonic() - said > 60 * arguments.every):
            falls = stage.fall(run.average.module.eval(), measured)
            told = ", ".join(f"{name} {share:+.1%}" for name, share in falls.items())
            print(
                f"subjects: {run.step * arguments.batch * peers.count} pairs; error in the emblem: {told}", flush=True
            )
            write(run.average.module, stage.vision, arguments.folder / ENCODER.name)
            said = time.monotonic()
    if peers.rank == 0:
        write(run.average.module, stage.vision, arguments.checkpoint)


def write(modules: Any, vision: Any, path: Path) -> None:
    """Writes the encoder's file, in half precision."""
    from subject_patches.encoders.subject_encoder import metadata
    from subject_patches.toy.subjects import FORM

    from .family import VISION

    tensors = {**modules.state_dict(), **{f"vision.{name}": each for name, each in vision.state_dict().items()}}
    about = metadata(FORM, "the toy", TRAINED_BY, VISION)
    save_whole(path, {name: tensor.half() for name, tensor in tensors.items()}, about)


def work(rank: int, arguments: argparse.Namespace, meeting: Path | None) -> None:
    """What each process does."""
    peers, _ = joined(rank, arguments, meeting)
    train(arguments, peers)
    peers.wait()


def main() -> None:
    parser = parser_of(__doc__.splitlines()[0], "subjects", ENCODER)
    parser.set_defaults(device="cpu")
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--toy", type=Path, default=CHECKPOINT, help="the toy's checkpoint that the encoder is for")
    parser.add_argument("--vision", type=Path, default=VISION_FILE, help="what toy.train_vision wrote")
    parser.add_argument("--batch", type=int, default=32, help="pairs of a step of each process")
    parser.add_argument("--rate", type=float, default=6e-4)
    parser.add_argument("--store", type=int, default=6000, help="emblems that each process keeps encoded")
    parser.add_argument("--every", type=float, default=5.0, help="minutes from one measure to the next")
    arguments = parsed(parser)
    for name in ("toy", "vision"):
        if not getattr(arguments, name).is_file():
            parser.error(f"--{name}: there is no file {getattr(arguments, name)}")
    together(work, arguments)


if __name__ == "__main__":
    main()
