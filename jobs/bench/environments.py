"""A peer's own virtual environment: built once from its pinned versions, found again the next time."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from engine.errors import ConfigError

PINS = Path(__file__).parent / "peers"
_RECIPE = "recipe.sha256"


def environment_python(
    name: str,
    folder: Path,
    removed: Sequence[str] = (),
    say: Callable[[str], None] = print,
    pins: Path = PINS,
) -> Path:
    """The Python of the environment `folder/name`, built when it is absent or was built from other pins.

    `pins/name.txt` is what pip installs; `removed` is uninstalled after that. Raises ConfigError with the end
    of what pip said; `install.log` in the environment holds all of it.
    """
    requirements = pins / f"{name}.txt"
    recipe = hashlib.sha256(
        "\n".join([requirements.read_text(), *removed, sys.version, sys.base_prefix]).encode()
    ).hexdigest()
    place = (folder / name).absolute()
    python = place / "bin" / "python"
    if (place / _RECIPE).is_file() and (place / _RECIPE).read_text() == recipe and python.exists():
        return python
    say(f"building the environment of {name} in {place} (once; it may take minutes)")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    with (place / "install.log").open("w") as log:
        _run([sys.executable, "-m", "venv", "--clear", str(place)], log, name)
    # `--clear` has emptied the folder, the log with it.
    with (place / "install.log").open("w") as log:
        pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
        _run([*pip, "install", "-r", str(requirements)], log, name)
        if removed:
            _run([*pip, "uninstall", "-y", *removed], log, name)
    (place / _RECIPE).write_text(recipe)
    return python


def _run(command: list[str], log: object, name: str) -> None:
    path = Path(log.name)  # type: ignore[attr-defined]
    try:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)  # type: ignore[call-overload]
    except OSError as error:
        raise ConfigError(f"the environment of {name} cannot be built: {command[0]}: {error}") from error
    if done.returncode:
        said = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
        last = said[-1] if said else "it said nothing"
        raise ConfigError(
            f"the environment of {name} cannot be built: {' '.join(command[1:4])} ended with status "
            f"{done.returncode}: {last} (all of it: {path})"
        )
