"""Which packages requirements.txt installs on which system, and how files are checked out."""

import shutil
import subprocess

import pytest
from conftest import ROOT
from packaging.requirements import Requirement

ALWAYS = {"torch", "numpy", "matplotlib", "requests", "tqdm"}
SYSTEMS = [("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"), ("win32", "AMD64")]
WITH_AIM = [("linux", "x86_64"), ("darwin", "arm64")]  # on Python 3.11 and 3.12


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13", "3.14"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_each_system_gets_the_packages_that_exist_and_work_there(system, version):
    platform, machine = system
    here = {"sys_platform": platform, "platform_machine": machine, "python_version": version}
    installed = {}
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        requirement = Requirement(line.partition(" #")[0])
        if requirement.marker is None or requirement.marker.evaluate(here):
            installed[requirement.name] = requirement.specifier

    has_aim = system in WITH_AIM and version in ("3.11", "3.12")
    tracker = "aim" if has_aim else "tensorboard"
    assert installed.keys() == ALWAYS | {tracker}
    assert "2.8.0" not in installed["torch"]
    assert "2.12.0" in installed["torch"]
    assert ("2.11.0" in installed["torch"]) == (platform != "darwin")  # attention was wrong there


@pytest.mark.parametrize(
    "attribute", ["bin/x.sh: eol: lf", "data/x.txt: text: unset", "data/x.csv: text: unset"]
)
def test_git_changes_no_line_ends_of_scripts_and_texts(tmp_path, attribute):
    shutil.copy(ROOT / ".gitattributes", tmp_path)
    subprocess.run(["git", "init", tmp_path], check=True, capture_output=True)
    path, name, _ = attribute.split(": ")
    command = ["git", "check-attr", name, path]
    assert subprocess.check_output(command, cwd=tmp_path, text=True) == attribute + "\n"
