"""Files of encoders: what their metadata tell, and whether their tensors are those that it asks for.

Nothing here needs torch; `loading.py` reads such a file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, TypeVar

FORMAT, VERSION = "subject_patches.encoder", "1"

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
AnyForm = TypeVar("AnyForm", bound="FileForm")


@dataclass(frozen=True)
class FileForm:
    """What decides every name and shape of a file of one `kind`. `foreign` is said of a file of another."""

    kind: ClassVar[str]
    foreign: ClassVar[str]

    @classmethod
    def read(cls: type[AnyForm], values: Mapping[str, Any]) -> AnyForm:
        """The form in metadata. Raises ValueError, TypeError or KeyError where there is none."""
        raise NotImplementedError


def metadata(
    form: FileForm, family: str, trained_by: str, vision: Mapping[str, Any] | None = None, **more: str
) -> dict[str, str]:
    """What a file says of itself; `vision` is the configuration of the vision model in it, as the host writes them."""
    about = {"format": FORMAT, "kind": form.kind, "version": VERSION, "family": family, "trained_by": trained_by}
    brought = {} if vision is None else {"vision": json.dumps(dict(vision), sort_keys=True)}
    return {**about, "form": json.dumps(asdict(form), sort_keys=True), **brought, **more}


def form_said(about: Mapping[str, str], form: type[AnyForm]) -> AnyForm:
    """The form that a file's metadata tell. Raises ValueError with a phrase where it is none of that kind, of another
    version, or its metadata are broken."""
    if about.get("format") != FORMAT or about.get("kind") != form.kind:
        raise ValueError(form.foreign)
    if about.get("version") != VERSION:
        raise ValueError(f"it is of version {about.get('version')} where this pack reads {VERSION}")
    try:
        return form.read(json.loads(about.get("form", "")))
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"its metadata are broken ({error})") from error


def shapes_of(tensors: Mapping[str, Any]) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_shapes(wanted: Shapes, given: Shapes, prefix: str = "") -> None:
    """Raises ValueError with a phrase unless the `given` tensors are just the wanted ones, of their shapes; `prefix` is
    what the file writes before their names."""
    missing = [name for name in wanted if name not in given]
    unknown = [name for name in given if name not in wanted]
    for names, fault in ((missing, "are missing"), (unknown, "are unknown")):
        if names:
            raise ValueError(f"{len(names)} of its tensors {fault}, {prefix}{names[0]} among them")
    for name, shape in wanted.items():
        if given[name] != shape:
            found, should = list(given[name]), list(shape)
            raise ValueError(f"it has {prefix}{name} of shape {found} where its sizes ask for {should}")
