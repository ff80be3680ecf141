"""The kinds of backends, and a configuration's backends as their kinds read them.

A kind is a line in `KINDS`. Another package's dialect of the OpenAI family makes a kind, too: a configuration names it
as `kind: package.module:DIALECT`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from typing import Any, TypeVar

from pydantic import ValidationError

from sidecar.backends.kind import Kind, ModelKind, Native
from sidecar.backends.openai.dialect import Dialect
from sidecar.backends.openai.kind import kind_of_dialect
from sidecar.config import Config, plugins
from sidecar.config.backends import Backend as Entry
from sidecar.config.redis_address import without_users
from sidecar.config.section import one_spelling, problems
from sidecar.core.facts import EngineFacts
from sidecar.core.state import State
from sidecar.errors import Misused, Reason

T = TypeVar("T")

KINDS = {
    "triton": "sidecar.backends.triton.kind:TRITON",
    "vllm": "sidecar.backends.openai.vllm:DIALECT",
    "trtllm": "sidecar.backends.openai.trtllm:DIALECT",
    "sglang": "sidecar.backends.openai.sglang:DIALECT",
}
_from_elsewhere: dict[str, Kind] = {}
"""The kinds of other packages' dialects that a configuration has named in this process."""


def kinds() -> list[Kind]:
    """Return our kinds, and those of other packages' dialects that a configuration has named, each once."""
    return list(dict.fromkeys((*map(kind_named, KINDS), *_from_elsewhere.values())))


def elsewhere() -> tuple[str, ...]:
    """Return the names of other packages' dialects in this process, for `kind_named` in another process."""
    return tuple(_from_elsewhere)


def kind_named(name: str) -> Kind:
    """Return a kind by its name, or that of a dialect by `package.module:DIALECT`. Raises Misused.

    A dialect that was once named by its module is also known by its name.
    """
    if name in KINDS:
        return _ours(name, KINDS[name])
    known = _from_elsewhere.get(name) or next((kind for kind in _from_elsewhere.values() if kind.name == name), None)
    if known is None:
        if ":" not in name:
            why = f'there is no kind of backend "{name}"; there are {", ".join(KINDS)}'
            raise Misused(Reason.CONFIG_INVALID, f"{why}, or name a dialect as package.module:DIALECT")
        known = _of_dialect(name)
    _from_elsewhere[name] = known
    return known


def _of_dialect(name: str) -> Kind:
    """Return the kind of another package's dialect. Raises Misused, also where requests would go to others' engines."""
    dialect = _dialect(name)
    wrong = _unusable(dialect)
    if not wrong and (known := _known(dialect)) is not None:
        return known  # by another of its names
    for other in () if wrong else kinds():
        schemes = dialect.section.SCHEMES.keys() & other.section.SCHEMES.keys()
        if schemes or dialect.model.name in {other.name, *(model.name for model in other.models)}:
            wrong = f'it has a scheme or its name in common with the kind "{other.name}"; one of them needs another'
    if wrong:
        raise Misused(Reason.CONFIG_INVALID, f'the dialect "{name}": {wrong}')
    kind = kind_of_dialect(dialect)
    return replace(
        kind,
        declare=_guarded(name, kind.declare),
        connect=_guarded(name, kind.connect),
        notes=_guarded(name, kind.notes),
    )


def _known(dialect: Dialect) -> Kind | None:
    """Return the kind of a dialect that is known by another path; None if it is new."""
    for name, kind in _from_elsewhere.items():
        if ":" in name and _dialect(name) is dialect:
            return kind
    return next((kind for kind in kinds() if kind is kind_of_dialect(dialect)), None)


def _dialect(name: str) -> Any:
    """Return the value that `package.module:DIALECT` names. Raises Misused."""
    return plugins.imported(f'the dialect "{name}"', name)


