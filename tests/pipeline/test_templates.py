"""Row templates: strict about names and nulls, and unable to run away."""

from __future__ import annotations

import jinja2
import pytest

from engine.errors import ConfigError, InputError
from pipeline.templates import (
    RENDER_ERRORS,
    MissingColumn,
    NullPrinted,
    OverBudget,
    RowTemplate,
    read_template,
)


def render(source: str, **columns) -> str:
    return RowTemplate(source, "here", 10_000).render(columns)


def test_columns_are_the_names_that_come_from_the_row():
    template = RowTemplate(
        "{% set x = a %}{{ x }}{% for y in b %}{{ y.c }}{{ range(d) }}{% endfor %}", "here", 10
    )
    assert template.columns == {"a", "b", "d"}
    assert RowTemplate("{{ row['a b'] }}", "here", 10).columns is None
    assert RowTemplate("constant", "here", 10).columns == frozenset()


def test_text_is_rendered_as_it_is():
    assert render("{{ a }} & {{ b }}", a="<b>", b=3) == "<b> & 3"
    assert render("{{ row['a b'] }}", **{"a b": "x"}) == "x"
    assert render("{{ x | tojson }}", x={"é": "<&>"}) == '{"é": "<&>"}'
    assert render("a\n{% if true %}\nb\n{% endif %}\nc\n") == "a\nb\nc"
    assert (
        render("{% for i in range(5) %}{% if i == 3 %}{% break %}{% endif %}{{ loop.index }}{% endfor %}")
        == "123"
    )
    assert render("{% for x in xs %}{{ x }}{{ ',' if not loop.last }}{% endfor %}", xs=["a", "b"]) == "a,b"


def test_a_missing_column_is_told_from_a_missing_key():
    with pytest.raises(MissingColumn, match="'b' is undefined"):
        render("{{ a }} {{ b }}", a=1)
    with pytest.raises(MissingColumn):
        render("{% for x in b %}{% endfor %}", a=1)
    with pytest.raises(jinja2.UndefinedError) as caught:
        render("{{ a.b }}", a={})
    assert not isinstance(caught.value, MissingColumn)
    assert render("{{ b if b is defined else 'none' }}{{ b | default('x') }}") == "nonex"


def test_a_null_is_never_printed():
    with pytest.raises(NullPrinted):
        render("{{ a }}", a=None)
    with pytest.raises(NullPrinted):
        render("x{{ none }}")
    assert render("{{ a or 'nothing' }}{% if a %}never{% endif %}", a=None) == "nothing"


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'x' * 10**9 }}",
        "{{ 10**9 * 'x' }}",
        "{{ [0] * 10**9 }}",
        "{{ 9 ** (9 ** 9) }}",
        "{% set x = 7**2000 %}{% set y = x * x %}{% set z = y * y %}{{ z }}",
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}xxxxxxxxxx{% endfor %}",
        "{% set n = namespace(s='xx') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
        "{% set n = namespace(s='xx') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "{% set n = namespace(s='xx') %}{% for i in range(60) %}{% set n.s = (n.s~n.s)|upper %}{% endfor %}",
        "{% set n = namespace(s=['x']) %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
        "{{ [1] | tojson(indent=1000000000) }}",
    ],
)
def test_what_would_grow_without_end_is_stopped(source):
    with pytest.raises(OverBudget):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ().__class__.__bases__ }}",
        "{{ a.append(1) }}",
        "{{ range(1000000) | list }}",
        "{{ 1 / 0 }}",
        "{{ 'a' + 1 }}",
        "{{ a['x'] }}{{ a[5] }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% include 'x' %}",
        "{{ a | nothing }}",
        "{{ lipsum() }}",
    ],
)
def test_whatever_goes_wrong_is_one_of_the_known_errors(source):
    try:
        template = RowTemplate(source, "here", 10_000)
    except ConfigError:
        return
    with pytest.raises(RENDER_ERRORS):
        template.render({"a": [1]})


def test_the_budget_is_per_row():
    template = RowTemplate("{% for i in range(99999) %}{% endfor %}{{ a }}", "here", 10)
    for _ in range(11):  # more than a million turns in all
        assert template.render({"a": "x"}) == "x"


def test_a_template_that_does_not_parse_names_its_line():
    with pytest.raises(ConfigError, match=r"prompt\.template: line 2: "):
        RowTemplate("a\n{{ b", "prompt.template", 10)


def test_templates_come_from_text_or_a_file(tmp_path):
    path = tmp_path / "t.jinja"
    path.write_bytes(b"\xef\xbb\xbf{{ a }}\n")
    assert read_template(None, str(path), "template") == ("{{ a }}\n", str(path))
    assert read_template("{{ b }}", None, "template") == ("{{ b }}", "prompt.template")
    assert read_template(None, None, "template") is None
    with pytest.raises(ConfigError, match="both given"):
        read_template("x", str(path), "template")
    with pytest.raises(InputError, match=r"absent\.jinja: no such file"):
        read_template(None, str(tmp_path / "absent.jinja"), "template")
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_template(None, str(path), "template")
    path.write_bytes(b"x" * (2**20 + 1))
    with pytest.raises(ConfigError, match="right file"):
        read_template(None, str(path), "template")
