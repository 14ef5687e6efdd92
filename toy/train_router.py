"""Trains the router of the toy's subject encoder: `python tools/host.py python -m toy.train_router`.

The second stage of AnyStory's training: the encoder that `toy.train_subjects` wrote stays as it is, and its file is
written anew with a router in it; see `routing.py`. Every few minutes it says how well the maps fit the true masks of
held-out scenes, and writes what it has into the run's folder.

Stopping is safe at any time: with `--resume` a run goes on from its last save. `--start` begins with the router of
another file, and with `--join` nothing is trained: that router is put into the `--encoder`'s file as it is. It knows
vision features and the U-Net's layers, not the encoder, so it fits another encoder of the same two.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .command import together
from .pair_training import ENCODER, frozen, pair_parsed, pair_parser, run_of
from .pair_training import train as train_from_scenes
from .runs import Peers
from .train_subjects import TRAINED_BY as FIRST_STAGE

TRAINED_BY = f"{FIRST_STAGE}; python tools/host.py python -m toy.train_router"


def train(arguments: argparse.Namespace, peers: Peers) -> None:
    """Trains as a command line asks for and writes the encoder's file with the router."""
    from subject_patches.encoders.subject_encoder import read_subject_encoder
    from subject_patches.toy.groups import Groups
    from subject_patches.toy.routing import Routing, new_router

    from .data import Words

    torch.manual_seed(arguments.seed)
    encoder = read_subject_encoder(arguments.encoder)
    vision, router = encoder.vision.model.float(), new_router(encoder.modules)
    if arguments.start is not None:
        begun = read_subject_encoder(arguments.start).router
        if begun is None:
            raise SystemExit(f"--start: {arguments.start} has no router; give a file that toy.train_router wrote.")
        router.load_state_dict({name: each.float() for name, each in begun.model.state_dict().items()})

    def written(trained: Any, folder: Path | None) -> None:
        write(trained, encoder, arguments.checkpoint if folder is None else folder / ENCODER.name)

    if arguments.join:
        written(router, None)
        return
    model, autoencoder = frozen(arguments.toy)
    routing = Routing(model, vision, Words()([""]), encoder.modules.float())
    run = run_of("router", router, arguments, peers)
    train_from_scenes(run, routing, partial(Groups, autoencoder, vision), written, arguments)


def write(router: Any, encoder: Any, path: Path) -> None:
    """Writes the file of an encoder that is loaded with a router in it."""
    from subject_patches.toy.routing import ROUTER
    from subject_patches.training.encoder_file import write_with_router

    write_with_router(path, encoder, router, ROUTER, TRAINED_BY)


def main() -> None:
    parser = pair_parser(__doc__.splitlines()[0], "router", ENCODER, minutes=60, rate=1e-3, store=2000)
    parser.add_argument("--encoder", type=Path, default=ENCODER, help="what toy.train_subjects wrote")
    parser.add_argument("--join", action="store_true", help="only put the router of --start into --encoder's file")
    arguments = pair_parsed(parser, "encoder", into="encoder")
    if arguments.join and arguments.start is None:
        parser.error("--join needs the file whose router it takes: --start")
    together(train, arguments)


if __name__ == "__main__":
    main()
