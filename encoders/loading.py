"""Reading files of encoders: their metadata and shapes first, then their tensors, and the vision model in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import comfy.model_management
import comfy.utils
from comfy.model_patcher import CoreModelPatcher
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .vision import vision_model
from .weights import Shape, Shapes, check_shapes

VISION = "vision."

Value = TypeVar("Value")


@contextmanager
def loading(path: Path, what: str, remedy: str) -> Iterator[None]:
    """Makes one sentence, a ValueError, of what goes wrong while the file is loaded as `what`."""
    try:
        yield
    except (SafetensorError, OSError, ValueError) as error:
        reason = str(error).strip().rstrip(".")
        raise ValueError(f"'{path.name}' cannot be loaded as {what}: {reason}. {remedy}") from error


def opened(path: Path) -> tuple[dict[str, str], dict[str, Shape]]:
    """A file's metadata and the shapes of its tensors, none of which is read yet."""
    with safe_open(path, "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        return file.metadata() or {}, shapes


def read_tensors(path: Path, about: Mapping[str, str], shapes: Shapes, wanted: Shapes) -> tuple[dict[str, Tensor], Any]:
    """The tensors of a file that is `opened`, and the vision model (the host's CLIP_VISION) that it brings, or None.

    Raises ValueError with a phrase unless the tensors are the wanted ones beside those of a vision model."""
    own, brought = _parted(shapes)
    check_shapes(wanted, own)
    if bool(brought) != ("vision" in about):
        raise ValueError("it does not say of which kind its vision model is" if brought else "it lacks its vision")
    tensors, seeing = _parted(comfy.utils.load_torch_file(str(path), safe_load=True))
    return tensors, vision_model(about["vision"], seeing, VISION) if brought else None


def file_tensors(own: Mapping[str, Tensor], vision: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors of a file, in half precision; `vision` are the weights of the vision model that it is to bring."""
    tensors = {**own, **{VISION + name: tensor for name, tensor in (vision or {}).items()}}
    return {name: tensor.detach().half().cpu().contiguous() for name, tensor in tensors.items()}


def kept_by_host(module: nn.Module) -> CoreModelPatcher:
    """Frozen modules for the host to move."""
    device, offload = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    return CoreModelPatcher(module.eval().requires_grad_(False), device, offload)


def _parted(named: Mapping[str, Value]) -> tuple[dict[str, Value], dict[str, Value]]:
    """An encoder's own, and those of its vision model without their prefix."""
    own = {name: value for name, value in named.items() if not name.startswith(VISION)}
    return own, {name.removeprefix(VISION): value for name, value in named.items() if name.startswith(VISION)}
