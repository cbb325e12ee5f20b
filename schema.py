"""Whatever somebody else may have written is read here: JSON of bounded size and depth, checked against a schema.

    config = read_json(path, {"model_type": str, "hidden_size": Number(1, 131_072, whole=True), "name?": (str, None)})

A schema is plain data:
    str, bool, dict, list       a value of that type
    Number(low, high, ...)      a number in that range (flags.py); never true or false, NaN or infinity
    ANY_NUMBER                  any number, NaN and infinity too: what a broken model scores
    None, "text"                that very value
    (a, b)                      an a or a b
    [a]                         a list of a
    {"key": a, "other?": b}     an object with a key, and perhaps another; more keys are left alone
    {str: a}                    and every key that is not named holds an a
    object                      anything
"""

import json
from pathlib import Path
from typing import Any

from errors import UserError
from flags import Number

ANY_NUMBER = float
LARGEST = 2**28  # bytes of a file; the largest tokenizers have 2^25
DEEPEST = 40  # lists and objects within one another
TOLD = {str: "a text", bool: "true or false", dict: "a JSON object", list: "a list", ANY_NUMBER: "a number"}


def read_json(path: Path, schema: Any = dict, way_out: str = "download it again") -> Any:
    """What a JSON file holds. Raises UserError, naming file and fault, where it is missing, no JSON or not so made."""
    return parse_json(read_bytes(path, way_out), schema, str(path), way_out)


def parse_json_lines(text: bytes, schema: Any, where: str, way_out: str) -> list:
    """What each line holds, empty ones left out. Raises UserError as read_json does."""
    return [parse_json(line, schema, f"{where} line {number}", way_out)
            for number, line in enumerate(text.split(b"\n"), 1) if line.strip()]


def read_bytes(path: Path, way_out: str = "give another") -> bytes:
    """A file's content. Raises UserError where it cannot be read or is larger than anything that belongs here."""
    try:
        if not Path(path).is_file():
            raise UserError(f"{path} {'is not a file' if Path(path).exists() else 'does not exist'}: {way_out}")
        if Path(path).stat().st_size > LARGEST:
            raise UserError(f"{path} is larger than {LARGEST >> 20} MB: it is not what it should be")
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None


def parse_json(text: bytes, schema: Any, where: str, way_out: str) -> Any:
    """One JSON value. Raises UserError, beginning with `where`, for anything else than the schema."""
    fault = None
    try:
        value = json.loads(text.decode("utf-8-sig"), object_pairs_hook=each_key_once)
        if b"\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # JSON may spell half a surrogate pair, UTF-8 may not
    except UnicodeDecodeError:
        fault = "is not JSON (not UTF-8 text)"
    except UnicodeEncodeError:
        fault = "holds half a character (a cut emoji, say)"
    except RecursionError:
        fault = "is nested too deep"
    except KeyError as error:
        fault = f"says {shortened(str(error))} twice in one object"
    except ValueError as error:  # also a number of more digits than Python reads
        fault = f"is not JSON ({getattr(error, 'msg', 'a number too long')})"
    if fault is None:
        fault = "is nested too deep" if too_deep(value, DEEPEST) else misfit(value, schema)
    if fault:
        raise UserError(f"{where} {fault}: {way_out}")
    return value


def each_key_once(pairs: list[tuple[str, Any]]) -> dict:
    """An object as it was read. Raises KeyError with a key that comes twice: which of its values was meant?"""
    out = dict(pairs)
    if len(out) < len(pairs):
        raise KeyError(next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i])))
    return out


def too_deep(value: Any, levels: int) -> bool:
    """Whether lists and objects stand within one another in more than so many levels."""
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, list) and (levels == 0 or any(too_deep(part, levels - 1) for part in value))


def misfit(value: Any, schema: Any) -> str:
    """Where a value first differs from its schema, as "'key' is 3, not a text"; "" where it fits."""
    if isinstance(schema, tuple):
        faults = [misfit(value, one) for one in schema]
        deep = [fault for fault in faults if not fault.startswith("is ")]  # of the one that it is nearest to
        return "" if "" in faults else [*deep, *faults][0]
    if isinstance(schema, list) and isinstance(value, list):
        return first_misfit((str(i), item, schema[0]) for i, item in enumerate(value))
    if isinstance(schema, dict) and isinstance(value, dict):
        named = {key.removesuffix("?"): kind for key, kind in schema.items() if key is not str}
        for key in named:
            if key in schema and key not in value:  # and not key?
                return f"lacks '{key}'"
        kinds = {key: named.get(key, schema.get(str, object)) for key in value}
        return first_misfit((key, value[key], kind) for key, kind in kinds.items())
    if isinstance(schema, dict | list):
        return f"is not {TOLD[type(schema)]}"
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(schema, Number):
        fits = number and schema.holds(value)
    elif schema is ANY_NUMBER:
        fits = number and (isinstance(value, float) or abs(value) < 2**63)
    elif isinstance(schema, type):
        fits = isinstance(value, schema)
    else:
        fits = type(value) is type(schema) and value == schema
    if fits:
        return ""
    if schema in (dict, list):
        return f"is not {TOLD[schema]}"
    return f"is {shortened(json.dumps(value, default=repr, skipkeys=True))}, not {TOLD.get(schema) or schema}"


def first_misfit(parts) -> str:
    """misfit of the first (name, value, schema) that has one."""
    for name, value, schema in parts:
        if fault := misfit(value, schema):
            return f"'{shortened(name)}' {fault}"
    return ""


def shortened(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
