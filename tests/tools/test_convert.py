"""tools/convert.py: AnyStory's published pickle becomes one safetensors file, and nothing else does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import convert
import manifest
import pytest
import torch
from host import ROOT, Host
from hosting.base import manifest_entries
from hosting.errors import ToolError
from hosting.pip import clean_environment
from safetensors import safe_open
from safetensors.torch import load_file
from subject_patches.encoders.anystory_file import FLUX_DEV, Form, by_part, form_of
from subject_patches.encoders.weights import form_said

from ..shared.anystory_files import publish, published
from ..shared.golden_cases import file_of

Parts = dict[str, dict[str, Any]]


def test_form_is_the_authors() -> None:
    """Every name and shape of FLUX.1 dev, for any rank, is what their loader expects."""
    listed = json.loads(file_of("anystory", "anystory_flux_bin_manifest.json").read_text(encoding="utf-8"))
    rank = 77
    expected = {
        part: {name: tuple(rank if size == "R" else size for size in shape) for name, shape in listed[part].items()}
        for part in ("ref", "router", "redux")
    }
    form = Form(reference_rank=rank, router_rank=rank)
    assert form.shapes() == expected
    assert form_of(expected) == form
    assert form.model() == FLUX_DEV.model()


def test_small_file_of_the_same_form(tmp_path: Path) -> None:
    """All tensors arrive, bit for bit and in their dtype, and the metadata say the form."""
    parts = published()
    parts["ref"] = {name: tensor.bfloat16() for name, tensor in parts["ref"].items()}
    source, target = publish(tmp_path / "anystory_flux.bin", parts), tmp_path / "anystory.safetensors"
    said = convert.convert(source, target)
    assert "rank 4" in said
    assert "2 and 2 blocks" in said
    found = load_file(target)
    assert found.keys() == {f"{part}.{name}" for part, named in parts.items() for name in named}
    for part, named in parts.items():
        assert all(torch.equal(found[f"{part}.{name}"], tensor) for name, tensor in named.items())
    with safe_open(target, "pt") as file:
        form = form_said(file.metadata(), Form)
    assert form == form_of(by_part({name: tuple(tensor.shape) for name, tensor in found.items()}))
    assert (form.double, form.single, form.width, form.map_rank) == (2, 2, 64, 8)
    assert set(tmp_path.iterdir()) == {source, target}


def test_manifest_tells_the_form() -> None:
    """The manifest's entry has every tensor of FLUX.1 dev, with R for the ranks that a file decides."""
    entry = next(each for each in manifest_entries() if each["id"] == "anystory-flux")
    rank = 10**6
    form = Form(reference_rank=rank, router_rank=rank)
    shapes = {f"{part}.{name}": shape for part, named in form.shapes().items() for name, shape in named.items()}
    told = [
        {**each, "shapes": [["R" if size == rank else size for size in shape] for shape in each["shapes"]]}
        for each in manifest.patterns(shapes)
    ]
    assert entry["tensors"] == told
    assert entry["folder"] == Path(convert.FOLDER).name


def _without(part: str, name: str) -> Callable[[Parts], object]:
    def change(parts: Parts) -> object:
        del parts[part][name]
        return parts

    return change


def _with(part: str, name: str, value: Any) -> Callable[[Parts], object]:
    def change(parts: Parts) -> object:
        parts.setdefault(part, {})[name] = value
        return parts

    return change


