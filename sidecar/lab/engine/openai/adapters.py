"""The names of adapters in vLLM's API server, and the copies behind them in its engine.

Unloading removes the name only: the copy stays until it is the least recently used one. A name that is loaded again has
another number, and so a second copy.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from sidecar.lab.engine.http.prefix import Owner
from sidecar.lab.engine.openai.errors import ApiError, input_error, internal, not_found
from sidecar.lab.engine.openai.fields import LoadFields, UnloadFields
from sidecar.lab.engine.openai.folder import Adapter, BadAdapter, read_adapter
from sidecar.lab.engine.packed import PackedAdapter
from sidecar.lab.engine.spec import EngineSpec


@dataclass(eq=False)
class Copy:
    """An adapter in the engine: its number there, the path it was read from, and its content.

    `users` counts the requests that use it. A copy with `in_place` is read again for every step. `is_new`
    holds until the engine has taken what the load call read.
    """

    number: int
    name: str
    path: str
    adapter: Adapter | None = field(repr=False)
    in_place: bool = False
    is_new: bool = True
    is_named: bool = False
    users: int = 0
    prefixes: tuple[str, ...] = ("model.",)

    @property
    def owner(self) -> Owner:
        """The key of its blocks in the prefix cache."""
        return self.name, self.path

    @property
    def packed(self) -> PackedAdapter:
        """The factors."""
        assert self.adapter is not None
        return self.adapter.packed

    @property
    def content_id(self) -> int:
        """The number from which dummy answers are made."""
        assert self.adapter is not None
        return self.adapter.content_id

    def drop_if_unused(self) -> None:
        """Forget the tensors once no request can use them again: the name is gone and no request has it."""
        if not self.is_named and not self.users:
            self.adapter = None

    def read(self, spec: EngineSpec) -> None:
        """Read the files again. Raises FileNotFoundError or BadAdapter."""
        self.adapter = read_adapter(self.name, self.path, spec, self.prefixes)


class Adapters:
    """The adapters that have names, and the calls that load and unload them.

    `put` hands a copy to the engine and returns once it has it; it raises ApiError if the engine refuses it. Each load
    takes `load_s` seconds in addition. With `keeps_in_place`, as in 0.32, an adapter that was loaded in place is read
    again for every step.
    """

    is_enabled = True
    keeps_in_place = False
    prefixes: tuple[str, ...] = ("model.",)
    """How the names of the model's modules begin in adapters."""

    def __init__(
        self,
        base_names: Sequence[str],
        spec: EngineSpec,
        fail_load: Sequence[str],
        put: Callable[[Copy], Awaitable[None]],
        load_s: float = 0.0,
    ) -> None:
        self.copies: dict[str, Copy] = {}
        self._base_names = base_names
        self._spec = spec
        self._fail_load = fail_load
        self._put = put
        self._load_s = load_s
        self._numbers = 0
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def load(self, fields: LoadFields) -> str:
        """Give an adapter a name and bring it to the engine; return the message for the client. Raises ApiError."""
        name = fields.lora_name
        async with self._locks[name]:
            path = self._check_load(fields)
            adapter = await asyncio.to_thread(self._read, name, path)
            if self._load_s:
                await asyncio.sleep(self._load_s)
            copy = self._copy_of(name, path, adapter)
            copy.in_place = fields.load_inplace and self.keeps_in_place
            copy.is_named = True
            try:
                await self._put(copy)
            except ApiError:
                copy.is_named = name in self.copies
                copy.drop_if_unused()
                raise
            self.copies[name] = copy
        return f"Success: LoRA adapter '{name}' added successfully."

    async def unload(self, fields: UnloadFields) -> str:
        """Forget a name; return the message for the client. Raises ApiError."""
        name = fields.lora_name
        async with self._locks[name]:
            if not name:
                raise input_error("'lora_name' needs to be provided to unload a LoRA adapter.")
            if name not in self.copies:
                raise not_found(f"The lora adapter '{name}' cannot be found.")
            self._forget(name)
        return f"Success: LoRA adapter '{name}' removed successfully."

    def find(self, model: str | None) -> Copy | None:
        """Return a model's adapter, None for the base model. Raises ApiError for an unknown name."""
        if not model or model in self._base_names:
            return None
        if model not in self.copies:
            aliases = ", ".join(self._base_names)
            raise not_found(f"The model `{model}` does not exist. Valid aliases: {aliases}.", "model")
        return self.copies[model]

    def _forget(self, name: str) -> None:
        copy = self.copies.pop(name)
        copy.is_named = False
        copy.drop_if_unused()

    def _check_load(self, fields: LoadFields) -> str:
        """Return the path that the engine gets."""
        name = fields.lora_name
        if not name or not fields.lora_path:
            raise input_error("Both 'lora_name' and 'lora_path' must be provided.")
        if name in self._base_names:
            raise input_error(f"The lora adapter '{name}' conflicts with a served base model.")
        if name in self.copies and not fields.load_inplace:
            raise input_error(
                f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set "
                "'load_inplace' to True."
            )
        return fields.lora_path

    def _read(self, name: str, path: str) -> Adapter:
        if not self.is_enabled:
            raise self._not_read(name, "LoRA is not enabled. Use --enable-lora to enable LoRA.")
        if name in self._fail_load:
            raise self._not_read(name, "CUDA out of memory.")
        try:
            return read_adapter(name, path, self._spec, self.prefixes)
        except FileNotFoundError as error:
            raise self._no_adapter(name, path) from error
        except BadAdapter as error:
            raise self._not_read(name, str(error)) from error

    def _not_read(self, name: str, cause: str) -> ApiError:
        return worker_failed(cause)

    def _no_adapter(self, name: str, path: str) -> ApiError:
        return not_found(f"Loading lora {name} failed: No adapter found for {path}")

    def _copy_of(self, name: str, path: str, adapter: Adapter) -> Copy:
        """Return a new copy; for a load in place, the changed existing one."""
        there = self.copies.get(name)
        if there is None:
            self._numbers += 1
            return Copy(self._numbers, name, path, adapter, prefixes=self.prefixes)
        there.path, there.adapter, there.is_new = path, adapter, True
        return there


def worker_failed(cause: str) -> ApiError:
    """Return the error for an adapter that the engine refuses without harm to itself."""
    return internal(
        f"Call to add_lora method failed: Worker failed with error '{cause}', please check the stack trace above for "
        "the root cause"
    )
