"""Choose the engines that may answer a request, and write the request for each kind of engine.

An engine with an OpenAI API gets the request as the client sent it. An engine that takes text only gets it as text, a
chat if a template of its model is configured. In a pool of both kinds a request goes to all that can answer it. An
empty pool counts with the facts that its configuration declares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from policies.views import BASE
from sidecar.backends import registry
from sidecar.backends.api import Form, HttpForm, Payload, Prompt
from sidecar.backends.kind import ModelKind, Native
from sidecar.backends.openai.paths import CHAT, COMPLETIONS, ROWS, ApiPath
from sidecar.backends.registry import base_names, model_kind
from sidecar.core import eligibility
from sidecar.core.admission import unknown_adapter
from sidecar.core.facts import EngineFacts
from sidecar.core.state import State
from sidecar.errors import Reason, Refused
from sidecar.fronts.eligible import empty_pools, foreign_id, is_base, restriction_to
from sidecar.fronts.openai.chat_templates import ChatTemplate
from sidecar.fronts.openai.large import Order, Refusal, Template
from sidecar.fronts.openai.request import NotServed, OpenAiRequest, Unfit
from sidecar.fronts.openai.text_forms import TextRequest, text_request
from sidecar.model.reference import Reference
from sidecar.telling.endings import unknown


@dataclass(frozen=True)
class Destination:
    """Where a request goes: `adapter` is its name in the core, "" for the base model; `only` is () for any backend.

    `text` is the request as text, from which answers of text-only engines are made. `is_long` is True if an engine may
    answer to the end of its context, or up to `length_max` tokens where that is given. `length` is the longest that
    engines are asked for, where limits give a length to a request without one.
    """

    adapter: str
    payload: Payload
    only: tuple[str, ...]
    text: TextRequest | None
    is_long: bool = False
    length_max: int | None = None
    length: int | None = None


@dataclass(frozen=True)
class Engine:
    """A backend, or a pool that is empty at the moment; `group` is the name by which its template is configured."""

    id: str
    group: str
    facts: EngineFacts

    @property
    def model(self) -> ModelKind:
        return model_kind(self.facts.kind)

    def why_no_path(self, row: ApiPath) -> str:
        """Return why it does not serve a path; "" if it does."""
        return why_no_path(self.model, row, self.facts.paths)


class Destinations:
    """Finds the destination of requests.

    `templates` are by backend or pool; `may_stream(kind)` returns True if engines of a kind stream.
    """

    def __init__(self, state: State, templates: Mapping[str, ChatTemplate], may_stream: Callable[[str], bool]) -> None:
        self._state = state
        self._templates = templates
        self._may_stream = may_stream

    def order(self, path: str, size_bytes: int, prompts_max: int, bytes_max: int) -> Order:
        """Return the order to read a large body, and to write it as text in every way that may be needed."""
        templates = tuple(
            None if template is None else Template.of(template) for template in self._text_templates(path == CHAT)
        )
        tokens_assumed, takers = self._state.config.output_tokens_assumed, filter(_takes_text, self._models())
        streams = self._streams([model.name for model in takers])
        kinds = registry.elsewhere()
        return Order(path, size_bytes, prompts_max, bytes_max, templates, tokens_assumed, streams, kinds)

    def place(
        self,
        asked: OpenAiRequest,
        tenant: str,
        length_max: int | None,
        texts: Sequence[TextRequest | Refusal] | None = None,
        limited: int | None = None,
        salt: str | None = None,
    ) -> Destination:
        """Return where a tenant's request goes; `texts` are the results of an order of ours.

        `length_max` bounds the tokens of a request without a length, where an engine would fill its context; `limited`
        bounds them at every engine; `salt` is put in where it is known.
        Raises Refused for an unknown name, or if no engine that has the name can answer.
        """
        adapter, servers = self._servers(asked.model, tenant)
        servers = self._with_path(servers, asked.row)
        kinds = {backend.facts.kind for backend in servers}
        forms: dict[str, Form] = {}
        fitting: list[str] = []
        why_not: Refused | None = None
        models = [backend.model for backend in servers] or registry.models().values()
        is_long = False
        if asked.has_length:
            limited = None
        lengths: list[int] = []
        for model in models:
            if model.native is not Native.OPENAI:
                continue
            member, reason = model.why_not_client(asked.path, asked.members)
            if reason:
                why_not = Unfit(member, reason)
                continue
            is_open = model.long_by_default and not asked.has_length
            is_long = is_long or is_open
            length = length_max if is_open else None
            if limited is not None:
                length = min(each for each in (limited, length, None if is_open else asked.max_tokens) if each)
                lengths.append(length)
            before, after = asked.around(length, salt if asked.path in model.salted else None)
            forms[model.name] = HttpForm(asked.row.at_engine, before, after, asked.model, asked.streams)
        for backend in servers:
            if backend.facts.kind not in forms:
                continue
            if unknown := foreign_id(backend.facts, lambda: asked.id_range):
                why_not = Unfit(asked.row.prompt, unknown)
            else:
                fitting.append(backend.id)
        text = None
        takers = [backend for backend in servers if _takes_text(backend.model)] if asked.row.as_text else []
        if takers:
            try:
                text, takers = self._as_text(asked, takers, texts, limited)
                forms |= text.forms
                if limited is not None:
                    lengths.append(text.max_tokens)
                fitting += [backend.id for backend in takers if backend.facts.kind in forms]
                unfit = (text.why_not.get(backend.facts.kind, "") for backend in takers)
                why_not = why_not or Refused(Reason.INVALID_REQUEST, next(filter(None, unfit), ""))
            except Refused as refused:
                why_not = why_not or refused
        if servers and not fitting:
            raise why_not or Refused(Reason.INVALID_REQUEST, _other_kinds(kinds))
        kind = next(iter(forms))
        payload = Payload(
            asked.model, forms.pop(kind), raw=True, unary=False, kind=kind, forms=forms, prompt=Prompt.TEXT
        )
        only = restriction_to(self._state, fitting) if fitting else ()
        return Destination(
            adapter, payload, only, text, is_long, length_max if is_long else None, max(lengths, default=None)
        )

    def is_base(self, model: str) -> bool:
        """Return True if a model's name means a base model."""
        return is_base(self._state, model)

    def _servers(self, model: str, tenant: str) -> tuple[str, tuple[Engine, ...]]:
        """Return the core's name for a model and the engines that can serve it, those of empty pools included."""
        state = self._state
        text = Reference.of(model).name
        name = state.names.get(text)
        if name is not None:  # only tenants that may use it are told what its engines cannot answer
            return model, self._serving(name.digest) if name.is_for(tenant) else ()
        serving = self._serving(BASE)
        named_so = tuple(engine for engine in serving if model in base_names(engine.facts))
        if is_base(state, model):
            if not state.config.base_requests:
                raise Unfit(
                    "model",
                    f'"{model}" is the base model and this sidecar serves adapters only (base_requests: refuse); '
                    'name an adapter in "model"',
                )
            return "", named_so or serving
        raise unknown(unknown_adapter(state, text, tenant))

    def _with_path(self, servers: tuple[Engine, ...], row: ApiPath) -> tuple[Engine, ...]:
        """Return the engines that serve a path, those that take nothing now if no other does.

        Raises Refused (501) if there are engines, and none serves it.
        """
        found = tuple(engine for engine in servers if not engine.why_no_path(row))
        if found or not servers:
            return found
        all_of_them = [Engine(each.id, each.group, each.facts) for each in self._state.backends.values()]
        if found := tuple(engine for engine in all_of_them if not engine.why_no_path(row)):
            return found
        # The reason of an engine of a kind that could have it helps most.
        engine = max(servers, key=lambda each: row.path in each.model.paths)
        raise NotServed(f"{row.path} is not served for this model: {engine.why_no_path(row)}")

    def _serving(self, version: str) -> tuple[Engine, ...]:
        present = [
            Engine(backend.id, backend.group, backend.facts) for backend in eligibility.servers_of(self._state, version)
        ]
        pools = [Engine(pool, pool, facts) for pool, facts in empty_pools(self._state)]
        return (*present, *(pool for pool in pools if eligibility.may_come(self._state, version, (pool.id,))))

    def _as_text(
        self,
        asked: OpenAiRequest,
        takers: list[Engine],
        texts: Sequence[TextRequest | Refusal] | None,
        limited: int | None,
    ) -> tuple[TextRequest, list[Engine]]:
        """Return the request as text, and the engines that take exactly this text."""
        template = None
        if asked.is_chat:
            with_template = [backend for backend in takers if backend.group in self._templates]
            if not with_template:
                raise _no_template(takers[0].id)
            template = self._templates[with_template[0].group]
            takers = [backend for backend in with_template if self._templates[backend.group] == template]
        if texts is None:
            streams = self._streams([backend.facts.kind for backend in takers])
            return text_request(asked, template, self._state.config.output_tokens_assumed, streams, limited), takers
        text = texts[self._text_templates(asked.is_chat).index(template)]
        if isinstance(text, Refusal):
            raise text.error
        if limited is not None and text.max_tokens > limited:  # written before the limits of its model were known
            raise Unfit("max_tokens", f"the request names no length; set max_tokens, to {limited:,} at most")
        return text, takers

    def _text_templates(self, is_chat: bool) -> list[ChatTemplate | None]:
        """Return the distinct chat templates that a text may need; for a prompt [None], or [] if none takes text."""
        if is_chat:
            distinct: list[ChatTemplate | None] = []
            for template in self._templates.values():
                if template not in distinct:
                    distinct.append(template)
            return distinct
        return [None] if any(map(_takes_text, self._models())) else []

    def _models(self) -> Iterator[ModelKind]:
        return (model_kind(facts.kind) for facts in registry.engines_of(self._state))

    def _streams(self, kinds: Sequence[str]) -> dict[str, bool]:
        """Return for these kinds of model and their siblings whether they stream: a server may have any sibling."""
        if not kinds:
            return {}
        return {model.name: self._may_stream(model.name) for model in registry.siblings(kinds) if _takes_text(model)}


