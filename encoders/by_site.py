"""Modules that hold one of a kind for each attention layer, under the layer's name: `input.1.0`, say."""

from __future__ import annotations

from torch import nn

from ..patches.parts.sites import Site


def put(root: nn.Module, site: Site, module: nn.Module) -> None:
    """Makes `module` the site's in `root`."""
    parent = root
    *above, last = map(str, site.key)
    for step in above:
        if step not in dict(parent.named_children()):
            parent.add_module(step, nn.Module())
        parent = parent.get_submodule(step)
    parent.add_module(last, module)


def module_at(root: nn.Module, site: Site) -> nn.Module:
    """What was `put` there for a site."""
    return root.get_submodule(".".join(map(str, site.key)))
