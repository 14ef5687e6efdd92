"""What the trainers' command lines share: where a run keeps its files, who trains, and how the processes start."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import multiprocessing

from .runs import Peers

Work = Callable[[argparse.Namespace, Peers], None]
RUNS = Path(__file__).parent / "runs"


def parser_of(description: str, folder: str, checkpoint: Path) -> argparse.ArgumentParser:
    """A parser with the options of every trainer; `folder` is the run's own below RUNS. Without `on_any_device` it
    trains on the CPU."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--folder", type=Path, default=RUNS / folder, help="where the run keeps its files")
    written = "the file to write; by default the one that is gone on from (--start), or else the pack's own"
    parser.add_argument("--checkpoint", type=Path, default=checkpoint, help=written)
    parser.add_argument("--processes", type=int, default=1, help="processes that train together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="a checkpoint to train on from")
    parser.add_argument("--resume", action="store_true", help="go on from the last save in the folder")
    parser.set_defaults(device="cpu")
    return parser


def on_any_device(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The parser with the options of a trainer whose pictures are drawn while a device trains."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw pictures")
    return parser


def parsed(parser: argparse.ArgumentParser, into: str = "start") -> argparse.Namespace:
    """The options given; a checkpoint to start from must be there. What is not told which file to write writes that of
    the option `into`, where it has one: never what comes with the pack in the place of something else."""
    arguments = parser.parse_args(namespace=argparse.Namespace(checkpoint=None))
    arguments.checkpoint = arguments.checkpoint or getattr(arguments, into) or parser.get_default("checkpoint")
    if arguments.start and not arguments.start.is_file():
        parser.error(f"--start: there is no checkpoint {arguments.start}")
    return arguments


def together(work: Work, arguments: argparse.Namespace) -> None:
    """Runs `work(arguments, peers)` in each of the run's processes."""
    if arguments.processes == 1:
        _join(0, work, arguments, None)
        return
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_join, (work, arguments, Path(folder) / "meeting"), arguments.processes)


def _join(rank: int, work: Work, arguments: argparse.Namespace, meeting: Path | None) -> None:
    """One process's part in a run, which has imported nothing yet of the host that asks for its device."""
    peers = Peers(rank, arguments.processes, meeting)
    if peers.count > 1:
        torch.set_num_threads(1)
    from comfy.cli_args import args as host_arguments

    host_arguments.cpu = torch.device(arguments.device).type == "cpu"
    # On a CPU the gradients' denormal numbers make a step several times slower.
    torch.set_flush_denormal(True)
    work(arguments, peers)
    peers.wait()
