"""Documents to specs: files, ``extends``, and validation whose errors carry file, line and document path.

Reuse: ``extends: FILE`` in a document; ``extends: NAME`` or ``FILE#BLOCK`` in a block (a bare string does the same).
Mappings merge deeply; writing ``kind`` or its short form restarts that component, leaving it out amends it; lists,
search nodes and ``layout`` replace. At most four levels; ``name`` and ``about`` are not inherited.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from archspec import catalog, legality
from archspec.component import UnknownKey
from archspec.errors import Problem, SpecError, nearest
from archspec.schema import Spec
from archspec.yamltext import LocatedList, LocatedMap, Mark, locate, parse

MAX_EXTENDS = 4
NODE_KEYS = ("choice", "range", "var")
NOT_INHERITED = ("name", "about", "extends")
MODELS = Path(__file__).parent / "specs" / "models"

Model = TypeVar("Model", bound=BaseModel)


def load(source: str | Path | Mapping[str, Any] | Spec) -> Spec:
    """Return the checked spec of a file, a shipped model's name, a mapping, or a spec.

    Raises:
        SpecError: with every problem found, each with file, line and document path.
    """
    if isinstance(source, Spec):
        return source
    if isinstance(source, Mapping):
        return validate(resolve(located(source, "<mapping>"), Path.cwd()))
    path = find(str(source), Path.cwd())
    return validate(resolve(read(path), path.parent))


def loads(text: str, file: str = "<string>", folder: Path | None = None) -> Spec:
    """Return the checked spec of a YAML text; ``extends`` is relative to ``folder``."""
    return validate(resolve(as_document(parse(text, file), file), folder or Path.cwd()))


def find(name: str, folder: Path, problem: Callable[[str], Problem] | None = None) -> Path:
    """Return the file that ``name`` refers to: a path relative to ``folder``, or a shipped model's name.

    Raises:
        SpecError: when there is no such file.
    """
    given = Path(name).expanduser()
    beside = folder / given
    shipped = MODELS / (name if given.suffix else f"{name}.yaml")
    for path in (beside, shipped):
        if path.is_file():
            return path
    known = [path.stem for path in MODELS.glob("*.yaml")]
    message = f"no such file, nor a shipped model of that name.{nearest(given.stem, known)}"
    raise SpecError([problem(f"{name}: {message}") if problem else Problem(name, 0, "", message)])


def read(path: Path) -> LocatedMap:
    """Return the document of a file, with positions, before ``extends``."""
    try:
        text = path.read_bytes()
    except OSError as error:
        message = f"cannot be read: {error.strerror or error}"
        raise SpecError([Problem(_shown(path), 0, "", message)]) from None
    return as_document(parse(text, _shown(path)), _shown(path))


def as_document(data: Any, file: str) -> LocatedMap:
    """Return the data if it is a mapping at the top."""
    if not isinstance(data, LocatedMap):
        found = "nothing" if data is None else "a list" if isinstance(data, list) else "a scalar"
        raise SpecError([Problem(file, 0, "", f"found {found} at the top of the document; required: a mapping.")])
    return data


def located(data: Any, file: str) -> Any:
    """Return plain data as located data without lines, for documents that were never text."""
    if isinstance(data, Mapping):
        found = LocatedMap((file, 0))
        for key, value in data.items():
            found.put(key, located(value, file), (file, 0))
        return found
    if isinstance(data, list | tuple):
        items = LocatedList((file, 0), [located(item, file) for item in data])
        items.marks = [(file, 0)] * len(items)
        return items
    return data


def resolve(document: LocatedMap, folder: Path, trail: tuple[Path, ...] = ()) -> LocatedMap:
    """Return the document with every ``extends`` of it and of its blocks carried out."""
    if "extends" in document:
        path = _target(document, folder, trail)
        base = resolve(read(path), path.parent, (*trail, path))
        inherited = _without(base, NOT_INHERITED)
        document = merge(inherited, _without(document, ("extends",)))
    blocks = document.get("blocks")
    if isinstance(blocks, LocatedMap):
        resolved = _copy(blocks)
        for name in blocks:
            resolved[name] = _resolve_block(blocks, name, folder, trail, ())
        document = _copy(document)
        document["blocks"] = resolved
    return document


def merge(base: Any, over: Any) -> Any:
    """Return ``over`` laid on ``base``; see the module's docstring for what amends and what replaces."""
    if isinstance(base, str) and isinstance(over, LocatedMap) and "kind" not in over and not is_node(over):
        named = LocatedMap(over.mark)
        named.put("kind", base, over.mark)
        base = named
    if not isinstance(base, LocatedMap) or not isinstance(over, LocatedMap):
        return over
    if "kind" in over or is_node(over) or is_node(base):
        return over
    result = _copy(base)
    for key, value in over.items():
        merged = value if key == "layout" or key not in base else merge(base[key], value)
        result.put(key, merged, over.marks.get(key, over.mark))
    return result


def is_node(value: Any) -> bool:
    """Say whether a mapping is a search node: a place where values vary."""
    return isinstance(value, Mapping) and any(key in value for key in NODE_KEYS)


