"""Running pip in a virtual environment, and saying in one sentence why it failed."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .errors import ToolError
from .paths import environment_python

# What pip writes to its log; the wording has been stable over many releases of pip and of the systems below it.
_DISK_SIGNS = ("No space left on device", "Errno 28", "WinError 112", "Disk quota exceeded")
_NETWORK_SIGNS = (
    "Failed to establish a new connection",
    "Temporary failure in name resolution",
    "Name or service not known",
    "getaddrinfo failed",
    "Network is unreachable",
    "Connection refused",
    "ConnectTimeout",
    "Read timed out",
    "ProxyError",
)


def disk_full(folder: Path) -> ToolError:
    """The error for a full disk while something was written below `folder`."""
    return ToolError(
        f"The disk that holds {folder} is full; free some space, or set SUBJECT_PATCHES_CACHE to a folder on "
        "another disk, and run the command again: it goes on where it stopped."
    )


def run_pip(environment: Path, arguments: Sequence[str], what: str) -> None:
    """Run pip with `arguments` in the virtual environment; its progress goes to stderr.

    Raises:
        ToolError: pip failed; the sentence names `what` was being fetched and the cause where pip's log shows it.
    """
    drop_half_installed(environment)
    log = environment / "pip.log"
    log.unlink(missing_ok=True)
    command = [str(environment_python(environment)), "-m", "pip", *arguments, "--no-input", "--log", str(log)]
    code = run_to_end(command, clean_environment())
    if code == 0:
        return
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    if any(sign in text for sign in _DISK_SIGNS):
        raise disk_full(environment)
    if any(sign in text for sign in _NETWORK_SIGNS):
        raise ToolError(
            f"{what} could not be fetched because the package index was not reached; check the network or pip's "
            "configuration and run the command again: it goes on where it stopped."
        )
    if "from versions: none" in text:
        raise ToolError(
            f"The package index has no {what} for Python {platform.python_version()} on {platform.system()} "
            f"{platform.machine()}, or does not answer; run the command with another Python, or set COMFYUI_PATH to a "
            f"ComfyUI that is there ({log} says more)."
        )
    raise ToolError(f"pip could not fetch or install {what} (exit code {code}); {log} says why.")


def run_to_end(command: Sequence[str], environment: dict[str, str]) -> int:
    """Run a command with its output on stderr and give its exit code; neither it nor its children outlive this call."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        env=environment,
        # A group of its own, to end all of it: making an environment and building a package start further processes.
        start_new_session=os.name != "nt",
        # It gets the lock of the set-up, which then stays held while it runs even if this process is killed.
        close_fds=False,
    )
    try:
        return process.wait()
    finally:
        if process.poll() is None:
            _end_group(process)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    if os.name == "nt":
        # Terminating a process leaves its children running there.
        subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True, check=False)  # noqa: S607
    else:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def clean_environment() -> dict[str, str]:
    """This process's environment variables without those that turn an interpreter or pip to another folder."""
    banned = {"PYTHONPATH", "PYTHONHOME", "PYTHONSAFEPATH", "PIP_USER", "PIP_TARGET", "PIP_PREFIX", "VIRTUAL_ENV"}
    return {name: value for name, value in os.environ.items() if name.upper() not in banned}


def drop_half_installed(environment: Path) -> None:
    """Forget packages whose installation was cut short, so that pip installs them again.

    pip writes a package's RECORD last but takes one without it for installed.
    """
    for packages in (*environment.glob("lib/python*/site-packages"), environment / "Lib" / "site-packages"):
        for metadata in packages.glob("*.dist-info"):
            if not (metadata / "RECORD").is_file():
                shutil.rmtree(metadata, ignore_errors=True)


def installed_versions(environment: Path) -> str:
    """What the virtual environment holds, one `name==version` a line."""
    command = [str(environment_python(environment)), "-m", "pip", "list", "--format", "freeze"]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ToolError(f"pip could not list the packages in {environment}; delete that folder and try again.")
    return done.stdout
