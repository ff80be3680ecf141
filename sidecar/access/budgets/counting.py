"""Count the tokens of prompts in text, by the tokenizers of their models.

An engine's tokenizer is the library `tokenizers`, with the model's `tokenizer.json`; the same ones are used here (extra
`tokenizer`). A kilobyte takes some milliseconds, so texts are counted in a thread while their requests
wait and run: what is reserved when they come is an expectation, what is charged at their end is the count.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sidecar.errors import Misused, Reason, needs_extra
from sidecar.files import read_regular_or_piped

FILE = "tokenizer.json"
FILE_BYTES_MAX = 256 << 20
"""Those of large vocabularies have some 30 MB."""
WAITING_CHARACTERS_MAX = 16 << 20
"""Further texts are not counted while so much waits to be: they stay estimates."""


class PromptCounter:
    """Counts prompts. `files` are the tokenizers, by all names of their base models.

    Raises Misused(CONFIG_INVALID) naming a file that cannot be read, or the missing extra.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads for batches warn in processes that fork
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise Misused(Reason.CONFIG_INVALID, needs_extra("base_model.tokenizer", "tokenizer")) from error
        read: dict[Path, Tokenizer] = {}
        for path in set(files.values()):
            file = path / FILE if path.is_dir() else path
            try:
                read[path] = Tokenizer.from_str(read_regular_or_piped(file, FILE_BYTES_MAX).decode())
            except (OSError, UnicodeDecodeError) as error:
                why = error.strerror if isinstance(error, OSError) else error
                raise Misused(Reason.CONFIG_INVALID, f"tokenizer {file}: {why}") from error
            except Exception as error:  # the library raises nothing narrower
                raise Misused(Reason.CONFIG_INVALID, f"tokenizer {file} is no {FILE}: {error}") from error
        self._by_model = {name: read[path] for name, path in files.items()}
        self._only = next(iter(read.values())) if len(read) == 1 else None
        self._threads = ThreadPoolExecutor(1, "prompts")
        self._waiting_characters = 0

    def count(self, base_model: str, text: str, tell: Callable[[int], None]) -> asyncio.Future[int] | None:
        """Count a text's tokens and call `tell` with them, in this event loop; never if the model has no tokenizer.

        The tokens that begin a text count, as they do in engines. A model without a name here has the only tokenizer.
        Returns what is done then, or None.
        """
        tokenizer = self._by_model.get(base_model, self._only)
        if tokenizer is None or self._waiting_characters + len(text) > WAITING_CHARACTERS_MAX:
            return None
        self._waiting_characters += len(text)

        def tokens() -> int:
            # A batch of one: `encode` would keep Python's lock, and so the event loop, until it is done.
            return len(tokenizer.encode_batch_fast([text])[0].ids)

        counting = asyncio.get_running_loop().run_in_executor(self._threads, tokens)

        def counted(future: asyncio.Future[int]) -> None:
            self._waiting_characters -= len(text)
            if not future.cancelled() and future.exception() is None:
                tell(future.result())

        counting.add_done_callback(counted)
        return counting

    def close(self) -> None:
        """Count nothing further."""
        self._threads.shutdown(wait=False, cancel_futures=True)
