"""Train what shows subjects, for a checkpoint of a real family, on one device or many.

    python tools/train_subjects.py --checkpoint CKPT --vision DINOV2 --data DATA --folder OUT --steps N [options]
    python tools/host.py python -m torch.distributed.run --standalone --nproc-per-node 8 tools/train_subjects.py ...

The kind `anylogo` tunes the U-Net to lend and read its own features (a LoRA) and trains the maps of its tokens. The
kind `anystory` trains a subject encoder beside a U-Net that stays as it is, and with `--stage 2` the router of an
`--encoder` that is trained. DATA is a folder or WebDataset shards; see docs/TRAINING.md. It needs the extra `train`
(accelerate, and for shards webdataset). Stopping is safe: the same command goes on from the last save.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

# The Python of ComfyUI's package for Windows does not look beside a script.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from host import ROOT, find_host
from hosting.command import Parser, enter, run
from hosting.errors import ToolError

KINDS = ("anylogo", "anystory")
PRECISIONS = {"bf16": "bf16", "fp32": "no"}


def main() -> int:
    """The command line; see the module's text."""
    parser = Parser(prog="train_subjects.py", description="Train what shows subjects, for a checkpoint.")
    parser.add_argument("--kind", choices=KINDS, default=KINDS[0])
    parser.add_argument("--stage", type=int, choices=(1, 2), default=1, help="anystory's: encoder, then router")
    parser.add_argument("--encoder", type=Path, help="what stage 1 wrote, for stage 2")
    parser.add_argument("--checkpoint", type=Path, required=True, help="a checkpoint with U-Net, CLIP and VAE")
    parser.add_argument("--vae", type=Path, help="another VAE (AnyLogo trains SD 1.5 with SDXL's)")
    parser.add_argument("--vision", type=Path, help="a vision model that ComfyUI loads: DINOv2")
    parser.add_argument("--data", required=True, help="a folder of samples, or shards, like data-{000..127}.tar")
    parser.add_argument("--folder", type=Path, required=True, help="where the training keeps its files")
    parser.add_argument("--steps", type=int, required=True, help="the paper's are 50000")
    parser.add_argument(
        "--batch", type=int, default=4, help="samples of each process at once; the paper's are 64 in all"
    )
    parser.add_argument("--accumulation", type=int, default=1, help="batches of a step")
    parser.add_argument("--rate", type=float, default=1e-4, help="of what is trained")
    parser.add_argument("--rank", type=int, default=64, help="of the low-rank differences (anylogo)")
    parser.add_argument("--tokens", type=int, default=64, help="how many a subject gets (anystory)")
    parser.add_argument("--size", type=int, default=512, help="pixels of a side")
    parser.add_argument(
        "--keep", type=float, default=0.6, help="how often a layer keeps the reference (anylogo's lambda)"
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument("--checkpointing", action="store_true", help="a third more time for much less memory")
    parser.add_argument("--detached", action="store_true", help="let no gradient go through the reference's pass")
    parser.add_argument("--average", type=float, default=0.9999, help="decay of the weights' moving average")
    parser.add_argument("--save-every", type=int, default=500, help="steps from one save to the next")
    # Other ways of starting a process would have to find the pack anew in it.
    forks = multiprocessing.get_start_method() == "fork"
    parser.add_argument(
        "--workers", type=int, default=2 if forks else 0, help="processes that read pictures (on Linux)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true", help="train on the CPU")
    options = parser.parse_args()
    if options.stage == 2 and (options.kind != "anystory" or options.encoder is None):
        parser.error("--stage 2 needs --kind anystory and the encoder that stage 1 wrote: --encoder")
    if options.stage == 1 and options.encoder is not None:
        parser.error("--encoder is for --stage 2; stage 1 trains an encoder of its own")
    if options.stage == 1 and options.vision is None:
        parser.error("--vision: give the file of the vision model")
    for name in ("checkpoint", "vae", "vision", "encoder"):
        path = getattr(options, name)
        if path is not None and not path.is_file():
            parser.error(f"--{name}: there is no file {path}")
    if options.encoder is not None and options.encoder.resolve().parent == options.folder.resolve():
        parser.error(f"--folder is where {options.encoder} lies; give another, in which the same name is free")
    if options.workers and not forks:
        parser.error(f"--workers is {options.workers}, but this system cannot start such processes; leave it out")
    if options.size % 64:
        parser.error(f"--size is {options.size}; give a multiple of 64")
    host = find_host(installed=True)
    enter(host, Path(__file__), sys.argv[1:])
    if importlib.util.find_spec("accelerate") is None:
        raise ToolError(
            f"accelerate is not installed beside ComfyUI; run {sys.executable} -m pip install accelerate webdataset."
        )
    from hosting.pack import import_host, load_pack

    import_host(host.tree)
    load_pack(ROOT)
    try:
        losses = _train(options)
    except ValueError as error:
        raise ToolError(str(error)) from error
    print(f"{len(losses)} steps, files in {options.folder}")
    return 0


def _train(options: Any) -> list[float]:
    from comfy.cli_args import args

    args.cpu = args.cpu or options.cpu
    import comfy.sd
    import comfy.utils
    import torch
    from accelerate import Accelerator
    from subject_patches.encoders.subject_encoder import read_subject_encoder
    from subject_patches.toy import family
    from subject_patches.training.accelerated import Accelerated, Plan
    from subject_patches.training.anylogo import AnyLogoTuning
    from subject_patches.training.frozen import Frozen
    from subject_patches.training.samples import source_of
    from subject_patches.training.subject_encoder import SubjectEncoderTraining
    from subject_patches.training.subject_router import SubjectRouterTraining

    family.register()
    accelerator = Accelerator(mixed_precision=PRECISIONS[options.precision], cpu=args.cpu)
    if accelerator.device.type == "cuda":
        torch.cuda.set_device(accelerator.device)
    elif args.cpu:
        # Denormal numbers slow a CPU down several times, and mean nothing here.
        torch.set_flush_denormal(True)
    torch.manual_seed(options.seed)
    try:
        model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(str(options.checkpoint))
    except RuntimeError as error:
        raise ToolError(f"--checkpoint: {options.checkpoint} is none that ComfyUI knows ({error}).") from error
    if None in (model, clip, vae):
        raise ToolError(f"--checkpoint: {options.checkpoint} needs a U-Net, a text encoder and a VAE in one file.")
    if options.vae is not None:
        vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(options.vae)))
    encoder = None if options.encoder is None else read_subject_encoder(options.encoder)
    vision = encoder.vision if options.vision is None else vision_of(options.vision)
    if vision is None:
        raise ToolError(f"--vision: {options.encoder} brings no vision model; give the one that it was trained with.")
    dtype = torch.float32 if options.precision == "fp32" else torch.bfloat16
    frozen = Frozen(model, clip, vae, vision, dtype, options.checkpointing, encoder)
    if options.kind == "anylogo":
        kind: Any = AnyLogoTuning(frozen, options.rank, keep=options.keep, through=not options.detached)
    elif options.stage == 2:
        kind = SubjectRouterTraining(frozen)
    else:
        kind = SubjectEncoderTraining(frozen, options.size, options.tokens)
    plan = Plan(
        options.folder, options.steps, options.batch, options.size, options.rate, options.accumulation,
        options.average, options.save_every, options.seed, options.workers,
    )  # fmt: skip
    return Accelerated(kind, source_of(options.data), plan, accelerator).run()


def vision_of(path: Path) -> Any:
    """The CLIP_VISION in a file that the host's loader knows, or that a file of this pack brings."""
    import comfy.clip_vision
    from subject_patches.encoders.semantic_injection import read_semantic_maps

    found = comfy.clip_vision.load(str(path))
    if found is None:
        with suppress(ValueError):
            found = read_semantic_maps(path).vision
    if found is None:
        raise ToolError(f"--vision: {path} holds no vision model that ComfyUI knows; give a DINOv2's or a CLIP's.")
    return found


if __name__ == "__main__":
    run(main)
