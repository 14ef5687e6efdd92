"""Turn weights that papers' authors published as pickles into safetensors files that the nodes read.

    python tools/convert.py FILE                AnyStory's anystory_flux.bin, for Load AnyStory
    python tools/convert.py FILE --noun NOUN    a residual token of Cones 2, for Load Residual Token

Nothing in FILE is executed. Every name and shape is checked; what a file decides (ranks, how many tokens a noun has) is
read from it. The result is put beside it, or where --to says; the command says into which models folder it belongs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

# The Python of ComfyUI's package for Windows does not look beside a script.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from host import ROOT, find_host
from hosting.archive import sha256_of
from hosting.command import Parser, enter, run
from hosting.errors import ToolError
from hosting.pack import import_host, load_pack

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "models/subject_encoders"
RESIDUALS = "models/residual_tokens"
# Cones 2 was published for SD 2.1.
_WIDTH = 1024


def main() -> int:
    """The command line; see the module's text."""
    parser = Parser(prog="convert.py", description="Turn published pickles into safetensors files.")
    parser.add_argument("file", type=Path, metavar="FILE", help="anystory_flux.bin, or a residual token of Cones 2")
    parser.add_argument("--noun", help="FILE is a residual token of Cones 2 that stands in for this noun")
    parser.add_argument("--to", type=Path, metavar="PATH", help="the file to write (default: beside FILE)")
    options = parser.parse_args()
    source = options.file
    target = options.to or source.with_suffix(".safetensors")
    if not source.is_file():
        raise ToolError(f"There is no file {source}; give the path of a published file.")
    if target.suffix != ".safetensors":
        raise ToolError(f"{target} does not end in .safetensors; the host would not list it: give another name.")
    if target.exists():
        raise ToolError(f"{target} exists already; delete it, or give another path with --to.")
    host = find_host(installed=True)
    enter(host, Path(__file__), sys.argv[1:])
    import_host(host.tree)
    load_pack(ROOT)
    print(convert(source, target) if options.noun is None else convert_residual(source, target, options.noun))
    return 0


def convert(source: Path, target: Path) -> str:
    """Writes the weights in `source` to `target` and says in a few words what they are.

    Raises ToolError with one sentence where the file is another, is damaged, or wants something executed."""
    from subject_patches.encoders.anystory_file import FLUX_DEV, form_of, metadata

    parts = _parts(source)
    try:
        form = form_of({part: {n: tuple(t.shape) for n, t in named.items()} for part, named in parts.items()})
        tensors = {f"{part}.{name}": tensor for part, named in parts.items() for name, tensor in named.items()}
        _check_values(tensors, source.stat().st_size)
    except ValueError as error:
        raise ToolError(f"{source} does not hold AnyStory's weights: {error}; download it again.") from error
    _write(target, {name: tensor.contiguous() for name, tensor in tensors.items()}, metadata(form, sha256_of(source)))
    said = f"{target}: {len(tensors)} tensors, LoRAs of rank {form.reference_rank} and {form.router_rank}"
    if form.model() != FLUX_DEV.model():
        said += (
            f", for a FLUX of {form.double} and {form.single} blocks, {form.width} wide (FLUX.1 dev has "
            f"{FLUX_DEV.double} and {FLUX_DEV.single}, {FLUX_DEV.width} wide)"
        )
    return f"{said}. Put it into {FOLDER}."


def convert_residual(source: Path, target: Path, noun: str) -> str:
    """Writes the residual token in `source`, a tensor (k, 1024) of one vector for each of the k tokens of `noun`, to
    `target`, and says in a few words what it is.

    Raises ToolError with one sentence where the file is another, is damaged, or wants something executed."""
    import torch
    from subject_patches.patches.mechanisms.residual import ResidualToken, file_contents

    read, noun = _read(source), noun.strip()
    if not noun:
        raise ToolError("The noun is empty; give the word that the residual stands in for, as in --noun dog.")
    if not isinstance(read, torch.Tensor):
        found = type(read).__name__
        raise ToolError(f"{source} holds no tensor but {found}; leave --noun away for AnyStory's weights.")
    vectors = read.detach()
    vectors = vectors.reshape(-1, vectors.shape[-1]) if vectors.ndim else vectors.reshape(1, 1)
    try:
        _check_values({"the residual": vectors}, source.stat().st_size)
    except ValueError as error:
        raise ToolError(f"{source} is no residual token: {error}; download it again.") from error
    if vectors.shape[1] != _WIDTH or len(vectors) == 0:
        raise ToolError(
            f"{source} holds a tensor of shape {tuple(read.shape)}; a residual token of Cones 2 is one vector of "
            f"{_WIDTH} numbers for each token of its noun."
        )
    # How long its authors trained it, the file does not say.
    _write(target, *file_contents(ResidualToken(vectors.float(), noun, 0)))
    return f"{target}: {len(vectors)} vectors of {_WIDTH}, for '{noun}' with SD 2.x. Put it into {RESIDUALS}."


def _write(target: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        save_file(tensors, temporary, metadata)
        temporary.replace(target)
    except (OSError, SafetensorError) as error:
        raise ToolError(f"{target} cannot be written ({error}); give another path with --to.") from error
    finally:
        temporary.unlink(missing_ok=True)


def _read(source: Path) -> Any:
    """What the pickle holds, with nothing executed."""
    import torch

    try:
        return torch.load(source, map_location="cpu", weights_only=True, mmap=_is_archive(source))
    except Exception as error:
        raise ToolError(
            f"{source} cannot be read as weights ({_first_line(error)}); nothing in it was executed. Download it again "
            "from where its authors publish it."
        ) from error


def _parts(source: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of each part."""
    import torch

    read = _read(source)
    if isinstance(read, torch.Tensor):
        raise ToolError(f"{source} holds one tensor; if it is a residual token of Cones 2, say its noun: --noun dog.")
    if not isinstance(read, Mapping):
        raise ToolError(f"{source} holds no dictionary but {type(read).__name__}; give the authors' anystory_flux.bin.")
    for part, named in read.items():
        if not isinstance(named, Mapping) or not all(
            isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in named.items()
        ):
            raise ToolError(
                f"{source} has something else than named tensors under '{str(part)[:40]}'; give the authors' "
                "anystory_flux.bin."
            )
    return {str(part): dict(named) for part, named in read.items()}


def _check_values(tensors: Mapping[str, Tensor], size: int) -> None:
    """Raises ValueError with a phrase for tensors that are no dense finite numbers, or more than a file of `size` bytes
    can hold."""
    import torch

    kept = (torch.float32, torch.float16, torch.bfloat16)
    for name, tensor in tensors.items():
        if tensor.dtype not in kept or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise ValueError(f"{name} is kept as {tensor.dtype} {tensor.layout} on {tensor.device}")
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if claimed > size:
        raise ValueError(f"its tensors claim {claimed} bytes where the whole file has {size}")
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} has values that are not finite")


def _is_archive(path: Path) -> bool:
    """Whether it is in torch's newer format, which can be mapped into memory."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120].rstrip(".")


if __name__ == "__main__":
    run(main)
