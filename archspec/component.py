"""The base of every choice a spec can make: a frozen pydantic model, registered by being subclassed.

A *family* is a set of interchangeable choices (attentional biases, gates, tasks, ...); a *kind* is one of them.

    class Bias(Component, family="bias", noun="attentional bias"): ...
    class L2(Bias, kind="l2"): ...

A field annotated with a family's base accepts an instance, a mapping ``{kind: l2, ...}``, or the short form
``l2``; it is validated, dumped and described by the concrete class. (A plain pydantic field of a base type would
drop the fields that only the subclass has, in validation and in dumps, so that two thresholds would share a hash.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, ClassVar, Self, cast

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, Strict, model_validator
from pydantic_core import PydanticCustomError, core_schema

from archspec.errors import nearest, unknown

# YAML already says what is a number and what is text: nothing is converted from one to the other.
Integer = Annotated[int, Strict()]
Count = Annotated[int, Strict(), Field(ge=1)]
Number = Annotated[float, Strict()]
Positive = Annotated[float, Strict(), Field(gt=0)]
Flag = Annotated[bool, Strict()]
Text = Annotated[str, Strict()]


class _Off:
    """ "none" is how YAML says absent: accepted where a value may be left out, and described so."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_before_validator_function(
            lambda value: None if value == "none" else value, handler(source)
        )

    def __get_pydantic_json_schema__(self, schema: core_schema.CoreSchema, handler: Any) -> dict[str, Any]:
        return also(handler(schema), {"const": "none"})


Off = _Off()


