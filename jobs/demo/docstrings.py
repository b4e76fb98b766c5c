"""Real text that is on every machine: the docstrings of Python's standard library."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass

# Modules of every supported Python, importable without side effects on any Linux.
MODULES = """
argparse ast base64 bisect bz2 calendar cmath cmd codecs collections colorsys concurrent.futures
configparser contextlib copy csv dataclasses datetime decimal difflib dis email.utils enum fileinput
filecmp fnmatch fractions ftplib functools getopt gettext glob graphlib gzip hashlib heapq hmac html
http.client imaplib inspect ipaddress itertools json keyword linecache locale logging lzma mailbox
math mimetypes operator os pathlib pickle pkgutil platform plistlib poplib pprint queue quopri
random re reprlib sched secrets selectors shelve shlex shutil signal smtplib socket sqlite3 ssl stat
statistics string struct subprocess symtable sys tarfile tempfile textwrap threading time timeit
token tokenize trace traceback tracemalloc types unicodedata unittest urllib.parse urllib.request
uuid warnings weakref xml.dom xml.sax zipfile zlib
"""


@dataclass(frozen=True, slots=True)
class Docstring:
    """`name` is the full dotted name of a public function or class, `text` its documentation."""

    name: str
    module: str
    text: str


def docstrings(min_chars: int, max_chars: int) -> list[Docstring]:
    """Every docstring of that many characters, by module in the order above, then by name; no text twice.

    The same list each time for one version of Python. Raises RuntimeError where Python has no docstrings.
    """
    if __doc__ is None:
        raise RuntimeError("Python was started with -OO and has no docstrings; start it without")
    found: list[Docstring] = []
    seen: set[str] = set()
    for module_name in MODULES.split():
        module = importlib.import_module(module_name)
        for name, value in sorted(vars(module).items()):
            if name.startswith("_") or not (inspect.isroutine(value) or inspect.isclass(value)):
                continue
            # What a module has only imported from another belongs to the other; C parts begin with "_".
            if getattr(value, "__module__", None) not in (module_name, f"_{module_name}"):
                continue
            text = inspect.getdoc(value)
            if text is None or not min_chars <= len(text) <= max_chars or text in seen:
                continue
            seen.add(text)
            found.append(Docstring(f"{module_name}.{name}", module_name, text))
    return found
