"""The installation: what is pinned, and which build of torch a machine is given."""

import importlib.util
import re
import subprocess
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def install() -> ModuleType:
    """tools/install.py; it is no package, for it runs before anything is installed."""
    spec = importlib.util.spec_from_file_location("install", REPOSITORY / "tools" / "install.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class RecordingPip:
    """Stands for the environment's pip; `answers` says which of the calls succeed."""

    def __init__(self, answers: list[bool]) -> None:
        self.answers, self.calls = answers, []

    def installed(self, package: str) -> str:
        return ""

    def pip(self, *arguments: str, quiet: bool = False) -> bool:
        self.calls.append(arguments)
        return self.answers[len(self.calls) - 1]


def on(monkeypatch: pytest.MonkeyPatch, install: ModuleType, system: str, gpu: bool) -> None:
    monkeypatch.setattr(install.platform, "system", lambda: system)
    monkeypatch.setattr(install, "has_gpu", lambda: gpu)


def test_without_a_gpu_only_a_cpu_build_is_ever_asked_for(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, install, "Linux", gpu=False)
    pip = RecordingPip([False, True])
    install.install_torch(pip, None)
    wanted = f"torch=={install.torch_pin()}+cpu"
    assert [call[-1] for call in pip.calls] == [wanted, wanted]
    assert all("--no-deps" in call for call in pip.calls)
    assert install.CPU_INDEX not in pip.calls[0] and install.CPU_INDEX in pip.calls[1]


def test_a_machine_that_finds_no_cpu_build_is_told_what_to_do(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on(monkeypatch, install, "Linux", gpu=False)
    with pytest.raises(SystemExit) as end:
        install.install_torch(RecordingPip([False, False]), None)
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: no CPU build of torch") and "make TORCH=" in message


@pytest.mark.parametrize(("system", "gpu"), [("Linux", True), ("Darwin", False)])
def test_with_a_gpu_or_on_a_mac_the_usual_build_is_taken(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch, system: str, gpu: bool
) -> None:
    on(monkeypatch, install, system, gpu)
    pip = RecordingPip([True])
    install.install_torch(pip, None)
    assert pip.calls == [(f"torch=={install.torch_pin()}",)]


def test_a_torch_that_is_there_is_left_alone(
    install: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, install, "Linux", gpu=False)
    pip = RecordingPip([])
    monkeypatch.setattr(pip, "installed", lambda package: install.torch_pin() + "+cpu")
    install.install_torch(pip, None)
    assert pip.calls == []


def pins(name: str) -> dict[str, str]:
    """The pinned packages of a requirements file; anything that is not pinned fails."""
    lines = (REPOSITORY / name).read_text().splitlines()
    wanted = [line.partition("#")[0].strip() for line in lines]
    found = [re.fullmatch(r"([\w-]+)==([\w.]+)", line) for line in wanted if line]
    return {match[1]: match[2] for match in found if match}


def test_every_requirement_is_pinned_and_ours_comes_last() -> None:
    lines = [
        line.partition("#")[0].strip()
        for line in (REPOSITORY / "requirements.txt").read_text().splitlines()
    ]
    lines = [line for line in lines if line]
    assert lines[-1] == "-e ."
    assert len(pins("requirements.txt")) == len(lines) - 1


def test_what_is_installed_is_what_is_pinned() -> None:
    wanted = pins("requirements.txt") | pins("requirements-test.txt")
    found = {name: version(name).partition("+")[0] for name in wanted}
    differing = {
        name: (found[name], wanted[name]) for name in wanted if found[name] != wanted[name]
    }
    if {"torch", "transformers"} & set(differing):
        pytest.skip(f"an environment of its own kind: {differing}")
    assert not differing


@pytest.mark.parametrize("target", ["demo", "test", "check", "bench"])
def test_make_knows_the_target_and_uses_the_environment_it_is_told(
    target: str, tmp_path: Path
) -> None:
    command = ["make", "--dry-run", target, f"VENV={tmp_path}/venv", "PYTHON=some-python"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f'"some-python" tools/install.py "{tmp_path}/venv"' in done.stdout
