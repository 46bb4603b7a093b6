"""scripts/setup with a fake pip and a fake nvidia-smi: which torch it asks for, and when; .ci/run
with a fake make: where it runs what.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COPIED = ("scripts/setup", "pyproject.toml", "requirements/dev.txt", "requirements/torch.txt")
TOOLS = ("bash", "cat", "chmod", "cp", "dirname", "flock", "grep", "mkdir", "sha256sum")

# Makes a venv that holds nothing but pip.
PYTHON = """#!/bin/bash
[ "$1" = -c ] && exit 0
[ "$*" = "-m venv --clear .venv" ] || exit 1
mkdir -p .venv/bin && cp "$FAKES/pip" .venv/bin/pip
"""
# Writes down what it is asked to install. With $NEEDS_INDEX, no CPU wheel is known without it.
PIP = """#!/bin/bash
[ "$1" = --version ] && exit 0
echo "$*" >>pip.log
[[ -n "$NEEDS_INDEX" && "$*" == *+cpu && "$*" != *--extra-index-url* ]] && exit 1
exit 0
"""
A_CARD = "#!/bin/bash\necho 'GPU 0: NVIDIA GeForce RTX 4090 (UUID: GPU-0)'\n"
NO_CARD = "#!/bin/bash\necho 'No devices were found' >&2\nexit 6\n"
CUDA = "install --quiet torch===2.13.0"
CPU = "install --quiet torch==2.13.0+cpu"
LOCKED = "install --quiet --require-hashes --no-deps --requirement requirements/dev.txt"
OURS = "install --quiet --no-deps --no-build-isolation --editable ."


class Checkout:
    """A folder with the script, and a PATH on which only the tools above and the fakes are."""

    def __init__(self, root: Path) -> None:
        self.root, self.fakes = root / "checkout", root / "fakes"
        for folder in ("scripts", "requirements"):
            (self.root / folder).mkdir(parents=True)
        self.fakes.mkdir()
        names = (
            "scripts/setup",
            "pyproject.toml",
            "requirements/dev.txt",
            "requirements/torch.txt",
        )
        for name in names:
            shutil.copy(ROOT / name, self.root / name)
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found is not None, tool
            (self.fakes / tool).symlink_to(found)
        self.fake("python3.11", PYTHON)
        self.fake("pip", PIP)

    def fake(self, name: str, script: str) -> None:
        path = self.fakes / name
        path.write_text(script)
        path.chmod(0o755)

    def setup(self, **env: str) -> list[str]:
        """Run the script; what pip was asked since the last time."""
        log = self.root / "pip.log"
        log.write_text("")
        self.run(**env).check_returncode()
        return log.read_text().splitlines()

    def run(self, **env: str) -> subprocess.CompletedProcess[str]:
        only = {"PATH": str(self.fakes), "FAKES": str(self.fakes), **env}
        command = [str(self.fakes / "bash"), "scripts/setup"]
        return subprocess.run(command, cwd=self.root, env=only, capture_output=True, text=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_with_a_gpu_it_asks_for_the_cuda_build(checkout: Checkout) -> None:
    checkout.fake("nvidia-smi", A_CARD)
    assert checkout.setup() == [LOCKED, CUDA, OURS]
    assert checkout.setup() == []


@pytest.mark.parametrize("script", [None, NO_CARD])
def test_without_a_gpu_it_never_does(checkout: Checkout, script: str | None) -> None:
    """Also where the driver is there and the card isn't."""
    if script is not None:
        checkout.fake("nvidia-smi", script)
    assert checkout.setup() == [LOCKED, CPU, OURS]
    assert checkout.setup() == []


def test_without_a_wheel_of_its_own_pip_is_told_of_the_cpu_index(checkout: Checkout) -> None:
    asked = checkout.setup(NEEDS_INDEX="yes")
    index = "--extra-index-url https://download.pytorch.org/whl/cpu"
    assert asked == [LOCKED, CPU, f"{CPU} {index}", OURS]


def test_a_card_that_comes_or_goes_changes_the_build(checkout: Checkout) -> None:
    assert checkout.setup() == [LOCKED, CPU, OURS]
    checkout.fake("nvidia-smi", A_CARD)
    assert checkout.setup() == [LOCKED, CUDA, OURS]
    (checkout.fakes / "nvidia-smi").unlink()
    assert checkout.setup() == [LOCKED, CPU, OURS]


@pytest.mark.parametrize("name", ["pyproject.toml", "requirements/dev.txt"])
def test_a_change_of_what_is_declared_installs_again(checkout: Checkout, name: str) -> None:
    checkout.setup()
    with (checkout.root / name).open("a") as file:
        file.write("# changed\n")
    assert checkout.setup() == [LOCKED, CPU, OURS]


def test_the_interpreter_can_be_chosen(checkout: Checkout) -> None:
    checkout.fake("python3.11", "#!/bin/bash\nexit 1\n")
    checkout.fake("my-python", PYTHON)
    assert checkout.setup(PYTHON="my-python") == [LOCKED, CPU, OURS]
    failed = Checkout(checkout.root.parent / "other").run(PYTHON="none-such")
    assert failed.returncode == 1
    assert "PYTHON=none-such is not a Python 3.11 or newer" in failed.stderr


def test_every_locked_release_has_a_hash_and_torch_is_not_among_them() -> None:
    for name in ("dev", "bench"):
        releases = re.split(r"\n(?=\S)", (ROOT / f"requirements/{name}.txt").read_text())
        locked = [release for release in releases if not release.startswith("#")]
        assert locked and all("--hash=sha256:" in release for release in locked)
        assert not [release for release in locked if release.startswith(("torch=", "nvidia-"))]


def test_a_python_without_venv_is_said(checkout: Checkout) -> None:
    checkout.fake("python3.11", "#!/bin/bash\nexit 1\n")
    failed = checkout.run()
    assert failed.returncode == 1
    (said,) = failed.stderr.splitlines()
    assert "python3-venv" in said


@pytest.mark.parametrize("is_red", [False, True])
def test_ci_runs_in_a_clean_clone_and_removes_it(tmp_path: Path, is_red: bool) -> None:
    checkout, fakes, temporary = tmp_path / "checkout", tmp_path / "fakes", tmp_path / "tmp"
    for folder in (checkout / ".ci", fakes, temporary):
        folder.mkdir(parents=True)
    shutil.copy(ROOT / ".ci/run", checkout / ".ci/run")
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(checkout))
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "all"]):
        subprocess.run([*git, *command], check=True)
    (checkout / "left-over").touch()
    make = fakes / "make"
    fails = "[ $1 != test ]" if is_red else "true"
    make.write_text(f'#!/bin/bash\necho "$1 in $PWD, with" $(ls -A)\n{fails}\n')
    make.chmod(0o755)
    env = {"PATH": f"{fakes}:{os.environ['PATH']}", "TMPDIR": str(temporary)}
    ran = subprocess.run(
        [checkout / ".ci/run"], env=env, capture_output=True, text=True, cwd=tmp_path
    )
    *targets, took = ran.stdout.splitlines()
    assert (ran.returncode != 0) == is_red
    assert [line.split()[0] for line in targets] == ["check", "test", "demo"][: 2 if is_red else 3]
    assert all(f"in {temporary}/" in line and "left-over" not in line for line in targets)
    assert "took 0 min" in took
    assert not list(temporary.iterdir())
