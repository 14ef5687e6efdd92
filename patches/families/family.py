"""What the pack has to know of a model family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..parts.sites import Site


@dataclass(frozen=True)
class Family(ABC):
    """A model family, by the `name` that users know it by. `description` is the name of the host's class in
    comfy.supported_models that describes its models."""

    name: str
    description: str

    def has(self, model: Any) -> bool:
        """Whether a MODEL is of this family."""
        import comfy.supported_models as descriptions

        return isinstance(model.model.model_config, getattr(descriptions, self.description))

    @abstractmethod
    def sites(self, network: Any) -> tuple[Site, ...]:
        """Every attention layer of a network, in the order in which they run."""

    @abstractmethod
    def usual(self, choice: str) -> str:
        """What "usual" means in the menu of layers, of a node whose paper's choice for U-Nets is `choice`."""

    @abstractmethod
    def context_width(self, model: Any) -> int:
        """How many channels the tokens of a MODEL's prompts have."""

    @abstractmethod
    def project(self, network: Any, site: Site, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's own keys and values of other tokens (rows, n, channels of what it attends to)."""

    @abstractmethod
    def shown(self, inner: Any, known: Tensor) -> dict[str, Tensor]:
        """What the encoding of a conditioning is given besides it when a companion's clean latents (rows, channels,
        height, width) are `known`: an inpainting model is told that nothing of them is hidden. `inner` is the host's
        model."""

    @abstractmethod
    def grid_at(self, network: Any, site: Site, latent: tuple[int, int]) -> tuple[int, int]:
        """The (height, width) of the picture's tokens in a layer, of latents (height, width)."""

    @abstractmethod
    def channels(self, network: Any, site: Site, part: str) -> int:
        """How many channels a layer's "query", "key", "value" or "output" has, as a stream records it."""

    def looks_nearly_clean(self) -> bool:
        """Whether the model usually looks at routed references at the schedule's last noise level, in one pass: where
        the features of every step of a usual run at the family's own size would be more than a subject's cache
        holds."""
        return True

    def reference_level(self) -> float:
        """The share of the schedule at which the model usually looks at recycled references, in one pass: 1 is nearly
        clean."""
        return 1.0

    def dci_gain_grows(self) -> bool:
        """Whether DCI's gain grows with the picture's places, as is right for every family but the one that its
        authors' number is made for."""
        return True

    def before(self, conditioning: Mapping[str, Any]) -> int:
        """How many tokens the model puts before those of a conditioning, in the context that it makes of it."""
        return 0

    def again(self, conditioning: Mapping[str, Any]) -> tuple[int, int]:
        """(first, by): of the conditioning's tokens, the model's context has the `by` from `first` on twice; (0, 0) is
        none."""
        return (0, 0)
