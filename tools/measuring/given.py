"""What a study and a benchmark are given, and how their numbers are written."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hosting.errors import ToolError

if TYPE_CHECKING:
    from pathlib import Path

    from host import Host
    from torch import Tensor


# What the benchmark's prompt names, and where: as Encode Prompt with Subjects says it.
PHRASES = {f"phrase {number}": ((2 * number, 2 * number + 2),) for number in range(1, 9)}


def concept_tokens() -> Any:
    """Where the benchmark's prompt has its own tokens, and a concept's: as Dual-Branch Prompts says it."""
    from subject_patches.patches.mechanisms.dual_branch import BranchTokens

    return BranchTokens(((1, 18),), PHRASES["phrase 1"])


@dataclass(frozen=True)
class Given:
    """The toy and its judge in this process, the host for a study that needs a server, how many cases to measure, the
    sampling steps of each, the world that the toy can draw, and the folder that trained concepts are kept in, if
    any."""

    host: Host
    toy: Any
    judge: Any
    count: int
    steps: int
    world: Any
    kept: Path | None = None

    def picture(self, positive: Any, seed: int, model: Any = None, sampler: Any = None) -> Tensor:
        """One picture (1, 128, 128, 3) of 0 to 1 of a CONDITIONING, at CFG 4; `model` is a patched one, `sampler` a
        SAMPLER to use instead of Euler."""
        return self.pictures(positive, [seed], model, sampler)

    def pictures(self, positive: Any, seeds: Sequence[int], model: Any = None, sampler: Any = None) -> Tensor:
        """The same for several seeds, as one batch: (n, 128, 128, 3)."""
        import comfy.sample
        import comfy.samplers
        import torch
        from subject_patches.toy.sampling import noise_of

        noise = noise_of(seeds)
        sampled = comfy.sample.sample_custom(
            model or self.toy.model,
            noise,
            4.0,
            sampler or comfy.samplers.sampler_object("euler"),
            self.sigmas(),
            positive,
            self.toy.encode([""]),
            torch.zeros_like(noise),
            disable_pbar=True,
            seed=seeds[0],
        )
        return self.decoded(sampled)

    def guided(self, model: Any, positive: Any, negative: Any, cfg: float) -> Any:
        """A GUIDER of a model by two CONDITIONINGs."""
        import comfy.samplers

        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        return guider

    def sampled(self, guider: Any, noise: Tensor, latents: Tensor) -> Tensor:
        """The pictures (n, 128, 128, 3) of a GUIDER, by Euler from these latents with this noise."""
        import comfy.samplers

        sampler = comfy.samplers.sampler_object("euler")
        return self.decoded(guider.sample(noise, latents, sampler, self.sigmas(), disable_pbar=True, seed=0))

    def decoded(self, latents: Tensor) -> Tensor:
        """Latents' pictures (n, 128, 128, 3) of 0 to 1."""
        return self.toy.vae.decode(latents)[..., :3].clamp(0, 1)

    def sigmas(self) -> Tensor:
        """The noise levels of a run, of the schedule "normal"."""
        import comfy.samplers

        return comfy.samplers.calculate_sigmas(self.toy.model.get_model_object("model_sampling"), "normal", self.steps)


@dataclass(frozen=True)
class Shape:
    """A model's shape: its name, latent size and channels, context width, and how many tokens a prompt has."""

    name: str
    size: int
    channels: int
    width: int
    tokens: int = 77

    @property
    def flux(self) -> bool:
        """Whether it is FLUX.1's."""
        return self.name.startswith("flux")

    def middle(self) -> Tensor:
        """A mask (1, size, size) of the middle half of each side."""
        import torch

        mask, inside = torch.zeros(1, self.size, self.size), slice(self.size // 4, 3 * self.size // 4)
        mask[:, inside, inside] = 1
        return mask

    def pooled(self, generator: Any) -> dict[str, Any]:
        """What a conditioning of this shape has besides its tokens, at random."""
        import torch

        wide = 1280 if self.name == "sdxl" else 768 * self.flux
        return {"pooled_output": torch.randn(1, wide, generator=generator)} if wide else {}


def chosen(words: str, names: Iterable[str]) -> list[str]:
    """Those of the names that have these words in them, whole and in this order, or one of several such words between
    semicolons; without words all.

    Raises ToolError where none has."""
    names, found = list(names), set()
    for each in words.split(";") if words else ():
        having = {name for name in names if re.search(rf"(?<!\w){re.escape(each.strip())}(?!\w)", name)}
        if not each.strip() or not having:
            raise ToolError(
                f"There is no '{each.strip()}' to measure; give whole words of one of these: {'; '.join(names)}."
            )
        found |= having
    return [name for name in names if not words or name in found]


def heading(*columns: str, rows: str = "") -> str:
    """The first two lines of a table: the titles of its columns, behind that of its `rows`."""
    return f"|{rows and f' {rows}'} | {' | '.join(columns)} |\n|{'---|' * (1 + len(columns))}"


def row(name: Any, *cells: str) -> str:
    """A line of a table."""
    return f"| {name} | {' | '.join(cells)} |"


def paired(first: Sequence[float], other: Sequence[float], places: int = 3) -> str:
    """The mean rise from `first` to `other`, case by case, with its standard error, to so many decimal places:
    "+0.150 ± 0.020". Nothing when they are one and the same."""
    import numpy as np

    if other is first:
        return ""
    rise = np.subtract(other, first)
    error = rise.std(ddof=1) / len(rise) ** 0.5 if len(rise) > 1 else float("nan")
    return f"{rise.mean():+.{places}f} ± {error:.{places}f}"


def centred(found: Sequence[float], box: Sequence[float]) -> bool:
    """Whether the middle of a found box (x0, y0, x1, y1) lies in another."""
    x, y = (found[0] + found[2]) / 2, (found[1] + found[3]) / 2
    return box[0] <= x <= box[2] and box[1] <= y <= box[3]


def drawn_boxes(boxes: Iterable[Sequence[float]]) -> list[dict[str, float]]:
    """Boxes (x0, y0, x1, y1) as Subject Layout takes them."""
    return [{"x": x0, "y": y0, "width": x1 - x0, "height": y1 - y0} for x0, y0, x1, y1 in boxes]


def mean(values: Iterable[Any]) -> float:
    """The mean of numbers or of truths; 0 of none."""
    found = [float(value) for value in values]
    return sum(found) / max(len(found), 1)


def share(found: Sequence[bool]) -> str:
    """How many of these are true: "85%"."""
    import numpy as np

    return f"{np.mean(found):.0%}"