def _unusable(dialect: Any) -> str:
    """Return why a value cannot be a dialect; "" if it can."""
    if isinstance(dialect, type) and issubclass(dialect, Dialect):
        return f"it is a class; name a value, DIALECT = {dialect.__name__}()"
    if not isinstance(dialect, Dialect):
        return "it is not a sidecar.backends.openai.dialect.Dialect"
    missing = [name for name in ("model", "section", "start") if not hasattr(dialect, name)]
    if missing:
        return f"it has no {' and no '.join(missing)}"
    known = {name for name in dir(Dialect) if not name.startswith("_")} | {"model", "section", "start"}
    for name in sorted({name for name in dir(dialect) if not name.startswith("_")} - known):
        if near := difflib.get_close_matches(name, known, n=1, cutoff=0.85):
            return f'it has "{name}", which no dialect has: did you mean "{near[0]}"?'
    section = dialect.section
    if not (isinstance(section, type) and issubclass(section, Entry)):
        return "its section is not a subclass of config.backends.Backend"
    if next(iter(section.SCHEMES), "") != dialect.model.name:
        return f"the first of {section.__name__}.SCHEMES must be the name of its model ({dialect.model.name!r})"
    if not (dialect.carries or dialect.model.reads_files) and type(dialect).send is Dialect.send:
        return "its model does not say reads_files=True, and it has no send(): no adapter can get to its servers"
    if dialect.carries and "lora_config" not in section.model_fields:
        return "it carries adapters, so its section must be a subclass of TrtllmEntry"
    return ""


def _guarded(name: str, function: Callable[..., T]) -> Callable[..., T]:
    """Return a function of another package that raises Misused where it fails, naming the dialect and the place."""

    def call(*given: Any) -> T:
        try:
            found = function(*given)
            return iter([*found]) if isinstance(found, Iterator) else found  # type: ignore[return-value]
        except (Misused, ValidationError):
            raise
        except Exception as error:
            what = f'the dialect "{name}" has failed in {function.__name__.removeprefix("_")}'
            raise Misused(Reason.CONFIG_INVALID, f"{what}: {plugins.told(error)}") from error

    return call


@cache
def _ours(name: str, target: str) -> Kind:
    found: Any = plugins.imported(f'the backend kind "{name}"', target)
    return kind_of_dialect(found) if isinstance(found, Dialect) else found


def models() -> Mapping[str, ModelKind]:
    """Return every kind of model by name."""
    return _models(tuple(kinds()))


@cache
def _models(kinds: tuple[Kind, ...]) -> Mapping[str, ModelKind]:
    return {model.name: model for kind in kinds for model in kind.models}


def model_kind(name: str) -> ModelKind:
    """Return the kind of model by the name in `EngineFacts.kind`; for an unknown name, one that has only its name."""
    return _model_kind(name, len(KINDS), len(_from_elsewhere))


def base_names(facts: EngineFacts) -> tuple[str, ...]:
    """Return the names by which clients may ask for an engine's base model."""
    return (*facts.base_models, *(facts.models if model_kind(facts.kind).native is Native.OPENAI else ()))


def engines_of(state: State) -> Iterator[EngineFacts]:
    """Yield the facts of each engine, and those that each pool declares."""
    yield from (backend.facts for backend in state.backends.values())
    yield from state.config.pools.values()


def is_base_model(state: State, name: str) -> bool:
    """Return True if an engine's base model has a name."""
    return any(name in base_names(facts) for facts in engines_of(state))


@lru_cache(maxsize=256)
def _model_kind(name: str, ours: int, elsewhere: int) -> ModelKind:
    """Cached, because fronts ask for each engine of a pool with every request; the counts change with the kinds."""
    return models().get(name) or ModelKind(name, name)


def kind_of(model: str) -> Kind | None:
    """Return the kind whose backends have this kind of model; None for an unknown name."""
    return next((kind for kind in kinds() if any(model == one.name for one in kind.models)), None)


def url_of(name: str, address: str) -> str:
    """Return the URL that configures a backend, from its kind of model and its address as operators see it."""
    protocol, separator, host = address.rpartition("://")
    kind = kind_of(name)
    schemes = {} if kind is None else kind.section.SCHEMES
    secure = bool(separator) and protocol == "https"
    return f"{next((scheme for scheme, has_tls in schemes.items() if has_tls == secure), name)}://{host}"


def siblings(names: Sequence[str]) -> list[ModelKind]:
    """Return the kinds of model that engines of these kinds may turn out to have; all kinds if `names` is empty."""
    return [
        model for kind in kinds() if not names or any(one.name in names for one in kind.models) for model in kind.models
    ]


def written_for(rank: Callable[[str], int | None]) -> ModelKind:
    """Return the kind of model for which a KServe request is written, by the rank of its inputs."""
    natives = _of_kserve(len(KINDS), len(_from_elsewhere))
    for model in natives:
        if model.recognises is not None and model.recognises(rank):
            return model
    return natives[0]


