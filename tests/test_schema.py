"""schema.py: what is read from disk fits its schema, or one line says where it does not."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import UserError, shown
from flags import Number
from schema import ANY_NUMBER, misfit, parse_json, parse_json_lines, read_bytes, read_json

JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
                    max_leaves=8)
WHOLE = Number(1, 9, whole=True)


@pytest.mark.parametrize("value, schema, says", [
    ("a", str, ""), (1, str, "is 1, not a text"), (True, bool, ""), (0, bool, "is 0, not true or false"),
    (9, WHOLE, ""), (10, WHOLE, "is 10, not a whole number from 1 to 9"), (1.0, WHOLE, "is 1.0, not a whole number"),
    (True, WHOLE, "is true, not a whole"), (math.nan, Number(0, 1), "is NaN, not a number from 0 to 1"),
    (10**400, Number(0, 1), "is 1000"), (math.nan, ANY_NUMBER, ""), (True, ANY_NUMBER, "is true, not a number"),
    (10**400, ANY_NUMBER, "not a number"), (None, (WHOLE, None), ""), ("x", (WHOLE, None), 'is "x", not a whole'),
    ([1, 2], [WHOLE], ""), ([1, "2"], [WHOLE], "'1' is \"2\", not"), ({}, [WHOLE], "is not a list"),
    ({"a": 1, "z": []}, {"a": WHOLE}, ""), ({"a": 0}, {"a": WHOLE}, "'a' is 0"), ({}, {"a": WHOLE}, "lacks 'a'"),
    ({}, {"a?": WHOLE}, ""), ({"a": {"b": "c"}}, {"a?": {"b": WHOLE}}, "'a' 'b' is \"c\", not"),
    ({"a": 1, "z": 0}, {"a": WHOLE, str: WHOLE}, "'z' is 0"), ([], {"a": WHOLE}, "is not a JSON object"),
    ("llama3", ("default", "llama3"), ""), (1, True, "is 1, not True"), ([[]], list, ""), ({}, list, "is not a list"),
])
def test_a_value_fits_or_is_told_where_not(value, schema, says):
    found = misfit(value, schema)
    assert found.startswith(says) if says.startswith(("is", "lacks", "'")) else says in found if says else found == ""


@pytest.mark.parametrize("text, says", [
    (b"{", "is not JSON"), (b"", "is not JSON"), (b"\xff", "is not JSON .not UTF-8"), (b"[" * 100_000, "too deep"),
    (b"[" * 60 + b"]" * 60, "too deep"), (b"1" * 5000, "is not JSON .a number too long"),
    (b'"\\ud83d"', "half a character"), (b'{"a": 1} {}', "is not JSON"),
    (b'{"c": {"a": 1, "b": 2, "a": 1}}', "says 'a' twice in one object"),
])
def test_what_is_no_json_is_one_line(text, says):
    with pytest.raises(UserError, match=rf"^f\.json .*{says}.*: again$") as told:
        parse_json(text, object, "f.json", "again")
    assert "\n" not in str(told.value) and len(str(told.value)) < 200


@settings(max_examples=200, deadline=None)
@given(JSON)
def test_what_is_written_is_read(value):
    back = parse_json(json.dumps(value).encode(), object, "f", "again")
    assert json.dumps(back) == json.dumps(value)


@settings(max_examples=200, deadline=None)
@given(JSON)
def test_no_value_and_schema_end_in_anything_but_words(value):
    for schema in ({"a": WHOLE, str: [str]}, [{"": str}], (None, [WHOLE]), {str: (ANY_NUMBER, None)}, WHOLE, bool):
        assert isinstance(misfit(value, schema), str)


def test_files_are_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"none\.json does not exist"):
        read_json(tmp_path / "none.json")
    with pytest.raises(UserError, match=r"is not a file: download it again"):
        read_json(tmp_path)
    with pytest.raises(UserError, match=r"cannot be read .File name too long"):
        read_json(tmp_path / ("x" * 300))
    (tmp_path / "lines.jsonl").write_text('{"a": 1}\n\n{"a": "b"}\n')
    lines = read_bytes(tmp_path / "lines.jsonl")
    assert parse_json_lines(lines, dict, "lines.jsonl", "") == [{"a": 1}, {"a": "b"}]
    with pytest.raises(UserError, match=r"lines\.jsonl line 3 'a' is \"b\", not a whole number"):
        parse_json_lines(lines, {"a": WHOLE}, "lines.jsonl", "")
    monkeypatch.setattr("schema.LARGEST", 3)
    with pytest.raises(UserError, match=r"lines\.jsonl is larger than"):
        read_json(tmp_path / "lines.jsonl")


@pytest.mark.parametrize("text, there", [("a\nb é 日 🙂", "a\nb é 日 🙂"), ("\x1b[2Jx", "\\x1b[2Jx"),
                                         ("a\rb\x07", "a\\rb\\x07"),
                                         ("\u202egnp", "\\u202egnp"), ("\x9b1m", "\\x9b1m")])
def test_what_would_move_the_cursor_is_spelled_out(text, there):
    assert shown(text) == there
