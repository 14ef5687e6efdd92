"""What the trainers' command lines share: where a run keeps its files, who trains, and how the processes start."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import multiprocessing

from .runs import Peers

Work = Callable[[int, argparse.Namespace, Path | None], None]
RUNS = Path(__file__).parent / "runs"


def parser_of(description: str, folder: str, checkpoint: Path) -> argparse.ArgumentParser:
    """A parser with the options of every trainer; `folder` is the run's own below RUNS. Without `on_any_device` it
    trains on the CPU."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--folder", type=Path, default=RUNS / folder, help="where the run keeps its files")
    parser.add_argument("--checkpoint", type=Path, default=checkpoint, help="the file to write")
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


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options given; a checkpoint to start from must be there."""
    arguments = parser.parse_args()
    if arguments.start and not arguments.start.is_file():
        parser.error(f"--start: there is no checkpoint {arguments.start}")
    return arguments


def together(work: Work, arguments: argparse.Namespace) -> None:
    """Runs `work(rank, arguments, meeting)` in each of the run's processes."""
    if arguments.processes == 1:
        work(0, arguments, None)
        return
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, (arguments, Path(folder) / "meeting"), arguments.processes)


def joined(rank: int, arguments: argparse.Namespace, meeting: Path | None) -> tuple[Peers, torch.device]:
    """One process's part in a run, before it imports anything of the host: its peers and its device."""
    peers = Peers(rank, arguments.processes, meeting)
    if peers.count > 1:
        torch.set_num_threads(1)
    device = torch.device(arguments.device)
    from comfy.cli_args import args as host_arguments

    host_arguments.cpu = device.type == "cpu"
    # On a CPU the gradients' denormal numbers make a step several times slower.
    torch.set_flush_denormal(True)
    return peers, device
