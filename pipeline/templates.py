"""Jinja templates over a row's columns, bounded: sandboxed, strict about names and nulls, limited in size.

The limits count characters and loop turns rather than seconds, so a row that renders once renders always.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jinja2
import jinja2.meta
import jinja2.nodes
import jinja2.sandbox
import jinja2.visitor

from engine.errors import ConfigError, InputError
from pipeline.input_files import errors_named, filesystem, open_file

MAX_TEMPLATE_BYTES = 1024 * 1024
MAX_LOOP_TURNS = 1_000_000
_MAX_INT_BITS = 10_000

ALL_COLUMNS = "row"
"""The name under which a template finds all columns, for those whose names are no identifiers."""


class MissingColumn(jinja2.UndefinedError):
    """The template uses a column that the row does not have."""


class NullPrinted(jinja2.TemplateError):
    """The template would print `None`, which is never what was meant."""


class OverBudget(jinja2.TemplateError):
    """The output, a value on the way to it, or the number of loop turns is past its limit."""


# What rendering untrusted values can raise besides jinja2's own errors. Templates are Python in disguise, and
# their operators raise what Python's do.
RENDER_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class RowTemplate:
    """One compiled template. `columns` are the names it uses, None when it uses `row`, which is all."""

    def __init__(self, source: str, where: str, max_chars: int):
        self.source = source
        self._max_chars = max_chars
        self._budget = _Budget(max_chars)
        environment = _Environment(self._budget)
        try:
            names = jinja2.meta.find_undeclared_variables(environment.parse(source))
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"{where}: line {error.lineno}: {error.message}; mend the template") from error
        names -= set(environment.globals)
        self.columns = None if ALL_COLUMNS in names else frozenset(names)

    def render(self, columns: Mapping[str, Any]) -> str:
        """The text for one row. Raises one of RENDER_ERRORS."""
        self._budget.turns = 0
        pieces: list[str] = []
        num_chars = 0
        for piece in self._template.generate({ALL_COLUMNS: dict(columns)} | dict(columns)):
            num_chars += len(piece)
            if num_chars > self._max_chars:
                raise OverBudget(
                    f"the text has more than {self._max_chars} characters (prompt.max_prompt_chars)"
                )
            pieces.append(piece)
        return "".join(pieces)


def read_template(text: str | None, file: str | None, name: str) -> tuple[str, str] | None:
    """(source, where it is from) of the template given as text or as a file; None when neither is."""
    if text is not None and file is not None:
        raise ConfigError(f"prompt.{name} and prompt.{name}_file are both given; remove one")
    if file is None:
        return None if text is None else (text, f"prompt.{name}")
    fs, path = filesystem(file)
    if not fs.exists(path):
        raise InputError(f"{file}: no such file; check prompt.{name}_file")
    with errors_named(file), open_file(fs, path) as stream:
        source = stream.read(MAX_TEMPLATE_BYTES + 1)
    if len(source) > MAX_TEMPLATE_BYTES:
        raise ConfigError(
            f"{file}: a template of more than {MAX_TEMPLATE_BYTES} bytes; is it the right file?"
        )
    try:
        return source.decode("utf-8-sig"), file
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: the template is not UTF-8 at byte {error.start + 1}") from error


class _Budget:
    def __init__(self, max_chars: int):
        self.max_chars = max_chars
        self.turns = 0

    def counted(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.turns += 1
            if self.turns > MAX_LOOP_TURNS:
                raise OverBudget(f"the template loops more than {MAX_LOOP_TURNS} times")
            yield item

    def sized(self, value: Any) -> Any:
        if isinstance(value, str) and len(value) > self.max_chars:
            raise OverBudget(f"a text inside the template is longer than {self.max_chars} characters")
        return value


class _ColumnUndefined(jinja2.StrictUndefined):
    """Strict, and tells a column that is not there from a missing key of one that is."""

    __slots__ = ()

    def __init__(
        self,
        hint: str | None = None,
        obj: Any = jinja2.utils.missing,
        name: str | None = None,
        exc: Any = None,
    ):
        kind = MissingColumn if obj is jinja2.utils.missing else jinja2.UndefinedError
        super().__init__(hint, obj, name, exc or kind)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("*", "**", "+"))

    def __init__(self, budget: _Budget):
        # White space as in chat templates: a line that holds only a statement leaves nothing behind.
        super().__init__(
            undefined=_ColumnUndefined,
            finalize=_not_none,
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols"],
        )
        self._budget = budget
        for name in ("lipsum", "cycler", "joiner"):
            del self.globals[name]
        self.filters["tojson"] = _tojson  # jinja2's own escapes <, > and & for HTML
        self.filters[_COUNTED] = budget.counted
        self.filters[_SIZED] = budget.sized

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        return _Bounded().visit(super()._parse(source, name, filename)).set_environment(self)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * max(right, 0) > _MAX_INT_BITS:
                raise OverBudget("a power inside the template is too large")
        elif operator == "*":
            self._check_product(left, right)
        elif (
            operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple)
        ):
            self._check_len(len(left) + len(right))
        return super().call_binop(context, operator, left, right)

    def _check_product(self, left: Any, right: Any) -> None:
        if isinstance(left, int) and isinstance(right, int):
            if left.bit_length() + right.bit_length() > _MAX_INT_BITS:
                raise OverBudget("a product inside the template is too large")
            return
        for value, times in ((left, right), (right, left)):
            if isinstance(value, str | bytes | list | tuple) and isinstance(times, int):
                self._check_len(len(value) * max(times, 0))

    def _check_len(self, num_items: int) -> None:
        if num_items > self._budget.max_chars:
            raise OverBudget(f"a value inside the template is longer than {self._budget.max_chars}")


_COUNTED = "_counted"
_SIZED = "_sized"


class _Bounded(jinja2.visitor.NodeTransformer):
    """Counts the turns of every loop, and measures every `a ~ b`, which is no operator to the sandbox."""

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.For:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, _COUNTED)
        return node

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Filter:
        self.generic_visit(node)
        return _filtered(node, _SIZED)


def _filtered(node: Any, name: str) -> jinja2.nodes.Filter:
    return jinja2.nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _not_none(value: Any) -> Any:
    if value is None:
        raise NullPrinted("the template prints a null")
    return value


def _tojson(value: Any, indent: int | None = None, sort_keys: bool = False) -> str:
    if indent is not None and not 0 <= indent <= 16:
        raise OverBudget("tojson's indent is 0 to 16")
    return json.dumps(value, ensure_ascii=False, indent=indent, sort_keys=sort_keys)
