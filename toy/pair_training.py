"""What the commands share that train what shows subjects: train_subjects.py, train_anylogo.py, train_router.py."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .command import parsed, parser_of
from .runs import Peers, Run, held_rate
from .train import CHECKPOINT
from .train_vision import FILE as VISION_FILE

# What the host's loaders offer: the shipped encoder, which brings its vision model.
ENCODER = Path(__file__).parent / "encoders" / "anystory-toy.safetensors"
HELD_OUT = 64

# Writes averaged modules, into the run's folder or, where it is None, where the command line says.
Write = Callable[[Any, Path | None], None]


def pair_parser(
    description: str, folder: str, file: Path, minutes: float, rate: float, store: int = 6000
) -> argparse.ArgumentParser:
    """A parser with the options of all of them."""
    parser = parser_of(description, folder, file)
    parser.add_argument("--minutes", type=float, default=minutes, help="training time")
    parser.add_argument("--steps", type=int, help="so many steps instead, whatever time they take")
    parser.add_argument("--toy", type=Path, default=CHECKPOINT, help="the toy's checkpoint that is trained for")
    parser.add_argument("--batch", type=int, default=32, help="rows of a step of each process")
    parser.add_argument("--rate", type=float, default=rate, help="the highest learning rate")
    parser.add_argument("--store", type=int, default=store, help="emblems or scenes that each process keeps encoded")
    parser.add_argument("--every", type=float, default=5.0, help="minutes from one measure to the next")
    return parser


def with_vision(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The parser with the file of the vision model, for what is not trained beside an encoder that has its own."""
    parser.add_argument(
        "--vision",
        type=Path,
        default=VISION_FILE if VISION_FILE.is_file() else ENCODER,
        help="what toy.train_vision wrote, or an encoder's file; where no run wrote one, the shipped encoder's",
    )
    return parser


def pair_parsed(parser: argparse.ArgumentParser, *read: str, into: str = "start") -> argparse.Namespace:
    """The options given; the toy's checkpoint and the files of the options `read` must be there. See `parsed`."""
    arguments = parsed(parser, into)
    for name in ("toy", *read):
        if not getattr(arguments, name).is_file():
            parser.error(f"--{name}: there is no file {getattr(arguments, name)}")
    return arguments


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


def run_of(
    name: str, modules: torch.nn.Module, arguments: argparse.Namespace, peers: Peers, optimiser: Any = None
) -> Run:
    """The run of a command line."""
    run = Run(
        name, modules, arguments.folder / f"{name}.state", arguments.minutes, arguments.rate, peers, warmup=100,
        decay=0.999, optimiser=optimiser, schedule=held_rate, steps=arguments.steps,
    )  # fmt: skip
    if arguments.resume:
        run.resume(torch.device("cpu"))
    return run


def train(run: Run, lesson: Any, pairs: Callable[..., Any], write: Write, arguments: argparse.Namespace) -> None:
    """Trains the run's modules by a `Lesson` until the run is over and writes them; `pairs` of a random generator and a
    capacity are a `Store`. Every few minutes it says what the lesson measures, of held-out rows, and writes what it has
    into the run's folder."""
    peers, batch = run.peers, arguments.batch
    held_out = pairs(np.random.default_rng((2**41, 5)), HELD_OUT)
    held_out.add(HELD_OUT)
    measured = held_out.draw(HELD_OUT, torch.Generator().manual_seed(5))
    # From here on every peer draws for itself.
    own = (arguments.seed * peers.count + peers.rank) * 2**20 + run.step
    torch.manual_seed(own)
    store = pairs(np.random.default_rng((own, 3)), arguments.store)
    while store.written < 8 * batch:
        store.add(batch)
    going, said = True, time.monotonic()
    while going:
        # Encoding a picture costs about as much as a training step on it.
        store.add(max(batch // 16, 1))
        going = run.advance(lesson.loss(run.model, store.draw(batch)), batch)
        if peers.rank == 0 and (not going or time.monotonic() - said > 60 * arguments.every):
            told = lesson.told(run.average.module, measured)
            print(f"{run.name}: {run.step * batch * peers.count} rows; {told}", flush=True)
            write(run.average.module, arguments.folder)
            said = time.monotonic()
    if peers.rank == 0:
        write(run.average.module, None)
