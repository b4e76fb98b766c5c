"""Tokenised rows of a window, kept on the local disk between planning their order and running them in it.

A window must be read whole before its order is known. Reading the input again in that order would tokenise
every row twice and seek in files that have no index, so rows wait here instead: in memory while they are
few, else in a file of the spool folder that has no name and goes when the process does. What is written is
read back by the same process alone.
"""

from __future__ import annotations

import pickle
import tempfile
from array import array
from pathlib import Path

from pipeline.rows import Prompt, Reject
from pipeline.storage import explain

MEMORY_BYTES = 32 * 2**20
MAX_BYTES = 2**30


class PromptSpool:
    """Rows by the order they were added in. What is dropped without being closed closes itself."""

    def __init__(self, folder: Path):
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.SpooledTemporaryFile(max_size=MEMORY_BYTES, dir=str(folder))  # noqa: SIM115
        self._ends = array("Q", [0])

    def __len__(self) -> int:
        return len(self._ends) - 1

    @property
    def is_full(self) -> bool:
        """Time to end the window."""
        return self._ends[-1] >= MAX_BYTES

    def add(self, row: Prompt | Reject) -> None:
        """Append a row. Raises RetryLater when the disk is full."""
        data = pickle.dumps(row, protocol=pickle.HIGHEST_PROTOCOL)
        try:
            self._file.write(data)
        except OSError as error:
            raise explain(error, self._folder, self._ends[-1] + len(data)) from error
        self._ends.append(self._ends[-1] + len(data))

    def read(self, number: int) -> Prompt | Reject:
        """The row that was added as number `number`, from 0. Nothing can be added after the first read."""
        start, stop = self._ends[number], self._ends[number + 1]
        try:
            self._file.seek(start)  # and what is not written through yet is
        except OSError as error:
            raise explain(error, self._folder, self._ends[-1]) from error
        return pickle.loads(self._file.read(stop - start))

    def close(self) -> None:
        self._file.close()

    def __del__(self) -> None:
        self.close()
