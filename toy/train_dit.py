"""Trains the DiT, and its text encoder with it: `python tools/host.py python -m toy.train_dit`.

It needs the first toy's checkpoint, whose autoencoder it keeps as it is and whose text encoder it starts from. Stopping
is safe at any time: with `--resume` a run goes on from its last save (one every three minutes), with `--start` it goes
on from a checkpoint. The rate is held until the last quarter of the minutes, so a run can be given more of them.
`--minutes 0 --resume` trains no further and writes the last save as a checkpoint.

On a CPU that others use too, `--processes 2`, one thread each, is the fastest.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file
from subject_patches.training.files import save_whole
from torch import Tensor

from .command import on_any_device, parsed, parser_of, together
from .runs import Peers
from .train import CHECKPOINT as FIRST

CHECKPOINT = FIRST.with_name("subject-patches-toy-dit.safetensors")
CLIP = "text_encoders.clip_l."
# Where the host looks for each trained part.
PREFIXES = {"dit.": "model.diffusion_model.", "text.": CLIP + "transformer."}


def first_toy() -> dict[str, Tensor]:
    """The first toy's autoencoder and text encoder, in fp32, as the trainer takes them."""
    prefixes = {"first_stage_model.": "vae.", "cond_stage_model.transformer.": "text."}
    return renamed(load_file(FIRST), prefixes)


def renamed(tensors: dict[str, Tensor], prefixes: dict[str, str]) -> dict[str, Tensor]:
    """The tensors under some prefixes, each under its new one, in fp32."""
    return {
        new + name.removeprefix(old): tensor.float()
        for name, tensor in tensors.items()
        for old, new in prefixes.items()
        if name.startswith(old)
    }


def trained_parts(checkpoint: Path) -> dict[str, Tensor]:
    """The trained parts of a checkpoint, named as the trainer names them: the inverse of `export`."""
    return renamed(load_file(checkpoint), {new: old for old, new in PREFIXES.items()})


def export(trained: dict[str, Tensor], ids: Tensor, checkpoint: Path) -> None:
    """Writes the trained parts with the first toy's autoencoder as one FLUX-shaped checkpoint in fp16, whose table of
    words is cut down to the words `ids`."""
    from .dit_family import IDS

    # Nothing uses the scale, but the host misses it aloud.
    tensors = renamed(trained, PREFIXES) | {CLIP + "logit_scale": torch.tensor(4.6055)}
    tensors |= renamed(first_toy(), {"vae.": "vae."})
    halves = {name: tensor.half() for name, tensor in tensors.items()}
    save_whole(checkpoint, halves | {"text_encoders." + IDS: ids.int()}, {"modelspec.title": "Subject Patches toy DiT"})
    print(f"wrote {checkpoint} ({checkpoint.stat().st_size / 1e6:.1f} MB)", flush=True)


def work(arguments: argparse.Namespace, peers: Peers) -> None:
    """What each process does."""
    from . import train_rectified_flow

    trained, ids = train_rectified_flow.train(
        first_toy(), trained_parts(arguments.start) if arguments.start else None, arguments.minutes,
        arguments.folder / "dit.state", torch.device(arguments.device), peers, arguments.workers, arguments.batch,
        arguments.rate, arguments.seed, arguments.resume,
    )  # fmt: skip
    if peers.rank == 0:
        export(trained, ids, arguments.checkpoint)


def main() -> None:
    parser = on_any_device(parser_of(__doc__.splitlines()[0], "dit", CHECKPOINT))
    parser.add_argument("--minutes", type=float, default=240, help="training time")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3, help="the highest learning rate")
    together(work, parsed(parser))


if __name__ == "__main__":
    main()
