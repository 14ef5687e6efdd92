"""Tunes the toy's U-Net to recycle: `python tools/host.py python -m toy.train_anylogo`.

AnyLogo's tuning on a toy checkpoint that stays as it is, with the vision model of `toy.train_vision`; see `anylogo.py`.
Writes `anylogo-toy.safetensors`, which Load Semantic Injection loads, and `anylogo-toy-lora.safetensors`, the tuned
U-Net for the host's Load LoRA. Every few minutes it says by how much the error of the noise in a held-out emblem
falls against no reference, and how far the error without any reference has moved from the untouched toy's, and writes
what it has into the run's folder.

The rows of the paper's tables: `--sites` none (blocked: semantic tokens alone), decoder, encoder, "encoder and
decoder" (Table 4); `--keep` 0.3, 0.6, 1 (Figure 7). Stopping is safe at any time: with `--resume` a run goes on from
its last save, with more `--minutes` also one that is over. On a CPU that others use too, `--processes 2`, one thread
each, is the fastest.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from subject_patches.training.files import save_whole

from .command import together
from .pair_training import frozen, pair_parsed, pair_parser, run_of, with_vision
from .pair_training import train as train_from_pairs
from .runs import Peers

HERE = Path(__file__).parent
# Where the host's loaders look for what comes with the pack.
MAPS = HERE / "encoders" / "anylogo-toy.safetensors"
LORA = HERE / "loras" / "anylogo-toy-lora.safetensors"
TRAINED_BY = "python tools/host.py python -m toy.train_anylogo --processes 2"


def train(arguments: argparse.Namespace, peers: Peers) -> None:
    """Trains for the minutes asked for and writes both files."""
    from subject_patches.toy.anylogo import Symbiosis, Tuning
    from subject_patches.toy.pairs import Pairs
    from subject_patches.training.symbiotic import MAPS_TIMES

    from . import vision
    from .data import Words

    torch.manual_seed(arguments.seed)
    model, autoencoder = frozen(arguments.toy)
    sight = vision.load(arguments.vision)
    symbiosis = Symbiosis(model, sight, Words()([""]), arguments.sites, arguments.keep, not arguments.detached)
    tuning = Tuning(model.unet, arguments.rank)
    if arguments.start is not None:
        start(tuning, arguments.start, arguments.start_lora)
    groups = [
        {"params": list(tuning.low_ranks.parameters())},
        {"params": list(tuning.semantic.parameters()), "times": MAPS_TIMES},
    ]
    optimiser = torch.optim.AdamW(groups, arguments.rate, (0.9, 0.99), weight_decay=1e-3)

    def written(trained: Any, folder: Path | None) -> None:
        there = (arguments.checkpoint, arguments.lora)
        write(trained, sight, *(there if folder is None else (folder / MAPS.name, folder / LORA.name)))

    run = run_of("anylogo", tuning, arguments, peers, optimiser)
    train_from_pairs(run, symbiosis, partial(Pairs, autoencoder, grounds=True), written, arguments)


def start(tuning: Any, path: Path, lora_path: Path) -> None:
    """Begins with the two files that an earlier run left, for other weights of the toy, say."""
    maps, lora = load_file(path), load_file(lora_path)
    with torch.no_grad():
        for group, layer in zip(tuning.semantic.groups, tuning.semantic.maps, strict=True):
            layer.weight.copy_(maps[f"semantic.{group}.weight"])
            layer.bias.copy_(maps[f"semantic.{group}.bias"])
        for name, layer in zip(tuning.low_ranks.names, tuning.low_ranks.layers, strict=True):
            layer.up.weight.copy_(lora[f"diffusion_model.{name}.lora_up.weight"])
            layer.down.weight.copy_(lora[f"diffusion_model.{name}.lora_down.weight"])


def write(tuning: Any, vision: Any, path: Path, lora: Path) -> None:
    """Writes the maps' file, with the vision model, and the LoRA's, in half precision."""
    from subject_patches.encoders.semantic_injection import MapsForm, tensors_of
    from subject_patches.encoders.weights import metadata

    from .family import VISION, WIDTH

    form = MapsForm(WIDTH, VISION["hidden_size"], tuning.semantic.groups, "kept")
    tensors = tensors_of(tuning.semantic.tensors(), vision.state_dict())
    save_whole(path, tensors, metadata(form, "SD 1.x", TRAINED_BY, VISION))
    save_whole(lora, tuning.low_ranks.file(), {"trained_by": TRAINED_BY})


def main() -> None:
    # More than this rate harms the U-Net.
    parser = pair_parser(__doc__.splitlines()[0], "anylogo", MAPS, minutes=60, rate=1e-4)
    parser.add_argument("--lora", type=Path, help="the LoRA's file to write; by default --start's, or the pack's own")
    parser.add_argument("--start-lora", type=Path, help="the LoRA of --start, where it is not beside it")
    parser.add_argument("--rank", type=int, default=16, help="of the U-Net's differences")
    parser.add_argument("--sites", default="decoder", help="which layers deliver; none is semantic tokens alone")
    parser.add_argument("--keep", type=float, default=0.6, help="how often a layer keeps the reference (lambda)")
    parser.add_argument("--detached", action="store_true", help="let no gradient go through the reference's pass")
    arguments = pair_parsed(with_vision(parser), "vision")
    if arguments.start is not None:
        arguments.start_lora = arguments.start_lora or arguments.start.with_name(LORA.name)
    arguments.lora = arguments.lora or arguments.start_lora or LORA
    together(train, arguments)


if __name__ == "__main__":
    main()
