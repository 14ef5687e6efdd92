"""Ready for the registry: what its own client says, what a package holds, and what a publisher must fill."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

import pytest
from hosting.base import manifest_entries
from hosting.paths import ROOT, environment_python
from hosting.private import client_folder, ensure_client
from PIL import Image

PUBLISHING = ROOT / "docs" / "PUBLISHING.md"
LARGEST = 30 * 2**20
LEFT_BEHIND = shutil.ignore_patterns(
    ".git", "__pycache__", ".pytest_cache", ".ruff_cache", "demo_output", "soak_output", "runs", ".*venv"
)


def _comfy(folder: Path, home: Path, *arguments: str) -> str:
    ensure_client(offline=True)
    comfy = environment_python(client_folder() / "environment").with_name("comfy.exe" if os.name == "nt" else "comfy")
    command = [str(comfy), "--skip-prompt", "--no-enable-telemetry", *arguments]
    environment = os.environ | {"HOME": str(home), "USERPROFILE": str(home), "DO_NOT_TRACK": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This checkout without what a run leaves in it."""
    target = tmp_path_factory.mktemp("package") / "pack"
    shutil.copytree(ROOT, target, ignore=LEFT_BEHIND)
    return target


def test_the_client_finds_nothing_wrong(copy: Path, tmp_path: Path) -> None:
    said = _comfy(copy, tmp_path, "node", "validate")
    assert "Warning" not in said, said
    assert "Security warnings" not in said, said


def test_a_package_has_what_runs_and_no_more(copy: Path, tmp_path: Path) -> None:
    """It is small, has no tests, golden files or judge, and the pack in it can be imported and lists its nodes."""
    _comfy(copy, tmp_path, "node", "pack")
    (package,) = copy.glob("*.zip")
    assert package.stat().st_size < LARGEST
    with zipfile.ZipFile(package) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "unpacked")
        texts = {name: archive.read(name).decode("utf-8") for name in names if name.endswith((".md", ".json"))}
    assert [
        name for name in names if re.match(r"(tests|tools/(weights|measuring|soaking)|\.\w+)/", name) or "judge" in name
    ] == []
    for kept in (
        "__init__.py",
        "README.md",
        "LICENSE",
        "tools/convert.py",
        "tools/hosting/convert.py",
        "toy/weights/subject-patches-toy.safetensors",
    ):
        assert kept in names
    for folder in ("workflows", "subgraphs", "web/docs", "locales/en", "training"):
        assert any(name.startswith(f"{folder}/") for name in names), folder
    for page in ("README.md", "docs/TOY.md", "docs/DESIGN.md", "docs/EFFECTS.md", "docs/BENCHMARKS.md"):
        linked = re.findall(r"\]\(([^)#:]+)\)", texts[page])
        assert {str(PurePosixPath(page).parent / link) for link in linked} <= {*names}, page
    _check_workflows(texts, {*names})
    code = (
        "import sys, asyncio; sys.path.insert(0, sys.argv[1]); from hosting.device import use_cpu_without_gpu; "
        "use_cpu_without_gpu(); from hosting.pack import load_pack; from pathlib import Path; "
        "load_pack(Path(sys.argv[2])); import subject_patches as pack; "
        "print(len(asyncio.run(pack.SubjectPatches().get_node_list())))"
    )
    command = [sys.executable, "-c", code, str(ROOT / "tools"), str(tmp_path / "unpacked")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 20


def _check_workflows(texts: dict[str, str], names: set[str]) -> None:
    """Each has its model and pictures, where they are the pack's own; README names no other but those it says so of."""
    mine = {path.name: f"workflows/input/{path.name}" for path in (ROOT / "workflows" / "input").glob("*.png")}
    mine |= {entry["file"]: entry["path"] for entry in manifest_entries() if entry["path"] is not None}
    workflows = {name: json.loads(text) for name, text in texts.items() if re.match(r"workflows/\w+\.json", name)}
    for name, workflow in workflows.items():
        values = [value for node in workflow["nodes"] for value in node.get("widgets_values") or ()]
        assert {mine[value] for value in values if isinstance(value, str) and value in mine} <= names, name
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", texts["README.md"], re.MULTILINE)
    told = {f"workflows/{stem}.json" for row in rows for stem in re.findall(r"\w+", row)}
    (said,) = re.findall(r"that end with\s+([^.]+) come with the repository alone", texts["README.md"])
    endings = tuple(re.findall(r"`(\w+)`", said))
    left_out = {name for name in told if name.removesuffix(".json").endswith(endings)}
    assert left_out == told - {*workflows}
    assert {*workflows} <= told


def test_placeholders_are_those_of_the_list() -> None:
    """docs/PUBLISHING.md lists every placeholder, they are all in pyproject.toml, and there is no other."""
    listed = set(re.findall(r"^\| `([^`]+)` \|", PUBLISHING.read_text(encoding="utf-8"), re.MULTILINE))
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = set(re.findall(r'"(placeholder)"', text)) | set(re.findall(r"https://example\.invalid/[\w-]+", text))
    assert found == listed
    others = [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "web").rglob("*.md"),
        *ROOT.glob("nodes/*.py"),
    ]
    assert [path for path in others if path != PUBLISHING and "example.invalid" in path.read_text("utf-8")] == []


def test_icon_and_banner_are_as_the_registry_takes_them() -> None:
    with Image.open(ROOT / "docs" / "icon.png") as icon, Image.open(ROOT / "docs" / "banner.png") as banner:
        assert icon.width == icon.height <= 400
        assert banner.width * 9 == banner.height * 21


def test_the_changes_of_this_version_are_written_down() -> None:
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert version is not None
    assert f"\n## {version[1]}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
