"""Make a virtual environment and install the pinned requirements into it.

    python3 tools/install.py .venv                  # what `make` does first
    python3 tools/install.py .venv --system_torch   # with the torch that this Python already has

Needs the standard library only: it runs before anything is installed. A machine without an NVIDIA
GPU gets the CPU build of torch, from pip's configured registries or else from PyTorch's own, and
never the CUDA packages, which are gigabytes.
"""

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements.txt"
PIP = "pip==26.3"  # twice as fast as the pip 23 that Python 3.11 and 3.12 bring
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def fail(message: str) -> None:
    """End the program: bad usage or a machine that lacks something."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def has_gpu() -> bool:
    """True where an NVIDIA driver shows at least one GPU."""
    if Path("/dev/nvidia0").exists():
        return True
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True).returncode == 0


def torch_pin() -> str:
    """The version of torch that requirements.txt names."""
    found = re.search(r"^torch==(\S+)", REQUIREMENTS.read_text(), re.MULTILINE)
    assert found, "requirements.txt pins torch"
    return found.group(1)


class Environment:
    """A virtual environment and its pip."""

    def __init__(self, folder: Path) -> None:
        self.python = folder.absolute() / "bin" / "python"

    def installed(self, package: str) -> str:
        """The version of `package` in the environment; empty if it is not there."""
        code = f"from importlib.metadata import version; print(version({package!r}))"
        answer = subprocess.run([self.python, "-c", code], capture_output=True, text=True)
        return answer.stdout.strip()

    def pip(self, *arguments: str, quiet: bool = False) -> bool:
        """Run `pip install`; True if it succeeded."""
        # Bytecode is compiled at the first import: most of these files never see one.
        command = [str(self.python), "-m", "pip", "install", "--no-compile", *arguments]
        # DeepSpeed: no kernels at install; what a run needs is built at its first start.
        variables = {**os.environ, "DS_BUILD_OPS": "0"}
        sink = subprocess.DEVNULL if quiet else None
        done = subprocess.run(command, env=variables, stderr=sink, cwd=ROOT)
        return done.returncode == 0


def install_cpu_torch(environment: Environment) -> None:
    """Install torch's CPU build, asking pip's own registries first, then PyTorch's.

    Without dependencies: requirements.txt brings them, and an index that cannot be reached would
    cost its retries for every one of them.
    """
    wanted = f"torch=={torch_pin()}+cpu"
    print(f"no NVIDIA GPU here: looking for {wanted}", flush=True)
    if environment.pip("-q", "--no-deps", wanted, quiet=True):
        return
    index = ["--index-url", CPU_INDEX, "--retries", "2", "--timeout", "30"]
    if not environment.pip("--no-deps", *index, wanted):
        fail(
            f"no CPU build of torch in pip's registries nor at {CPU_INDEX}; add one to pip's "
            f"configuration, or take the CUDA build: make TORCH=torch=={torch_pin()} …"
        )


def install_torch(environment: Environment, asked: str | None) -> None:
    """Install the build of torch that fits this machine, unless it is there already."""
    if asked:
        if not environment.pip(asked):
            fail(f"pip could not install TORCH={asked}")
    elif environment.installed("torch").split("+")[0] == torch_pin():
        return
    elif platform.system() == "Linux" and not has_gpu():
        install_cpu_torch(environment)
    elif not environment.pip(f"torch=={torch_pin()}"):
        fail(f"pip could not install torch=={torch_pin()}")


def install_requirements(environment: Environment, without_torch: bool) -> None:
    """Install requirements.txt; torch is there already, so its line only checks the version."""
    lines = REQUIREMENTS.read_text().splitlines(keepends=True)
    if without_torch:
        lines = [line for line in lines if not line.startswith("torch==")]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.writelines(lines)
        file.flush()
        if not environment.pip("-r", file.name):
            fail("pip could not install requirements.txt; its message stands above")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="the virtual environment to make or to complete")
    parser.add_argument("--torch", help="what pip shall install as torch, instead of choosing")
    parser.add_argument(
        "--system_torch",
        action="store_true",
        help="see the packages of the Python that runs this, and use its torch",
    )
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if sys.version_info < (3, 11):  # noqa: UP036  whoever runs this may have an older one
        found = platform.python_version()
        fail(f"Python 3.11 or newer is needed, this is {found}; use make PYTHON=python3.12 …")
    venv.create(args.folder, with_pip=True, system_site_packages=args.system_torch)
    environment = Environment(args.folder)
    if args.system_torch and not environment.installed("torch"):
        fail(f"{sys.executable} has no torch: leave SYSTEM_TORCH out")
    if not environment.pip("-q", PIP):
        fail("pip could not be updated: is a package registry reachable?")
    if not args.system_torch:
        install_torch(environment, args.torch)
    install_requirements(environment, without_torch=bool(args.torch) or args.system_torch)


if __name__ == "__main__":
    main()
