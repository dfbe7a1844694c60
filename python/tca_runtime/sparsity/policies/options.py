"""Options of policies in text, ``FIELD=VALUE,...``: the fields of a policy's dataclass."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from tca_runtime.sparsity.policies.base import SelectionPolicy

_BOOLEANS = {"true": True, "false": False}


def read_options(policy: type[SelectionPolicy], text: str) -> dict[str, Any]:
    """The fields that ``FIELD=VALUE,...`` sets.

    Raises
    ------
    ValueError
        For an unknown field or a value that it cannot have, saying what there is.
    """
    hints = get_type_hints(policy)
    known = {field.name: hints[field.name] for field in fields(policy)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for part in text.split(","):
        name, separator, value = (piece.strip() for piece in part.partition("="))
        if not separator:
            raise ValueError(f"{part.strip()!r} should be OPTION=VALUE")
        if name not in known:
            there = "; ".join(f"{n}: {_values(hint)}" for n, hint in known.items()) or "none"
            raise ValueError(f"there is no option {name!r}; there is {there}")
        if name in values:
            raise ValueError(f"{name} is given twice")
        values[name] = _value(name, value, known[name])
    return values


def _value(name: str, text: str, hint: Any) -> Any:
    problem = f"{name} must be {_values(hint)}, not {text!r}"
    if get_origin(hint) is Literal:
        if text not in get_args(hint):
            raise ValueError(problem)
        return text
    if hint is bool:
        if text not in _BOOLEANS:
            raise ValueError(problem)
        return _BOOLEANS[text]
    try:
        return hint(text)
    except ValueError:
        raise ValueError(problem) from None


def _values(hint: Any) -> str:
    """What a field can be, in words."""
    if get_origin(hint) is Literal:
        return " or ".join(get_args(hint))
    return {bool: "true or false", int: "a whole number", float: "a number"}[hint]
