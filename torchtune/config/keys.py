"""What a params class says about its keys: type, default, bounds, one line. Help, schema and messages read it here."""

from __future__ import annotations

import builtins
import dataclasses
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

_NAMES: dict[Any, str] = {
    str: "text",
    int: "int",
    float: "number",
    bool: "true or false",
    type(None): "null",
    Any: "anything",
    dict: "mapping",
    list: "list",
}
_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


class ComponentMark:
    """In a type's metadata: a mapping with `_component_`."""


@dataclass(frozen=True)
class Type:
    """An annotation taken apart.

    Attributes:
        members: the types of a union, or the one type; without what `Annotated` adds.
        metadata: what `Annotated` and `Field` add to any of them.
    """

    members: tuple[Any, ...]
    metadata: tuple[Any, ...]

    @property
    def is_component(self) -> bool:
        """Whether it is a mapping that names a callable."""
        return any(isinstance(mark, ComponentMark) for mark in self.metadata)

    @property
    def nested(self) -> type | None:
        """The params class that a mapping here is read as."""
        return next((member for member in self.members if is_params_class(member)), None)

    @property
    def plain(self) -> frozenset[Any]:
        """The scalar types among its members, `str` for a path; choices count as their values' types."""
        found: set[Any] = set()
        for member in self.members:
            if get_origin(member) is Literal:
                found.update(type(choice) for choice in get_args(member))
            elif isinstance(member, type) and member.__name__ in ("Path", "PurePath"):
                found.add(str)
            elif member is Any or member in (str, int, float, bool, type(None)):
                found.add(member)
        return frozenset(found)

    @property
    def choices(self) -> list[Any]:
        """The values of all `Literal` members."""
        return [value for member in self.members if get_origin(member) is Literal for value in get_args(member)]

    def item(self, origins: Sequence[Any]) -> Type | None:
        """The type of the items of a member such as `list[X]` or `dict[str, X]`."""
        for member in self.members:
            if get_origin(member) in origins and get_args(member):
                args = [arg for arg in get_args(member) if arg is not ...]
                return take_apart(args[-1])
        return None

    def __str__(self) -> str:
        if self.is_component:
            return "component" + (" or null" if type(None) in self.members else "")
        parts = [self._member_text(member) for member in self.members]
        if bounds := self._bounds():
            numeric = next((i for i, member in enumerate(self.members) if member in (int, float)), 0)
            parts[numeric] += f" {bounds}"
        return " or ".join(parts)

    def _member_text(self, member: Any) -> str:
        if get_origin(member) is Literal:
            return " | ".join(str(choice) for choice in get_args(member))
        if is_params_class(member):
            short = shorthand(member)
            return f"{short}, or mapping" if short else "mapping"
        if get_origin(member) in (list, tuple, set):
            items = [str(take_apart(arg)) for arg in get_args(member) if arg is not ...]
            return f"list of {items[0]}" if len(set(items)) == 1 else f"list [{', '.join(items)}]"
        return _NAMES.get(get_origin(member) or member, getattr(member, "__name__", str(member)))

    def _bounds(self) -> str:
        found = []
        for mark in self.metadata:
            found += [f"{sign} {getattr(mark, name):g}" for name, sign in _BOUNDS.items() if hasattr(mark, name)]
        return " and ".join(found)


@dataclass(frozen=True)
class Key:
    """One key of a params class.

    Attributes:
        name: its own name, without those of the mappings around it.
        owner: the class that declares it.
    """

    name: str
    type: Type
    field: FieldInfo
    owner: builtins.type

    @property
    def required(self) -> bool:
        """Whether there is no default."""
        return self.field.is_required()

    @property
    def description(self) -> str:
        """The one line that says what it does."""
        return self.field.description or ""

    @property
    def default(self) -> Any:
        """The default value; None when required."""
        return None if self.required else self.field.get_default(call_default_factory=True, validated_data={})


def is_params_class(annotation: Any) -> bool:
    """Whether it is a pydantic dataclass."""
    return isinstance(annotation, type) and hasattr(annotation, "__pydantic_fields__")


def shorthand(cls: type, value: Any = None) -> str | None:
    """The key that a value standing for the whole mapping is given to; lists of mappings may have one of their own."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return getattr(cls, "list_shorthand", None)
    return getattr(cls, "shorthand", None)


def take_apart(annotation: Any, metadata: Sequence[Any] = ()) -> Type:
    """Flatten `Annotated` and unions."""
    members: list[Any] = []
    marks = list(metadata)
    if get_origin(annotation) is Annotated:
        return take_apart(annotation.__origin__, [*_flat(annotation.__metadata__), *metadata])
    if get_origin(annotation) in (Union, types.UnionType):
        for part in get_args(annotation):
            inner = take_apart(part)
            members += inner.members
            marks += inner.metadata
        return Type(tuple(members), tuple(marks))
    return Type((annotation,), tuple(marks))


def _flat(metadata: Sequence[Any]) -> Iterator[Any]:
    for mark in metadata:
        if isinstance(mark, FieldInfo):
            yield from mark.metadata
        else:
            yield mark


def keys_of(cls: Any) -> dict[str, Key]:
    """The keys of a params class, in the order of their declaration, the class's own after those it inherits."""
    keys = {}
    for name, info in cls.__pydantic_fields__.items():
        owner = next(base for base in reversed(cls.__mro__) if name in getattr(base, "__dataclass_fields__", {}))
        keys[name] = Key(name, take_apart(info.annotation, info.metadata), info, owner)
    return keys


def all_keys(cls: type, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Key]]:
    """Every key, those of nested mappings below theirs, with its path."""
    for name, key in keys_of(cls).items():
        yield (*prefix, name), key
        if key.type.nested is not None:
            yield from all_keys(key.type.nested, (*prefix, name))


def as_plain(value: Any) -> Any:
    """A value as YAML can hold it: dataclasses as mappings, tuples and sets as lists, paths and enums as text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): as_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [as_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)
