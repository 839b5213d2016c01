"""Which packages requirements.txt installs on which system, and how files are checked out."""

import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent

SYSTEMS = {
    "Linux x86-64": ("linux", "x86_64"),
    "Linux ARM": ("linux", "aarch64"),
    "macOS ARM": ("darwin", "arm64"),
    "Windows": ("win32", "AMD64"),
}
VERSIONS = ["3.11", "3.12", "3.13", "3.14"]
WITH_AIM = {
    (system, version) for system in ("Linux x86-64", "macOS ARM") for version in ("3.11", "3.12")
}


def required_packages(system: str, version: str) -> dict[str, Requirement]:
    """The packages that pip would install there."""
    sys_platform, machine = SYSTEMS[system]
    environment = {
        "sys_platform": sys_platform,
        "platform_machine": machine,
        "python_version": version,
    }
    packages = {}
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        text = line.partition("#")[0].strip()
        if text:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate(environment):
                assert requirement.name not in packages
                packages[requirement.name] = requirement
    return packages


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_aim_is_installed_where_it_has_packages_and_tensorboard_elsewhere(system, version):
    tracker = "aim" if (system, version) in WITH_AIM else "tensorboard"
    always = {"torch", "numpy", "matplotlib", "requests", "urllib3", "tqdm"}
    assert required_packages(system, version).keys() == always | {tracker}


@pytest.mark.parametrize("system", SYSTEMS)
def test_macos_gets_a_torch_whose_attention_is_right_there(system):
    torch = required_packages(system, "3.12")["torch"]
    assert "2.12.0" in torch.specifier
    assert "2.8.0" not in torch.specifier
    assert ("2.11.0" in torch.specifier) == (system != "macOS ARM")


def test_line_ends_are_the_same_in_a_clone_that_converts_them(tmp_path):
    origin, clone = tmp_path / "origin", tmp_path / "clone"
    files = [".gitattributes", "bin/concatenate.sh", "data/sample.txt", "data/catalogue.csv"]
    for name in files:
        (origin / name).parent.mkdir(parents=True, exist_ok=True)
        (origin / name).write_bytes((ROOT / name).read_bytes())

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
        subprocess.run(["git", *identity, *arguments], check=True, capture_output=True)

    git("init", str(origin))
    git("-C", str(origin), "add", ".")
    git("-C", str(origin), "commit", "-m", "files")
    git("-c", "core.autocrlf=true", "clone", str(origin), str(clone))
    for name in files[1:]:
        assert (clone / name).read_bytes() == (ROOT / name).read_bytes(), name
