"""Trains the toy's subject encoder: `python tools/host.py python -m toy.train_subjects`.

The first stage of AnyStory's training on a toy checkpoint that stays as it is, with the vision model of
`toy.train_vision`; see `subjects.py`. Writes what Load Subject Encoder loads. Every few minutes it says by how much the
error of the noise in a held-out emblem falls against no reference, which moves long before a picture shows it, and
writes what it has into the run's folder.

Stopping is safe at any time: with `--resume` a run goes on from its last save, with more `--minutes` also one that is
over. `--start` begins with the weights of an earlier file, for other weights of the toy, say. What is written has no
router: `toy.train_router --join` puts an earlier one in. On a CPU that others use
too, `--processes 2`, one thread each, is the fastest.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from .command import together
from .pair_training import ENCODER, frozen, pair_parsed, pair_parser, run_of, with_vision
from .pair_training import train as train_from_pairs
from .runs import Peers

TRAINED_BY = "python tools/host.py python -m toy.train_subjects --processes 2"


def train(arguments: argparse.Namespace, peers: Peers) -> None:
    """Trains as a command line asks for and writes the encoder's file."""
    from subject_patches.toy.pairs import Pairs
    from subject_patches.toy.subjects import Stage, encoder_modules

    from . import vision
    from .data import Words

    torch.manual_seed(arguments.seed)
    model, autoencoder = frozen(arguments.toy)
    stage = Stage(model, vision.load(arguments.vision), Words()([""]))
    modules = encoder_modules(model.unet)
    if arguments.start is not None:
        tensors = {name: tensor.float() for name, tensor in load_file(arguments.start).items()}
        modules.load_state_dict({name: tensors[name] for name in modules.state_dict()})

    def written(trained: Any, folder: Path | None) -> None:
        write(trained, stage.vision, arguments.checkpoint if folder is None else folder / ENCODER.name)

    run = run_of("subjects", modules, arguments, peers)
    train_from_pairs(run, stage, partial(Pairs, autoencoder), written, arguments)


def write(modules: Any, vision: Any, path: Path) -> None:
    """Writes the encoder's file."""
    from subject_patches.toy.subjects import FORM
    from subject_patches.training.encoder_file import write_encoder

    from .family import VISION

    write_encoder(path, modules, FORM, "the toy", TRAINED_BY, (vision, VISION))


def main() -> None:
    parser = pair_parser(__doc__.splitlines()[0], "subjects", ENCODER, minutes=120, rate=6e-4)
    together(train, pair_parsed(with_vision(parser), "vision"))


if __name__ == "__main__":
    main()
