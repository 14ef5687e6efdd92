"""Keep weights_manifest.json true to the weight files of this repository.

python tools/manifest.py            refresh hash, size and tensors of every file that the repository has
python tools/manifest.py --check    change nothing, and fail where the manifest is not true
python tools/manifest.py --add PATH --id ID --mechanism NAME [--folder FOLDER] --trained-by COMMAND
"""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

from hosting.archive import sha256_of
from hosting.base import MANIFEST
from hosting.command import Parser, run
from hosting.errors import ToolError
from hosting.paths import ROOT

LICENCE = "GPL-3.0-or-later"
SOURCE = "trained in this repository"
_LARGEST_HEADER = 100 * 2**20

Shape = tuple[int, ...]
Entry = dict[str, Any]


def main() -> int:
    """The command line; see the module's text."""
    parser = Parser(prog="manifest.py", description="Keep weights_manifest.json true to the weight files.")
    parser.add_argument("--check", action="store_true", help="change nothing, and fail where it is not true")
    parser.add_argument("--add", type=Path, metavar="PATH", help="add a weight file of this repository")
    parser.add_argument("--id", help="the new entry's id")
    parser.add_argument("--mechanism", help="what of the pack the new file is for")
    parser.add_argument("--folder", help="the folder below the host's models/; none for a file that it does not load")
    parser.add_argument("--trained-by", metavar="COMMAND", help="the command that trained the new file")
    options = parser.parse_args()
    manifest = json.loads(MANIFEST.read_text(encoding="utf-8"))
    if options.add is not None:
        if not (options.id and options.mechanism and options.trained_by):
            parser.error("--add needs --id, --mechanism and --trained-by")
        entry = new_entry(options.add, options.id, options.mechanism, options.folder, options.trained_by)
        manifest["entries"] = [old for old in manifest["entries"] if old["id"] != entry["id"]] + [entry]
    elif options.check:
        found = [fault for entry in manifest["entries"] if entry["path"] for fault in faults(entry)]
        if found:
            raise ToolError(f"The manifest is not true: {'; '.join(found)}; run python tools/manifest.py.")
    else:
        for entry in manifest["entries"]:
            if entry["path"]:
                entry.update(describe(ROOT / entry["path"]))
    if not options.check:
        MANIFEST.write_text(to_text(manifest), encoding="utf-8")
    print(f"{MANIFEST.name}: {', '.join(entry['id'] for entry in manifest['entries']) or 'no entries'}")
    return 0


def new_entry(path: Path, identity: str, mechanism: str, folder: str | None, trained_by: str) -> Entry:
    """The manifest's entry for a weight file of this repository; raises ToolError for a file outside it."""
    try:
        inside = path.resolve().relative_to(ROOT)
    except ValueError as error:
        raise ToolError(f"{path} is not in {ROOT}; copy it there first.") from error
    return {
        "id": identity,
        "mechanism": mechanism,
        "file": path.name,
        "path": inside.as_posix(),
        "folder": folder,
        "source": SOURCE,
        "licence": LICENCE,
        **describe(path),
        "trained_by": trained_by,
    }


def describe(path: Path) -> Entry:
    """What the manifest says of a file's content: sha256, bytes and tensors."""
    shapes = tensor_shapes(path)
    return {"sha256": sha256_of(path), "bytes": path.stat().st_size, "tensors": patterns(shapes)}


def tensor_shapes(path: Path) -> dict[str, Shape]:
    """The shape of each tensor in a safetensors file, by name; raises ToolError if it is none."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _LARGEST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = 8 + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        if end != path.stat().st_size:
            raise ValueError(f"it has {path.stat().st_size} bytes where its header says {end}")
        return {name: tuple(entry["shape"]) for name, entry in tensors.items()}
    except (OSError, struct.error, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ToolError(f"{path} cannot be read as a safetensors file ({error}); write it again.") from error


def patterns(shapes: dict[str, Shape]) -> list[Entry]:
    """Names with their numbers replaced by *, and the shapes that occur under each, in the order of the names."""
    found: dict[str, set[Shape]] = {}
    for name, shape in sorted(shapes.items()):
        found.setdefault(re.sub(r"(?<![A-Za-z0-9])[0-9]+(?![A-Za-z0-9])", "*", name), set()).add(shape)
    return [{"name": name, "shapes": sorted(map(list, of_name))} for name, of_name in found.items()]


def faults(entry: Entry) -> list[str]:
    """Everything that is not true of an entry whose file the repository has, a phrase each."""
    path = ROOT / entry["path"]
    if not path.is_file():
        return [f"{entry['path']} is missing"]
    found = []
    if path.name != entry["file"]:
        found.append(f"{entry['path']} is not named {entry['file']}")
    if path.stat().st_size != entry["bytes"]:
        found.append(f"{path.name} has {path.stat().st_size} bytes and not {entry['bytes']}")
    if (digest := sha256_of(path)) != entry["sha256"]:
        found.append(f"{path.name} has SHA-256 {digest} and not {entry['sha256']}")
    shapes = tensor_shapes(path)
    used = set()
    for name, shape in shapes.items():
        of_name = [pattern for pattern in entry["tensors"] if _covers(pattern, name, shape)]
        if len(of_name) != 1:
            found.append(f"{len(of_name)} patterns match the tensor {name} of shape {list(shape)}")
        used.update(pattern["name"] for pattern in of_name)
    unused = [pattern["name"] for pattern in entry["tensors"] if pattern["name"] not in used]
    return found + [f"no tensor matches the pattern {name}" for name in unused]


def _covers(pattern: Entry, name: str, shape: Shape) -> bool:
    expression = re.escape(pattern["name"]).replace(r"\*", "[0-9]+")
    return list(shape) in pattern["shapes"] and re.fullmatch(expression, name) is not None


def to_text(manifest: Entry) -> str:
    """The manifest as it is kept: indented JSON with one line for each pattern."""
    text = json.dumps(manifest, indent=2, ensure_ascii=False)
    pattern = r"\{\s+(\"name\": \"[^\"]*\"),\s+\"shapes\": (\[[\s0-9A-Z\",\[\]]*\])\s+\}"
    return re.sub(pattern, lambda found: f'{{{found[1]}, "shapes": {json.dumps(json.loads(found[2]))}}}', text) + "\n"


if __name__ == "__main__":
    run(main)