_OUT = "transformer.single_transformer_blocks.1.proj_out.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda parts: {"state_dict": parts["ref"]}, "has no 'ref' among state_dict"),
        (lambda parts: parts["ref"], "something else than named tensors"),
        (lambda parts: [parts], "holds no dictionary but list"),
        (_without("ref", _OUT), "1 of its tensors are missing, ref." + _OUT),
        (_without("redux", "redux_up_lora_A.weight"), "has no matrix redux_up_lora_A.weight"),
        (_with("router", "transformer.lora_A.weight", torch.zeros(4, 64)), "are unknown, router.transformer.lora_A"),
        (_with("ref", _OUT, torch.zeros(64, 5)), r"of shape \[64, 5\] where its sizes ask for \[64, 4\]"),
        (_with("ref", _OUT, torch.zeros(64, 4, dtype=torch.int32)), "is kept as torch.int32"),
        (_with("ref", _OUT, torch.full((64, 4), float("nan"))), "values that are not finite"),
        (_with("redux", "gate_proj.bias", "a text"), "something else than named tensors under 'redux'"),
        (_with("ref", "transformer.transformer_blocks.999999999.x", torch.zeros(1)), "counts 1000000000 blocks"),
    ],
)
def test_foreign_files_are_one_sentence(tmp_path: Path, change: Callable[[Parts], object], sentence: str) -> None:
    """What differs is named, and nothing is written."""
    source = publish(tmp_path / "other.bin", change(published()))
    with pytest.raises(ToolError, match=sentence) as refused:
        convert.convert(source, tmp_path / "out.safetensors")
    assert str(refused.value).count(".\n") == 0
    assert list(tmp_path.iterdir()) == [source]


def test_claim_of_more_than_the_file_has(tmp_path: Path) -> None:
    """Tensors that repeat a few bytes over and over would fill the disk."""
    parts = published()
    parts["ref"] = {name: torch.zeros(1).expand(tensor.shape) for name, tensor in parts["ref"].items()}
    parts["router"] = {name: torch.zeros(1).expand(tensor.shape) for name, tensor in parts["router"].items()}
    source = publish(tmp_path / "wide.bin", parts)
    with pytest.raises(ToolError, match=r"claim .* bytes where the whole file has"):
        convert.convert(source, tmp_path / "out.safetensors")


class _Hostile:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("damage", ["hostile", "truncated", "empty", "text", "safetensors"])
def test_damaged_and_hostile_files(tmp_path: Path, damage: str) -> None:
    """One sentence, nothing written, and above all nothing executed."""
    mark, source = tmp_path / "executed", tmp_path / "anystory_flux.bin"
    if damage == "hostile":
        publish(source, published() | {"more": _Hostile(mark)})
    else:
        whole = publish(source).read_bytes()
        contents = {"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"not found", "safetensors": b"\x08"}
        source.write_bytes(contents[damage])
    with pytest.raises(ToolError, match=r"cannot be read as weights .* nothing in it was executed"):
        convert.convert(source, tmp_path / "out.safetensors")
    assert not mark.exists()
    assert list(tmp_path.iterdir()) == [source]


def test_command_line(tmp_path: Path) -> None:
    """The result lies beside the source; a second call does not overwrite it; a missing file is a sentence."""
    source = publish(tmp_path / "anystory_flux.bin")

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(Path(convert.__file__)), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)

    done = call(str(source))
    assert done.returncode == 0, done.stderr
    assert "models/subject_encoders" in done.stdout
    assert source.with_suffix(".safetensors").is_file()
    again, missing = call(str(source)), call(str(tmp_path / "none.bin"))
    assert "exists already" in again.stderr
    assert again.stderr.count("\n") == 1
    assert "There is no file" in missing.stderr


def test_an_installed_pack_takes_the_comfyui_that_it_is_in(tmp_path: Path, host: Host) -> None:
    """With the Python that runs it, and no private one is made; also where Python does not look beside a script."""
    comfy = tmp_path / "ComfyUI"
    comfy.mkdir()
    for part in host.tree.iterdir():
        if part.name != "custom_nodes":
            (comfy / part.name).symlink_to(part)
    pack = comfy / "custom_nodes" / ROOT.name
    left_out = shutil.ignore_patterns(".git", "tests", "workflows", "web", "demo_output", "*.safetensors")
    shutil.copytree(ROOT, pack, ignore=left_out)
    source, cache = publish(tmp_path / "anystory_flux.bin"), tmp_path / "cache"
    variables = {"PYTHONSAFEPATH": "1", "COMFYUI_PATH": "", "SUBJECT_PATCHES_CACHE": str(cache)}
    command = [sys.executable, str(pack / "tools" / "convert.py"), str(source)]
    done = subprocess.run(
        command, env=clean_environment() | variables, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert source.with_suffix(".safetensors").is_file()
    assert not cache.exists()
