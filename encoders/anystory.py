"""AnyStory's released FLUX weights as modules: loaded, moved and cast by the host, named as in their file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.utils
import torch
from torch import Tensor, nn
from torch.nn import functional

from .anystory_file import Form, by_part, form_of
from .loading import kept_by_host, loading, opened
from .weights import Shapes, form_said

# A subject's own tokens and its router tokens lie in squares of these sides.
TOKENS_SIDE, ROUTER_SIDE = 9, 3


@dataclass(frozen=True, eq=False)
class AnyStory:
    """A loaded file: the `patcher` holds its modules for the host to move, `form` says for which FLUX they are."""

    name: str
    form: Form
    patcher: Any

    def module(self, name: str) -> Any:
        """A module by its name in the file, "ref.transformer.x_embedder.lora_A", say."""
        return self.patcher.model.get_submodule(name)

    def rank(self, name: str) -> int:
        """The rank of a LoRA by the name of what it is for."""
        return self.module(f"{name}.lora_A").weight.shape[0]


def read_anystory(path: Path) -> AnyStory:
    """Loads a file that tools/convert.py made. Raises ValueError with one sentence where it is none or is damaged."""
    remedy = "Make it again from the authors' anystory_flux.bin with python tools/convert.py."
    with loading(path, "AnyStory's weights", remedy):
        about, shapes = opened(path)
        form = form_said(about, Form)
        if form_of(by_part(shapes)) != form:
            raise ValueError("its tensors are not of the sizes that its metadata tell")
        root = modules_of(shapes)
        root.load_state_dict(comfy.utils.load_torch_file(str(path)), assign=True)
    return AnyStory(path.name, form, kept_by_host(root))


def modules_of(shapes: Shapes) -> nn.Module:
    """Linear layers at the places that their weights' names tell, still without values. They cast their weights to
    whatever they are given, as the host's do when it keeps them elsewhere."""
    root = nn.Module()
    for name, shape in shapes.items():
        if not name.endswith(".weight"):
            continue
        *path, last, _ = name.split(".")
        parent = root
        for step in path:
            if step not in dict(parent.named_children()):
                parent.add_module(step, nn.Module())
            parent = parent.get_submodule(step)
        bias = f"{name.removesuffix('.weight')}.bias" in shapes
        parent.add_module(last, comfy.ops.manual_cast.Linear(shape[1], shape[0], bias=bias, device="meta"))
    return root


def embedded(features: Tensor, inside: Tensor, redux: Any, own: Any, side: int) -> Tensor:
    """A subject's tokens (1, side^2, context) of a vision model's features (1, n, channels), n in a square.

    `redux` has the plain Redux layers, `own` AnyStory's LoRAs and gate beside them; `inside` (1, n) is 1 where the
    subject is. What the gate lets through is averaged over the cells of a square of `side`, in shares of the gate, and
    cells without the subject are 0 (authors' code; the paper's encoder is another)."""
    hidden = functional.silu(redux.redux_up(features) + own.redux_up_lora_B(own.redux_up_lora_A(features)))
    hidden = redux.redux_down(hidden) + own.redux_down_lora_B(own.redux_down_lora_A(hidden))
    gate = own.gate_proj(hidden).sigmoid()
    root = round(features.shape[1] ** 0.5)

    def pooled(values: Tensor) -> Tensor:
        return functional.adaptive_avg_pool2d(values.mT.unflatten(-1, (root, root)), side).flatten(2).mT

    touched = (pooled(inside[..., None]) > 0).to(hidden)
    return pooled(hidden * gate) / (pooled(gate) + 1e-6) * touched


@torch.inference_mode()
def subject_tokens(anystory: AnyStory, features: Tensor, inside: Tensor, redux: Any) -> tuple[Tensor, Tensor]:
    """A subject's own tokens (1, 81, context) and its router tokens (1, 9, context), in float32 on the CPU; see
    `embedded`."""
    weight = redux.redux_up.weight
    features, inside = features.float().to(weight.device), inside.to(weight.device)
    comfy.model_management.load_model_gpu(anystory.patcher)
    sides = {"redux": TOKENS_SIDE, "router.router_embedder": ROUTER_SIDE}
    made = [embedded(features, inside, redux, anystory.module(name), side) for name, side in sides.items()]
    return made[0].float().cpu(), made[1].float().cpu()