def validate(document: LocatedMap) -> Spec:
    """Return the checked spec of a resolved document.

    Raises:
        SpecError: with every problem of form, or, when the form is right, every problem of legality.
    """
    catalog.load_blocks()
    spec = validated(Spec, document)
    problems = []
    for path, message in legality.check(spec):
        file, line = locate(document, path, document.mark)
        problems.append(Problem(file, line, dotted(path), message))
    if problems:
        raise SpecError(problems)
    return spec


def validated(model: type[Model], document: LocatedMap) -> Model:
    """Return a pydantic model of a located document, its errors turned into located problems."""
    try:
        return model.model_validate(document)
    except ValidationError as error:
        raise SpecError(problems_of(error, document)) from None


def problems_of(error: ValidationError, document: Any, prefix: tuple[str | int, ...] = ()) -> list[Problem]:
    """Return one located problem per error of pydantic, in document order, without its internal tags."""
    found = []
    for item in error.errors():
        path = (*prefix, *item["loc"])
        file, line = locate(document, path, ("<document>", 0))
        found.append(Problem(file, line, dotted(path), _sentence(item)))
    return sorted(set(found))


def dotted(path: tuple[str | int, ...]) -> str:
    """Return a document path as people write it: ``layout.of[1].repeat``."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def _sentence(item: Mapping[str, Any]) -> str:
    kind, found, context = item["type"], item.get("input"), item.get("ctx", {})
    name = str(item["loc"][-1]) if item["loc"] else ""
    if isinstance(found, UnknownKey):
        return f"unknown key {name!r}; known here: {', '.join(sorted(found.known))}.{nearest(name, found.known)}"
    if kind == "missing":
        return f"the required key {name!r} is missing."
    if kind == "literal_error":
        allowed = context.get("expected", "").replace(" or ", ", ").replace("'", "")
        hint = nearest(str(found), allowed.split(", ")) if isinstance(found, str) else ""
        return f"found {_short(found)}; required: one of {allowed}.{hint}"
    message = str(item["msg"])
    if message.startswith("Input should be "):
        return f"found {_short(found)}; required: {message.removeprefix('Input should be ')}."
    return message if message.endswith((".", "?")) else f"{message}."


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a mapping ({', '.join(map(str, value)) or 'empty'})"
    if isinstance(value, list | tuple):
        return "a list"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _resolve_block(blocks: LocatedMap, name: str, folder: Path, trail: tuple[Path, ...], seen: tuple[str, ...]) -> Any:
    block = blocks[name]
    mark = blocks.marks.get(name, blocks.mark)
    if isinstance(block, str):
        reference = LocatedMap(mark)
        reference.put("extends", block, mark)
        block = reference
    if not isinstance(block, LocatedMap) or "extends" not in block:
        return block
    seen = (*seen, name)
    target = block["extends"]
    where = block.marks["extends"]
    path = f"blocks.{name}.extends"
    if not isinstance(target, str):
        raise _problem(where, path, f"found {_short(target)}; required: a block's name or FILE#BLOCK.")
    if len(seen) > MAX_EXTENDS:
        raise _problem(where, path, f"more than {MAX_EXTENDS} levels of extends: {' -> '.join(seen)}.")
    file, hash_mark, block_name = target.partition("#")
    if not hash_mark:
        block_name = target
        if block_name in seen:
            raise _problem(where, path, f"a block extends itself: {' -> '.join([*seen, block_name])}.")
        others: Any = blocks
    else:
        source = find(file, folder, lambda message: Problem(*where, path, message))
        if source in trail or len(trail) >= MAX_EXTENDS:
            raise _problem(where, path, f"{file}: the files extend each other, or more than {MAX_EXTENDS} levels.")
        others = resolve(read(source), source.parent, (*trail, source)).get("blocks")
    if not isinstance(others, LocatedMap) or block_name not in others:
        known = sorted(others) if isinstance(others, LocatedMap) else []
        message = f"no block {block_name!r} in {file or 'this document'}; known: {', '.join(known) or 'none'}."
        raise _problem(where, path, message + nearest(block_name, known))
    base = others[block_name] if hash_mark else _resolve_block(blocks, block_name, folder, trail, seen)
    return merge(base, _without(block, ("extends",)))


def _target(document: LocatedMap, folder: Path, trail: tuple[Path, ...]) -> Path:
    name, mark = document["extends"], document.marks["extends"]
    if not isinstance(name, str):
        raise _problem(mark, "extends", f"found {_short(name)}; required: a file's name.")
    path = find(name, folder, lambda message: Problem(*mark, "extends", message)).resolve()
    if path in trail:
        raise _problem(mark, "extends", f"{name} extends itself: {' -> '.join(p.name for p in (*trail, path))}.")
    if len(trail) >= MAX_EXTENDS:
        raise _problem(mark, "extends", f"more than {MAX_EXTENDS} levels of extends; flatten some.")
    return path


def _problem(mark: Mark, path: str, message: str) -> SpecError:
    return SpecError([Problem(*mark, path, message)])


def _copy(data: LocatedMap) -> LocatedMap:
    result = LocatedMap(data.mark, data)
    result.marks = dict(data.marks)
    return result


def _without(data: LocatedMap, keys: tuple[str, ...]) -> LocatedMap:
    result = _copy(data)
    for key in keys:
        result.pop(key, None)
        result.marks.pop(key, None)
    return result


def _shown(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