@lru_cache
def _of_kserve(ours: int, elsewhere: int) -> tuple[ModelKind, ...]:
    """Cached as `_model_kind`."""
    return tuple(model for model in models().values() if model.native is Native.KSERVE)


def urls(of: Callable[[Kind], bool] = lambda kind: True) -> str:
    """Return the form of each kind's URL, for people; `of` selects kinds."""
    schemes = [scheme for kind in filter(of, kinds()) for scheme, secure in kind.section.SCHEMES.items() if not secure]
    return " or ".join(f"{scheme}://HOST:PORT" for scheme in schemes)


def entries_of(config: Config, source: str = "") -> tuple[Entry, ...]:
    """Return a configuration's backends, each as its kind reads it.

    Raises Misused naming each wrong key, its value and what is expected; `source` is where they are written.
    """
    found: list[Entry] = []
    wrong: list[str] = []
    for number, record in enumerate(config.backends):
        within = ("backends", str(number))
        try:
            kind = _kind_of_entry(record)
            section = Entry if kind is None else kind.section
            found.append(section.model_validate(_own(section, record)))
        except ValidationError as error:
            wrong += problems(error, section, within)
        except Misused as error:
            wrong.append(f"{'.'.join(within)}: {error.message}")
        except ValueError as error:
            wrong.append(f"{'.'.join(within)}{error}")
    if not wrong:
        wrong += _clashes([entry.identity for entry in found], [entry.identity for entry in found if entry.discover])
        wrong += _doubled(found)
    if wrong:
        raise Misused(Reason.CONFIG_INVALID, f"{source}: {'; '.join(wrong)}" if source else "; ".join(wrong))
    return tuple(found)


def full_record(config: Config) -> dict[str, Any]:
    """Return a configuration as JSON with all defaults, also of its backends. Raises Misused."""
    return config.model_dump(mode="json") | {"backends": [each.model_dump(mode="json") for each in entries_of(config)]}


def _kind_of_entry(record: Mapping[str, Any]) -> Kind | None:
    """Return the kind that an entry names; None if it names none. Raises ValueError with the rest of a problem's line,
    or Misused.
    """
    named, url = record.get("kind"), str(record.get("url") or "")
    if named is not None:
        try:
            return kind_named(str(named))
        except Misused as unknown:
            raise ValueError(f".kind: {unknown.message}") from unknown
    scheme, separator, _ = url.partition("://")
    for kind in kinds() if separator else ():
        if scheme in kind.section.SCHEMES:
            return kind
    if url:
        others = "for another package's dialect, name it: kind: package.module:DIALECT"
        raise ValueError(f".url: it must be of the form {urls()} (it is {without_users(url)!r:.80}); {others}")
    if record.get("discover") is not None:
        raise ValueError(f": discover needs a kind: {' or '.join(KINDS)}")
    return None


def _own(section: type[Entry], record: Mapping[str, Any]) -> dict[str, Any]:
    """Return an entry without other kinds' keys at their defaults, which a full record has."""
    others = [kind.section.model_fields for kind in kinds() if kind.section is not section]

    def is_anothers_default(key: str, value: Any) -> bool:
        return any(key in fields and (value is None or value == _plain(fields[key].default)) for fields in others)

    return {
        key: value
        for key, value in record.items()
        if key in section.model_fields or not is_anothers_default(key, value)
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _doubled(entries: Sequence[Entry]) -> Iterator[str]:
    """Yield the pairs of entries that are one engine: each would send as much as the engine takes."""
    seen: dict[tuple[str, ...], Entry] = {}
    for entry in entries:
        if entry.discover is None:
            address, *model = entry.place
            first = seen.setdefault((one_spelling(address), *model), entry)
            if first is not entry:
                urls = ", ".join(dict.fromkeys((first.url, entry.url)))
                yield f"{first.identity} and {entry.identity} are one engine ({urls}); take one of them out"


def _clashes(ids: Sequence[str], pools: Sequence[str]) -> Iterator[str]:
    for identity in ids:
        if ids.count(identity) > 1:
            yield f"two backends have the id {identity}; give one another with id"
            return
    for pool in pools:
        for identity in ids:
            if identity.startswith(f"{pool}-"):
                yield f"{identity} could be an engine of the pool {pool}; give one another id"