def served_paths(state: State) -> frozenset[str]:
    """Return the paths that some engine serves, and completions and chats, which any kind has."""
    engines = [Engine(each.id, each.group, each.facts) for each in state.backends.values()]
    return frozenset(
        row.path for row in ROWS.values() if row.as_text or any(not each.why_no_path(row) for each in engines)
    )


def why_no_path(model: ModelKind, row: ApiPath, paths: tuple[str, ...] | None = None) -> str:
    """Return why an engine that has told these paths does not serve one; "" if it does, or if that is not known."""
    if _takes_text(model):
        return "" if row.as_text else f"{model.title} has no such path"
    if model.native is Native.OPENAI and row.path not in model.paths:
        return model.why_no_path.get(row.path, f"the sidecar does not serve it in front of {model.title}")
    if paths is not None and row.path not in paths:
        served = "generate" if COMPLETIONS in paths else "pool"
        return f"its {model.title} does not have this path; it was started to {served}, and has {', '.join(paths)}"
    return ""


def _takes_text(model: ModelKind) -> bool:
    """Return True if a model gets a text of ours instead of the client's own request."""
    return model.native is not Native.OPENAI and model.asking is not None and Prompt.TEXT in model.asking.prompts


def _no_template(backend: str) -> Unfit:
    return Unfit(
        "messages",
        f"{backend} takes text only and no chat template is configured for it; send a prompt to /v1/completions, or "
        "set backends[].base_model.chat_template to a Jinja2 file or the model's tokenizer_config.json",
    )


def _other_kinds(kinds: set[str]) -> str:
    return f"the backends that serve it ({', '.join(sorted(kinds))}) are of kinds that the OpenAI API cannot ask"