def also(schema: dict[str, Any], *others: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON Schema that admits what ``schema`` does and each of ``others``: short forms beside the long."""
    options = schema["anyOf"] if set(schema) == {"anyOf"} else [schema]
    return {"anyOf": [*others, *options]}


@dataclass
class Family:
    """What is known of one family: its base class, its members by kind, and its presets by name."""

    name: str
    noun: str
    base: type[Component]
    default_kind: str | None
    members: dict[str, type[Component]] = field(default_factory=dict)
    presets: dict[str, tuple[str, dict[str, Any]]] = field(default_factory=dict)

    def known(self) -> list[str]:
        """Return every name that can stand as this family's ``kind``, sorted."""
        return sorted([*self.members, *self.presets])


FAMILIES: dict[str, Family] = {}


@dataclass(frozen=True)
class UnknownKey:
    """Stands in for the value of a key that a mapping may not have, so that the error can list those it may."""

    known: tuple[str, ...]


@cache
def _keys(model: type[BaseModel]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Return a model's keys as documents write them, and all that it accepts."""
    names = tuple(info.alias or name for name, info in model.model_fields.items())
    return names, frozenset((*names, *model.model_fields))


class StrictModel(BaseModel):
    """A frozen mapping of a document: unknown keys are errors that know which keys exist.

    Class attributes:
        short_forms: JSON Schemas of what a document may write instead of the mapping.
    """

    short_forms: ClassVar[tuple[dict[str, Any], ...]] = ()

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _mark_unknown_keys(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        names, accepted = _keys(cls)
        return {key: item if key in accepted else UnknownKey(names) for key, item in value.items()}

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: core_schema.CoreSchema, handler: Any) -> dict[str, Any]:
        found = cast(dict[str, Any], handler(schema))
        if not cls.short_forms:
            return found
        resolved = cast(dict[str, Any], handler.resolve_ref_schema(found))
        long = dict(resolved)
        resolved.clear()
        resolved.update(also(long, *cls.short_forms))
        return found


class Component(StrictModel):
    """One choice of one family. Subclass a family's base with ``kind="name"`` to add a choice.

    Class attributes:
        family, kind: where it is registered.
        presets: names that expand to this kind with fields set; explicit fields go on top.
        source: the paper or equation that defines it.
    """

    family: ClassVar[str] = ""
    kind: ClassVar[str] = ""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    source: ClassVar[str] = ""

    def __init_subclass__(
        cls,
        family: str | None = None,
        kind: str | None = None,
        noun: str | None = None,
        default_kind: str | None = None,
        **config: Any,
    ) -> None:
        super().__init_subclass__(**config)
        cls.kind = kind or ""
        if family is not None:
            cls.family = family
            previous = FAMILIES.get(family)
            if previous is not None and not _same_class(previous.base, cls):
                raise TypeError(f"the family {family!r} is already defined by {previous.base.__qualname__}")
            members = previous.members if previous else {}
            FAMILIES[family] = Family(family, noun or family.replace("_", " "), cls, default_kind, members)
        elif kind is not None:
            _register(cls, kind)

    @classmethod
    def is_family_base(cls) -> bool:
        """Say whether this class stands for its whole family rather than for one kind."""
        return cls.family in FAMILIES and FAMILIES[cls.family].base is cls

    @classmethod
    def from_name(cls, name: str) -> Component | None:
        """Give meaning to a bare name that is no kind of this family; None when it has none."""
        return None

    @classmethod
    def from_number(cls, number: float) -> Component | None:
        """Give meaning to a bare number where this family stands; None when it has none."""
        return None

    @classmethod
    def from_list(cls, items: list[Any]) -> Component | None:
        """Give meaning to a bare list where this family stands; None when it has none."""
        return None

    @classmethod
    def infer_kind(cls, mapping: Mapping[str, Any]) -> str | None:
        """Return the kind of a mapping that does not name one; the family's default unless overridden."""
        return FAMILIES[cls.family].default_kind

    @classmethod
    def parse(cls, value: object) -> Self:
        """Validate any accepted form of this family (short form, mapping or instance) into a component.

        Raises:
            pydantic.ValidationError: with one line per problem, located below ``value``.
        """
        return cls.model_validate(value)

    def dump(self) -> dict[str, Any]:
        """Return the plain mapping of this component: its kind first, then every field by its YAML name."""
        return {"kind": self.kind, **self.model_dump(mode="json", by_alias=True)}

    def amended(self, overlay: Component) -> Component:
        """Return this component with the fields that ``overlay`` sets explicitly; another kind replaces it."""
        if overlay.kind != self.kind or overlay.names_its_kind:
            return overlay
        return self.model_copy(update={name: getattr(overlay, name) for name in overlay.model_fields_set})

    def departures(self, names: Iterable[str]) -> list[str]:
        """Return, sorted, those of ``names`` that were set to something other than their default."""
        fields = type(self).model_fields
        return sorted(
            name
            for name in set(names) & self.model_fields_set
            if getattr(self, name) != fields[name].get_default(call_default_factory=True)
        )

    @property
    def names_its_kind(self) -> bool:
        """Whether the document wrote ``kind`` (or its short form) here, which restarts the component."""
        return bool(self.__dict__.get("_named", False))

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        if not cls.is_family_base():
            return handler(source)
        return core_schema.no_info_plain_validator_function(
            cls._dispatch,
            serialization=core_schema.plain_serializer_function_ser_schema(_dump_component),
            metadata={"archspec_family": cls.family},
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: core_schema.CoreSchema, handler: Any) -> dict[str, Any]:
        if cls.is_family_base():
            return {"x-archspec-family": cls.family}
        return cast(dict[str, Any], handler(schema))

    @classmethod
    def _dispatch(cls, value: object) -> Component:
        family = FAMILIES[cls.family]
        if isinstance(value, family.base):
            return value
        shortened = cls._from_short_form(value)
        if shortened is not None:
            return shortened
        if not isinstance(value, Mapping):
            raise PydanticCustomError(
                "component_form",
                "found {found}; required: {noun}, by name or as a mapping with 'kind'; known: {known}.",
                {"found": _describe(value), "noun": family.noun, "known": ", ".join(family.known())},
            )
        kind = value["kind"] if "kind" in value else cls.infer_kind(value)
        if kind is None:
            raise PydanticCustomError(
                "kind_missing",
                "'kind' is missing; known kinds of {noun}: {known}.{hint}",
                {"noun": family.noun, "known": ", ".join(family.known()), "hint": _kind_hint(family, value)},
            )
        if not isinstance(kind, str):
            raise PydanticCustomError("kind_form", "'kind' must be a name, found {found}.", {"found": _describe(kind)})
        return cls._build(kind, {key: item for key, item in value.items() if key != "kind"}, "kind" in value)

    @classmethod
    def _from_short_form(cls, value: object) -> Component | None:
        if isinstance(value, str):
            family = FAMILIES[cls.family]
            if value not in family.members and value not in family.presets:
                named = cls.from_name(value)
                if named is not None:
                    return named
            return cls._build(value, {}, named=True)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return cls.from_number(value)
        if isinstance(value, list | tuple):
            return cls.from_list(list(value))
        return None

    @classmethod
    def _build(cls, kind: str, fields: dict[str, Any], named: bool) -> Component:
        family = FAMILIES[cls.family]
        if kind in family.presets:
            kind, preset = family.presets[kind]
            fields = {**preset, **fields}
        member = family.members.get(kind)
        if member is None:
            raise PydanticCustomError(
                "unknown_kind", "{sentence}", {"sentence": unknown(family.noun, kind, family.known())}
            )
        component = member.model_validate(fields)
        if named and not component.names_its_kind:
            component.__dict__["_named"] = True
        return component

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and isinstance(other, Component) and self._values() == other._values()

    def __hash__(self) -> int:
        return hash((type(self), repr(self._values())))

    def _values(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in type(self).model_fields}

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        yield from ((name, value) for name, value in self._values().items())


def _register(cls: type[Component], kind: str) -> None:
    family = FAMILIES[cls.family]
    previous = family.members.get(kind) or (
        family.members.get(family.presets[kind][0]) if kind in family.presets else None
    )
    if previous is not None and not _same_class(previous, cls):
        raise TypeError(
            f"two components call themselves {family.noun} {kind!r}: {previous.__module__}.{previous.__qualname__} "
            f"and {cls.__module__}.{cls.__qualname__}; rename one"
        )
    family.members[kind] = cls
    for name, fields in cls.presets.items():
        family.presets[name] = (kind, dict(fields))


def _same_class(first: type, second: type) -> bool:
    return (first.__module__, first.__qualname__) == (second.__module__, second.__qualname__)


def _dump_component(value: Any) -> Any:
    return value.dump() if isinstance(value, Component) else value


def _describe(value: object) -> str:
    if value is None:
        return "nothing"
    names = {
        dict: "a mapping",
        list: "a list",
        str: "text",
        bool: "a truth value",
        int: "a number",
        float: "a number",
    }
    noun = next((text for kind, text in names.items() if isinstance(value, kind)), type(value).__name__)
    return noun if isinstance(value, dict | list) else f"{noun} ({value!r})"


def _kind_hint(family: Family, value: Mapping[str, Any]) -> str:
    for key in value:
        if isinstance(key, str) and key in family.known():
            return f" Write 'kind: {key}'."
        hint = nearest(str(key), ["kind"])
        if hint:
            return hint
    return ""
