"""What the pack has to know of a model family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..sites import Site


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
    def context_width(self, model: Any) -> int:
        """How many channels the tokens of a MODEL's prompts have."""

    @abstractmethod
    def project(self, network: Any, site: Site, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's own keys and values of other tokens (rows, n, channels of what it attends to)."""
