"""The set-up of the private host: that it can be cut off anywhere, and what it says where it cannot go on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hosting import location, lock, pip, private, steps
from hosting.errors import ToolError
from hosting.paths import ROOT, cache_folder, environment_python
from hosting.pip import clean_environment
from measuring.given import chosen

try:
    import tomllib
except ImportError:  # Python 3.10, where pytest brings the same module along
    import tomli as tomllib


def _run_tool(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / arguments[0]), *arguments[1:]]
    environment = clean_environment() | variables
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def _assert_one_sentence(done: subprocess.CompletedProcess[str], code: int, *parts: str) -> None:
    assert done.returncode == code, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for part in parts:
        assert part in done.stderr


def test_steps_resume_where_they_stopped(tmp_path: Path) -> None:
    """A failed step runs again, those before it do not, and a changed recipe runs it and those after it again."""
    ran: list[str] = []

    def note(name: str) -> Callable[[], None]:
        return lambda: ran.append(name)

    def fail() -> None:
        raise KeyboardInterrupt

    first, third = steps.Step("first", "1", "first", note("first")), steps.Step("third", "1", "third", note("third"))
    with pytest.raises(KeyboardInterrupt):
        steps.run_steps(tmp_path, [first, steps.Step("second", "1", "second", fail), third], offline=False)
    second = steps.Step("second", "1", "second", note("second"))
    steps.run_steps(tmp_path, [first, second, third], offline=False)
    assert ran == ["first", "second", "third"]
    steps.run_steps(tmp_path, [first, second, third], offline=True)
    assert ran == ["first", "second", "third"]
    steps.run_steps(tmp_path, [first, steps.Step("second", "2", "second", note("again")), third], offline=False)
    assert ran == ["first", "second", "third", "again", "third"]


def test_step_whose_product_is_gone_runs_again(tmp_path: Path) -> None:
    """A stamp alone is not enough."""
    product = tmp_path / "product"
    step = steps.Step("make", "1", "make", product.touch, product=product)
    steps.run_steps(tmp_path, [step], offline=False)
    product.unlink()
    steps.run_steps(tmp_path, [step], offline=False)
    assert product.exists()


def test_offline_is_one_sentence(tmp_path: Path) -> None:
    """Where something is missing, --offline says so and makes nothing."""
    done = _run_tool("host.py", "--offline", "setup", SUBJECT_PATCHES_CACHE=str(tmp_path / "cache"), COMFYUI_PATH="")
    _assert_one_sentence(done, 1, "nothing may be fetched", str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_too_little_disk_is_one_sentence(tmp_path: Path) -> None:
    """A step that needs more than the disk has is not begun."""
    ran: list[str] = []
    step = steps.Step("big", "1", "big", lambda: ran.append("big"), gib=shutil.disk_usage(tmp_path).total / 2**30)
    with pytest.raises(ToolError, match="free, which the next step of the set-up"):
        steps.run_steps(tmp_path, [step], offline=False)
    assert ran == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full, a disk that is always full")
def test_full_disk_is_one_sentence(tmp_path: Path) -> None:
    """A disk that fills up in the middle of a step."""

    def fill() -> None:
        with Path("/dev/full").open("w") as file:
            file.write("x")

    with pytest.raises(ToolError, match="is full; free some space"):
        steps.run_steps(tmp_path, [steps.Step("fill", "1", "fill", fill)], offline=False)


def test_two_set_ups_at_once_do_the_work_once(tmp_path: Path) -> None:
    """The second waits for the first and finds nothing left to do."""
    ran: list[float] = []

    def slow() -> None:
        ran.append(time.monotonic())
        time.sleep(1.0)

    step = steps.Step("slow", "1", "slow", slow)
    threads = [threading.Thread(target=steps.run_steps, args=(tmp_path / "f", [step], False)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ran) == 1


def test_what_is_held_alone_is_refused_to_others(tmp_path: Path) -> None:
    """Two servers in one folder would write over each other."""
    with (
        lock.held_alone(tmp_path / "lock", "One is at work."),
        pytest.raises(ToolError, match=r"One is at work\."),
        lock.held_alone(tmp_path / "lock", "One is at work."),
    ):
        pass
    with lock.held_alone(tmp_path / "lock", "One is at work."):
        pass


def test_lock_of_a_dead_process_is_free(tmp_path: Path) -> None:
    """Killing its holder lets a lock go."""
    held = tmp_path / "held"
    code = (
        f"import sys, time; sys.path.insert(0, {str(ROOT / 'tools')!r})\n"
        f"from pathlib import Path; from hosting.lock import exclusive\n"
        f"with exclusive(Path({str(tmp_path / 'lock')!r})):\n"
        f"    Path({str(held)!r}).touch(); time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code])
    try:
        while not held.exists():
            assert holder.poll() is None
            time.sleep(0.05)
        with (tmp_path / "lock").open("a+b") as file:
            assert not lock._try_lock(file)
    finally:
        holder.kill()
        holder.wait()
    with lock.exclusive(tmp_path / "lock"):
        pass


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
def test_stopped_set_up_leaves_no_process(tmp_path: Path) -> None:
    """A signal ends the command that a step runs, and the processes which that has started."""
    noted = tmp_path / "pid"
    grandchild = f"import os, time; open({str(noted)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    code = (
        f"import os, sys; sys.path.insert(0, {str(ROOT / 'tools')!r})\n"
        f"from hosting.command import run; from hosting.pip import run_to_end\n"
        f"run(lambda: run_to_end([sys.executable, '-c', {child!r}], dict(os.environ)))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) as tool:
        while not (noted.exists() and noted.read_text()):
            assert tool.poll() is None
            time.sleep(0.05)
        tool.terminate()
        _, errors = tool.communicate(timeout=30)
    assert (tool.returncode, errors) == (130, "Stopped.\n")
    # A killed process that nobody has waited for yet still has its number, but no command line.
    left = Path(f"/proc/{noted.read_text()}/cmdline")
    if Path("/proc/self").exists():
        assert not left.exists() or left.read_bytes() == b""


def test_half_installed_package_is_forgotten(tmp_path: Path) -> None:
    """pip takes a package for installed whose RECORD it had not yet written; the set-up does not."""
    packages = tmp_path / "lib" / "python3.11" / "site-packages"
    for name in ("whole-1.dist-info", "half-1.dist-info"):
        (packages / name).mkdir(parents=True)
        (packages / name / "METADATA").touch()
    (packages / "whole-1.dist-info" / "RECORD").touch()
    pip.drop_half_installed(tmp_path)
    assert [path.name for path in packages.iterdir()] == ["whole-1.dist-info"]


def test_no_network_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip without an index to reach: the sentence says what was being fetched, and that it can be run again."""
    private._environment(tmp_path / "environment")
    # Port 9 discards; nothing listens to it.
    for name, value in {"INDEX_URL": "http://127.0.0.1:9/", "EXTRA_INDEX_URL": "", "RETRIES": "0"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(ToolError, match=r"^comfy-cli could not be fetched because the package index was not reached"):
        pip.run_pip(tmp_path / "environment", ["install", "nonesuch-9b1deb4d"], "comfy-cli")


@pytest.mark.parametrize("version", [(3, 9), (3, 14)])
def test_wrong_python_is_one_sentence(version: tuple[int, int]) -> None:
    """A Python without ComfyUI's packages is refused before anything is fetched."""
    with pytest.raises(ToolError, match=rf"This is Python 3\.{version[1]}, and the tools need one from 3\.10 to 3\.13"):
        location.check_python(version)
    location.check_python((3, 10))
    location.check_python((3, 13))


def test_comfyui_path_without_comfyui(tmp_path: Path) -> None:
    """A COMFYUI_PATH that holds something else is named."""
    done = _run_tool("host.py", "path", COMFYUI_PATH=str(tmp_path))
    _assert_one_sentence(done, 1, f"COMFYUI_PATH is {tmp_path}, which holds no ComfyUI")


def test_comfyui_path_that_is_too_old(tmp_path: Path) -> None:
    """An old ComfyUI is refused with its version."""
    (tmp_path / "comfy").mkdir()
    for name in ("main.py", "comfy/samplers.py"):
        (tmp_path / name).touch()
    (tmp_path / "comfyui_version.py").write_text('__version__ = "0.3.40"\n')
    done = _run_tool("host.py", "path", COMFYUI_PATH=str(tmp_path))
    _assert_one_sentence(done, 1, "ComfyUI 0.3.40", "0.30.0 or later")


def test_comfyui_path_with_an_interpreter_without_its_packages(host: location.Host) -> None:
    """The interpreter of another environment is refused with what it lacks."""
    python = environment_python(private.client_folder() / "environment")
    done = subprocess.run(
        [str(python), str(ROOT / "tools" / "host.py"), "path"],
        env=clean_environment() | {"COMFYUI_PATH": str(host.tree)},
        capture_output=True,
        text=True,
        check=False,
    )
    _assert_one_sentence(done, 1, "lacks", "torch", "unset COMFYUI_PATH")


def test_comfyui_path_is_used(host: location.Host) -> None:
    """With the right interpreter the named ComfyUI is the host."""
    done = _run_tool("host.py", "path", COMFYUI_PATH=str(host.tree))
    assert (done.returncode, done.stdout.strip()) == (0, str(host.tree))


def test_cache_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """SUBJECT_PATCHES_CACHE decides, also as a relative path."""
    monkeypatch.setenv("SUBJECT_PATCHES_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.setenv("SUBJECT_PATCHES_CACHE", "relative")
    assert cache_folder() == Path.cwd() / "relative"


def test_development_packages_are_the_extra_of_the_project() -> None:
    """The `dev` and `train` extras and what the set-up installs are the same."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert sorted(project["optional-dependencies"]["dev"]) == sorted(private.DEVELOPMENT + private.CLIENT)
    assert sorted(project["optional-dependencies"]["train"]) == sorted(private.TRAINING)


def test_client_left_the_host_alone(host: location.Host) -> None:
    """comfy-cli's own dependencies are not in the host's environment."""
    if not host.private:
        pytest.skip("the environment of a ComfyUI that COMFYUI_PATH names is its owner's")
    assert "comfy-cli" not in pip.installed_versions(host.python.parent.parent)


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("dual", ["dual branch"]),
        ("layout", ["layout of 2", "layout of 3"]),
        ("layout of 3", ["layout of 3"]),
        ("layout of 3; residual", ["residual", "layout of 3"]),
    ],
)
def test_only_is_whole_words(words: str, names: list[str]) -> None:
    """What `--only` of the measuring tools takes: 'dual' is not in 'residual'."""
    every = ["residual", "dual branch", "layout of 2", "layout of 3"]
    assert chosen(words, every) == names
    assert chosen("", every) == every
    for wrong in ("dua", "residual; dua"):
        with pytest.raises(ToolError, match=r"no 'dua' to measure; give whole words of one of these: residual; dual"):
            chosen(wrong, every)
