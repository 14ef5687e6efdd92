"""Trains the toy's vision model: `python tools/host.py python -m toy.train_vision`.

It learns by itself, from pictures alone; see `vision.py`. Stopping is safe at any time: with `--resume` a run goes on
from its last save, with more `--minutes` also one that is over. At the end it says how often an emblem's view is
nearest to another view of the same one among ten of the same plate and colours.
"""

from __future__ import annotations

import argparse

from .command import RUNS, parsed, parser_of, together
from .runs import Peers

FILE = RUNS / "vision" / "vision.safetensors"


def work(arguments: argparse.Namespace, peers: Peers) -> None:
    """What each process does."""
    from . import vision

    if arguments.measure:
        whole, patches = vision.told_apart(vision.load(arguments.checkpoint))
        print(f"vision: of ten alike the right one {whole:.0%}, by patches {patches:.0%}")
        return
    vision.train(arguments, peers)


def main() -> None:
    parser = parser_of(__doc__.splitlines()[0], "vision", FILE)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--batch", type=int, default=32, help="pictures of a step of each process")
    parser.add_argument("--measure", action="store_true", help="only say how well a file's model tells emblems apart")
    arguments = parsed(parser)
    arguments.processes = 1 if arguments.measure else arguments.processes
    together(work, arguments)


if __name__ == "__main__":
    main()
