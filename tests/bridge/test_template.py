"""The grammar of path templates, rule by rule, and what any text at all may do to the parser."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleet_server.bridge.template import (
    DoubleWildcard,
    Literal,
    Template,
    TemplateError,
    Variable,
    Wildcard,
    parse_template,
)


def test_every_form_of_the_grammar_becomes_its_tree() -> None:
    template = parse_template("/v1/*/{a.b_c=x/*/**}:undo")
    variable = Variable(("a", "b_c"), (Literal("x"), Wildcard(), DoubleWildcard()))
    assert template == Template((Literal("v1"), Wildcard(), variable), "undo")
    assert template.variables == (variable,)
    assert template.pieces == (Literal("v1"), Wildcard(), Literal("x"), Wildcard(), DoubleWildcard())
    assert (variable.name, variable.multi_segment) == ("a.b_c", True)


def test_a_variable_without_segments_is_one_segment() -> None:
    assert parse_template("/{a}") == parse_template("/{a=*}")
    assert str(parse_template("/{a=*}")) == "/{a}"
    assert not parse_template("/{a}").variables[0].multi_segment
    assert parse_template("/{a=**}").variables[0].multi_segment


def test_percent_escapes_of_literals_are_decoded() -> None:
    assert parse_template("/caf%C3%A9/a%2Bb").segments == (Literal("café"), Literal("a+b"))


@pytest.mark.parametrize(("path", "literal"), [("/a/b", "/a/b"), ("/a/{b}", None), ("/a/*", None), ("/a:b", None)])
def test_only_a_path_of_literals_is_literal(path: str, literal: str | None) -> None:
    assert parse_template(path).literal_path == literal


@pytest.mark.parametrize(
    ("text", "position", "problem"),
    [
        ("", 0, "begins with '/'"),
        ("v1", 0, "begins with '/'"),
        ("/", 1, "expected a segment"),
        ("/a/", 3, "expected a segment"),
        ("//a", 1, "expected a segment"),
        ("/a b", 2, "unexpected ' '"),
        ("/a?b", 2, "unexpected '?'"),
        ("/a:", 3, "expected a verb"),
        ("/a:b/c", 4, "unexpected '/'"),
        ("/a:b:c", 4, "unexpected ':'"),
        ("/***", 3, "unexpected '*'"),
        ("/a*", 2, "unexpected '*'"),
        ("/**/a", 3, "'**' must be the last segment"),
        ("/{a=**}/b", 7, "'**' must be the last segment"),
        ("/{a=**/b}", 6, "'**' must be the last segment"),
        ("/{a={b}}", 4, "variables do not nest"),
        ("/{}", 2, "expected a field name"),
        ("/{1a}", 2, "expected a field name"),
        ("/{a.}", 4, "expected a field name"),
        ("/{a-b}", 3, "a variable ends with '}'"),
        ("/{a", 3, "a variable ends with '}'"),
        ("/{a=}", 4, "expected a segment"),
        ("/{a}}", 4, "unexpected '}'"),
        ("/{a}/{a}", 5, "'a' is bound twice"),
        ("/%2", 1, "two hexadecimal digits"),
        ("/%zz", 1, "two hexadecimal digits"),
        ("/a%FF", 1, "not UTF-8"),
        ("/a%2Fb", 1, "neither an encoded '/'"),
        ("/a%00", 1, "nor NUL"),
    ],
)
def test_a_fault_is_named_with_its_position(text: str, position: int, problem: str) -> None:
    with pytest.raises(TemplateError) as caught:
        parse_template(text)
    assert caught.value.position == position
    assert problem in caught.value.problem
    assert f"position {position}" in str(caught.value)


@given(st.one_of(st.text(max_size=40), st.text(alphabet="/{}=*.:ab%2F_", max_size=24)))
@settings(max_examples=600, derandomize=True, deadline=None)
def test_any_text_is_parsed_or_refused_and_what_is_parsed_prints_as_itself(text: str) -> None:
    try:
        template = parse_template(text)
    except TemplateError as error:
        assert 0 <= error.position <= len(text)
        return
    assert text.startswith("/")
    if "%" not in text:
        assert parse_template(str(template)) == template
