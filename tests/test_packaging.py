"""What is installed is what is in the tree, and the constraints cover what is declared."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

PACKAGES = ("pipeline", "engine", "kernels", "jobs", "conf")


def test_the_wheel_holds_every_module_and_every_config(repository: Path, tmp_path: Path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repository / name, source)
    for package in PACKAGES:
        shutil.copytree(repository / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    build = "import setuptools.build_meta as build; build.build_wheel('out')"
    finished = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr

    (wheel,) = (source / "out").glob("tidemill-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    expected = {
        str(path.relative_to(source))
        for package in PACKAGES
        for pattern in ("*.py", "*.yaml", "*.jinja", "*.html")
        for path in (source / package).rglob(pattern)
    }
    assert "conf/config.yaml" in expected
    assert expected | {"engine/group_costs.json", "engine/monitoring/grafana.json"} <= packed
    assert not [name for name in packed if name.startswith(("tests/", "notebooks/"))]
    assert any(name.endswith("licenses/LICENSE") for name in packed)


def test_constraints_are_exact_and_cover_what_is_declared(repository: Path):
    lines = [
        line for line in (repository / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    ]
    assert all(re.fullmatch(r"[a-z0-9-]+==[A-Za-z0-9.]+", line) for line in lines)
    pinned = {line.partition("==")[0] for line in lines}
    assert len(pinned) == len(lines), "a name is pinned twice"
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"]]
    for requirements in project["optional-dependencies"].values():
        declared += requirements
    names = {re.split(r"[\[<>=!~; ]", requirement)[0].lower().replace("_", "-") for requirement in declared}
    names.discard("tidemill")  # an extra may name others
    assert names <= pinned, f"not pinned: {names - pinned}"
    assert "llama-cpp-python" not in pinned
