"""Measure what the pack's patches cost: `python tools/bench.py [--shape NAME] [--steps N] [--repeats N]`, or all that
docs/BENCHMARKS.md has, in one go: `python tools/bench.py --all`.

Vanilla and patched sampling take turns in one process, and what is printed are ratios to vanilla: the first picture of
a subject (cold: its features are computed), later ones (warm: they come from the cache), the passes of the model that
each took, and the most memory each held. Weights are random in the shapes of real models, the toy's are its own;
inputs are random, never zero. With `--against NAME` the ratios are to later pictures of that row instead, sampled in
turn in the same way.
"""

from __future__ import annotations

import shlex
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from host import ROOT, Host, find_host
from hosting.command import Parser, enter, run
from hosting.errors import ToolError
from measuring.given import PHRASES, Shape

SHAPES = {
    shape.name: shape
    for shape in (
        Shape("toy", 16, 8, 64),
        Shape("sd15", 64, 4, 768),
        Shape("sdxl", 128, 4, 2048),
        Shape("flux", 128, 16, 4096, 512),
        Shape("flux-quarter", 64, 16, 4096, 128),
    )
}
# What docs/BENCHMARKS.md has, each in a process of its own. A window of 15 % of the steps needs several of them, and so
# does a mask that acts late: these are of the toy alone.
_LAYOUT = '--only "layout bias"'
_MASKS = '--against "one subject by masks" --only "eight subjects by masks'
_MAPS = '--against "one subject by maps" --only "eight subjects by maps"'
_ONCE = "recycled; layout bias; one subject by masks; eight subjects by masks"
_QUARTER = "--shape flux-quarter --size 64 --cfg 1 --steps 1"
_FLUX = "--shape flux --bf16 --sdpa --cfg 1 --steps 1"
RUNS = (
    "--shape toy --steps 8",
    f"{_QUARTER} --sdpa {_LAYOUT}",
    f'{_QUARTER} --sdpa {_MASKS}"',
    f"{_FLUX} --size 64 {_LAYOUT}",
    f'{_FLUX} --size 64 {_MASKS}"',
    f'--shape sd15 --size 32 --steps 1 --only "{_ONCE}; a trained encoder\'s subject; semantic injection"',
    f'--shape flux-quarter --size 32 --steps 2 --only "{_ONCE}; AnyStory"',
    f'--shape toy --steps 8 {_MASKS}; dense bias"',
    f"--shape toy --steps 8 {_MAPS}",
    f"{_QUARTER} {_LAYOUT}",
    f'{_QUARTER} {_MASKS}"',
    f"{_FLUX} --size 32 {_LAYOUT}",
    f'{_FLUX} --size 32 {_MASKS}"',
    f"{_FLUX} --size 64 {_MAPS}",
    f'--shape sd15 --size 32 --steps 1 {_MASKS}"',
    f"{_FLUX} --size 128 {_LAYOUT}",
    f'{_FLUX} --size 128 {_MASKS}"',
)


@dataclass
class Run:
    """One sampling: seconds, passes of the model counted in rows of its batches, peak memory in bytes (0: unknown)."""

    seconds: float
    rows: int
    peak: int


def parser() -> Parser:
    """What the command takes."""
    known = Parser(prog="bench.py", description="Measure what the pack's patches cost, as ratios to vanilla.")
    known.add_argument("--all", action="store_true", help="all that docs/BENCHMARKS.md has; takes --repeats alone")
    known.add_argument("--shape", choices=sorted(SHAPES), default="toy", help="the model's shape (default: toy)")
    known.add_argument("--size", type=int, metavar="N", help="latents of N x N instead of the shape's usual ones")
    known.add_argument("--steps", type=int, default=8, help="sampling steps of each run")
    known.add_argument("--repeats", type=int, default=5, help="runs of each kind; medians are printed")
    known.add_argument(
        "--processor",
        action="store_true",
        help="count one thread's seconds of the processor, which other work on the machine hardly changes",
    )
    known.add_argument("--cfg", type=float, default=4.0)
    known.add_argument("--bf16", action="store_true", help="weights of bfloat16, also without a GPU")
    known.add_argument(
        "--sdpa", action="store_true", help="the host's attention by PyTorch, which it takes on GPUs, also without one"
    )
    known.add_argument("--against", default="", metavar="WORDS", help="ratios to this row instead of vanilla")
    known.add_argument("--only", default="", metavar="WORDS", help="only rows with these whole words in their names")
    return known


def main() -> int:
    """The command line; see the module's text."""
    options = parser().parse_args()
    if options.all:
        return _all(options.repeats)
    shape = SHAPES[options.shape]
    if options.size is not None:
        if options.size < 8 or options.size % 8:
            raise ToolError(f"The size is {options.size}; give a multiple of 8.")
        shape = replace(shape, size=options.size)
    host = find_host()
    enter(host, Path(__file__), sys.argv[1:])
    _bench(host, shape, options)
    return 0


def _all(repeats: int) -> int:
    """All RUNS, one after the other, by one thread's seconds of the processor."""
    for number, arguments in enumerate(RUNS, 1):
        given = f"{arguments} --processor --repeats {repeats}"
        print(f"\n{number} of {len(RUNS)}: `python tools/bench.py {given}`\n", flush=True)
        done = subprocess.run([sys.executable, __file__, *shlex.split(given)], check=False)
        if done.returncode:
            return done.returncode
    return 0


