"""Dataclasses to JSON and back, every name and type checked."""

import dataclasses
import math
import types
import typing
from typing import Annotated, Any, Literal, TypeVar

from moe.config import require

C = TypeVar("C")


def to_dict(config: Any) -> dict[str, Any]:
    return dataclasses.asdict(config)


def from_dict(kind: type[C], values: Any, where: str = "config") -> C:
    """Build a dataclass from parsed JSON, checking every name and type. Raises ConfigError naming the field."""
    require(isinstance(values, dict), f"{where}: expected an object, found {type(values).__name__}")
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    require(not unknown, f"{where}: unknown field {', '.join(map(repr, unknown))}")
    unset = (dataclasses.MISSING, dataclasses.MISSING)
    needed = [item.name for item in dataclasses.fields(kind) if (item.default, item.default_factory) == unset]  # type: ignore[arg-type]
    missing = [name for name in needed if name not in values]
    require(not missing, f"{where}: missing field {', '.join(map(repr, missing))}")
    return kind(**{name: _typed(hints[name], value, f"{where}.{name}") for name, value in values.items()})


def _typed(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, where)
    if typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) is tuple:
        require(isinstance(value, list | tuple), f"{where} = {value!r} must be a list")
        return tuple(_typed(typing.get_args(hint)[0], item, f"{where}[{at}]") for at, item in enumerate(value))
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    choices: list[Any] = []  # values as they stand
    kinds: list[type] = []
    for option in typing.get_args(hint) if union else (hint,):
        literal = typing.get_origin(option) is Literal
        (choices if literal else kinds).extend(typing.get_args(option) if literal else [option])
    if float in kinds and type(value) is int:
        value = float(value) if abs(value) < 1e300 else math.inf
    among = [f"one of {', '.join(map(str, choices))}"] if choices else []
    allowed = " or ".join([*among, *(f"of type {kind.__name__}" for kind in kinds)])
    require(type(value) in kinds or value in choices, f"{where} = {value!r} must be {allowed}")
    return value
