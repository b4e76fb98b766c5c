"""A profile of some steps, by JAX's profiler."""

from __future__ import annotations

from pathlib import Path

import jax

from engine.errors import ConfigError


class Profile:
    """Written into `folder` (made if it is not there) from now on, for `num_steps` steps or until `stop`."""

    def __init__(self, folder: str | Path, num_steps: int | None = None):
        if num_steps is not None and (type(num_steps) is not int or num_steps < 1):
            raise ConfigError(f"num_steps is {num_steps!r}: give a whole number from 1, or None")
        self.folder = Path(folder)
        self._steps_left = num_steps
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(str(self.folder))
        except (OSError, RuntimeError) as error:
            raise ConfigError(f"no profile can be written to {folder}: {error}") from error
        self.is_running = True

    def note_step(self) -> None:
        """A step has ended."""
        if self._steps_left is not None and self.is_running:
            self._steps_left -= 1
            if self._steps_left == 0:
                self.stop()

    def stop(self) -> Path:
        """End it, if it has not ended; the folder."""
        if self.is_running:
            self.is_running = False
            jax.profiler.stop_trace()
        return self.folder