def _bench(host: Host, shape: Shape, options: Namespace) -> None:
    from hosting.pack import import_host, load_pack

    import_host(host.tree)
    from comfy.cli_args import args

    args.use_pytorch_cross_attention = options.sdpa
    load_pack(ROOT)
    import torch

    # Denormal numbers would slow a CPU down several times, and unevenly.
    torch.set_flush_denormal(True)
    if options.processor:
        torch.set_num_threads(1)
    with torch.inference_mode():
        _measure(shape, options, time.thread_time if options.processor else time.perf_counter)


def _measure(shape: Shape, options: Namespace, clock: Callable[[], float]) -> None:
    import torch
    from measuring import COSTS
    from measuring.given import chosen, concept_tokens
    from subject_patches.patches.mechanisms.dual_branch import BRANCH_KEY
    from subject_patches.patches.parts.prompt import SPANS_KEY

    patches = {name: patch for rows in COSTS for name, patch in rows(shape).items()}
    names = chosen(options.only, patches)
    steps, cfg = options.steps, options.cfg
    model = _model(shape, options.bf16)
    device = "the CPU"
    if torch.accelerator.is_available():
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else torch.accelerator.current_accelerator()
    print(
        f"{shape.name}, latents {shape.size} x {shape.size}, {steps} steps, CFG {cfg:g}, "
        f"{torch.get_num_threads()} threads, {device}, {model.model_dtype()}"
    )
    print("| mechanism | first picture | later pictures | rows of the model, first / later | peak memory |")
    print("|---|---|---|---|---|")
    generator = torch.Generator().manual_seed(0)
    conditionings = [
        [[torch.randn(1, shape.tokens, shape.width, generator=generator), {**shape.pooled(generator), **known}]]
        for known in ({SPANS_KEY: PHRASES, BRANCH_KEY: concept_tokens()}, {})
    ]
    other = chosen(options.against, patches)[0] if options.against else ""
    base = _sampling(patches[other](model) if other else model, shape, conditionings, steps, cfg, clock)
    if other:
        print(f"| {other} | | 1 | | |")
    # Once before anything counts.
    base(0)
    for name in names:
        try:
            patches[name](model)
        except ValueError as refused:
            print(f"| {name} | not for this model: {refused} | | | |")
            continue
        ratios: dict[str, list[float]] = {"cold": [], "warm": [], "memory": []}
        for repeat in range(options.repeats):
            # A fresh subject each time: the first picture pays for its features, the second finds them.
            patched = _sampling(patches[name](model), shape, conditionings, steps, cfg, clock)
            plain, cold, warm, again = base(repeat), patched(repeat), patched(repeat + 100), base(repeat + 200)
            seconds = (plain.seconds + again.seconds) / 2
            ratios["cold"].append(cold.seconds / seconds)
            ratios["warm"].append(warm.seconds / seconds)
            if plain.peak:
                ratios["memory"].append(max(cold.peak, warm.peak) / plain.peak)
        memory = f"{statistics.median(ratios['memory']):.2f}" if ratios["memory"] else "not measured"
        print(
            f"| {name} | {_spread(ratios['cold'])} | {_spread(ratios['warm'])} "
            f"| {cold.rows / plain.rows:.2f} / {warm.rows / plain.rows:.2f} | {memory} |",
            flush=True,
        )


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _model(shape: Shape, bf16: bool) -> Any:
    if shape.name == "toy":
        from subject_patches.toy.sampling import Toy

        return Toy.load().model
    import comfy.supported_models as families
    import torch
    from hosting.random_models import FLUX, FLUX_QUARTER, SD, SDXL, model_of

    dtype = torch.float16 if torch.cuda.is_available() else torch.float32
    dtype = torch.bfloat16 if bf16 or (shape.flux and torch.cuda.is_available()) else dtype
    if shape.flux:
        return model_of(families.Flux, FLUX if shape.name == "flux" else FLUX_QUARTER, dtype=dtype)
    if shape.name == "sd15":
        return model_of(families.SD15, {**SD, "context_dim": shape.width}, dtype=dtype)
    return model_of(families.SDXL, SDXL, dtype=dtype)


def _sampling(
    model: Any, shape: Shape, conditionings: Any, steps: int, cfg: float, clock: Callable[[], float]
) -> Callable[[int], Run]:
    """A function of the seed that samples one picture and says what it took, by a clock in seconds."""
    import comfy.sample
    import torch

    rows = [0]

    def count(network: Any, args: tuple[Any, ...]) -> None:
        rows[0] += len(args[0])

    # Of every call, companions' included, which run without what wraps the picture's.
    model.model.diffusion_model.register_forward_pre_hook(count)

    def sample(seed: int) -> Run:
        noise = torch.randn(1, shape.channels, shape.size, shape.size, generator=torch.Generator().manual_seed(seed))
        rows[0] = 0
        _reset_peak()
        start = clock()
        comfy.sample.sample(
            model, noise, steps, cfg, "euler", "normal", *conditionings, torch.zeros_like(noise), disable_pbar=True
        )
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return Run(clock() - start, rows[0], _peak())

    return sample


def _reset_peak() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        # Linux forgets a process's peak when a 5 is written here.
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak() -> int:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform != "linux":
        return 0
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    run(main)
