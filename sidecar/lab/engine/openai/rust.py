"""What vLLM's Rust front end does otherwise than the Python server with names, paths and the engine's memory.

It loads from the folders of VLLM_RUNTIME_LORA_ALLOWED_PATH_PREFIXES only, and tells paths with all links resolved. To
unload an adapter it has the engine remove it; the engine refuses that for one that has left its CPU cache, and then the
name stays.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from sidecar.lab.engine.openai.adapters import Adapters, Copy
from sidecar.lab.engine.openai.errors import INTERNAL, ApiError, internal, not_found
from sidecar.lab.engine.openai.fields import ChatFields, CompletionFields, LoadFields, UnloadFields
from sidecar.lab.engine.spec import EngineSpec

PREFIXES = "VLLM_RUNTIME_LORA_ALLOWED_PATH_PREFIXES"
BODY_BYTES_MAX = 32 << 20
SUBMITTING = "failed to submit completion request: "
COMPLETING, CHATTING = "completion stream failed: ", "chat stream failed: "
"""What stands before the words for a dead engine in an error that is no event."""


class RustAdapters(Adapters):
    """The names in the Rust front end. `remove` has the engine remove a copy; it returns False if that refuses."""

    def __init__(
        self,
        base_names: Sequence[str],
        spec: EngineSpec,
        fail_load: Sequence[str],
        put: Callable[[Copy], Awaitable[None]],
        load_s: float,
        remove: Callable[[Copy], Awaitable[bool]],
        prefixes: Sequence[Path],
    ) -> None:
        super().__init__(base_names, spec, fail_load, put, load_s)
        self._remove = remove
        self._prefixes = prefixes

    async def unload(self, fields: UnloadFields) -> str:
        """Have the engine remove an adapter, then forget its name. Raises ApiError."""
        name = fields.lora_name
        async with self._locks[name]:
            if not name:
                raise ApiError("'lora_name' needs to be provided to unload a LoRA adapter.", param="lora_name")
            copy = self._known(name)
            if not await self._remove(copy):
                raise internal(f"engine rejected removal of LoRA adapter `{name}` with id {copy.number}")
            self._forget(name)
        return f"Success: LoRA adapter '{name}' removed successfully."

    def find(self, model: str | None) -> Copy | None:
        """Return a model's adapter, None for the base model. Raises ApiError for an unknown name."""
        return None if not model or model in self._base_names else self._known(model)

    def _known(self, name: str) -> Copy:
        if name not in self.copies:
            raise not_found(f"The model `{name}` does not exist.", "model")
        return self.copies[name]

    def _check_load(self, fields: LoadFields) -> str:
        for field in ("lora_name", "lora_path"):
            if not getattr(fields, field):
                raise ApiError(f"{field} must not be empty")
        name = fields.lora_name
        if name in self._base_names:
            raise ApiError(f"LoRA adapter `{name}` conflicts with a served base model", param="lora_name")
        path = self._resolved(fields.lora_path)
        if name in self.copies and not fields.load_inplace:
            raise ApiError(
                f"LoRA adapter `{name}` is already loaded. If you want to load the adapter in place, set "
                "'load_inplace' to true.",
                param="lora_name",
            )
        return path

    def _resolved(self, given: str) -> str:
        """Return the path that the engine gets. A name that may be one of a hub's is not checked."""
        path = Path(given)
        if not (path.is_absolute() or given.startswith(("~", ".")) or ".." in path.parts or path.exists()):
            return given
        if not self._prefixes:
            raise _bad_path(f"s require {PREFIXES} to be configured.")
        try:
            allowed = [prefix.resolve(strict=True) for prefix in self._prefixes]
        except FileNotFoundError as error:
            raise internal(f"configured {PREFIXES} path prefix must exist and be accessible") from error
        if not path.is_absolute():
            raise _bad_path(f"s must be absolute and under one of the prefixes configured by {PREFIXES}.")
        try:
            resolved = path.resolve(strict=True)
        except OSError as error:
            raise _bad_path(" must exist and be accessible.") from error
        if not any(resolved.is_relative_to(prefix) for prefix in allowed):
            raise _bad_path(" is outside the configured allowed prefixes.")
        return str(resolved)

    def _not_read(self, name: str, cause: str) -> ApiError:
        told = (
            f"failed to load LoRA adapter `{name}`: utility call `add_lora` failed (call_id=1): Call to add_lora "
            f"method failed: Worker failed with error '{cause}', please check the stack trace above for the root cause"
        )
        return ApiError(told, INTERNAL, "InternalServerError", is_sanitized=False)

    def _no_adapter(self, name: str, path: str) -> ApiError:
        return self._not_read(name, f"Loading lora {name} failed: No adapter found for {path}")


def _bad_path(rest: str) -> ApiError:
    return ApiError(f"Local LoRA adapter path{rest}", param="lora_path")


def check_request(fields: CompletionFields | ChatFields) -> None:
    """Raise ApiError for what this front end does not take and the Python server does."""
    if (fields.n or 1) != 1:
        raise ApiError("Only n=1 is supported.", param="n")
    prompt = getattr(fields, "prompt", None)
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        raise ApiError(
            "Failed to deserialize the JSON body into the target type: prompt: data did not match any variant of "
            "untagged enum Prompt at line 1 column 1",
            kind="Bad Request",
        )
