"""Bodies for the OpenAI API, good ones and those that JSON readers disagree about."""

from __future__ import annotations

import json
import random
from typing import Any

MODELS = ("sql", "sql@v1", "chat", "chef", "s\\u0071l", "sql\\u0000", "nobody", "")
ODD: tuple[Any, ...] = (None, True, 0, -1, 1e999, 2**64, "", "x", [], {}, [[1]], ["a", "b"], {"model": "chef"})
KEYS = ("model", "prompt", "max_tokens", "stream", "n", "lora_name", "lora", "adapter", "extra_body", "user", "stop")


def body(generator: random.Random) -> tuple[bytes, str | None]:
    """Return a body, and the adapter that it names if it is a good one."""
    name = generator.choice(("sql", "chat"))
    fields = [("model", json.dumps(name)), ("prompt", '"hello"'), ("max_tokens", "2")]
    if generator.random() < 0.3:
        return _joined(fields), name
    for _ in range(generator.randint(1, 3)):
        what = generator.randrange(5)
        if what == 0:
            fields.insert(generator.randrange(len(fields) + 1), ("model", f'"{generator.choice(MODELS)}"'))
        elif what == 1:
            fields.append((generator.choice(KEYS), json.dumps(generator.choice(ODD))))
        elif what == 2:
            generator.shuffle(fields)
        elif what == 3 and fields:
            fields.pop(generator.randrange(len(fields)))
        else:
            fields.append((f"m\\u006fdel{generator.choice(('', ' '))}", f'"{generator.choice(MODELS)}"'))
    raw = _joined(fields)
    chance = generator.random()
    if chance < 0.1:
        return raw[: generator.randrange(len(raw))], None
    if chance < 0.2:
        at = generator.randrange(len(raw))
        return raw[:at] + generator.choice((b"\0", b"\xff", b'"', b"{", b",", b"\xef\xbb\xbf")) + raw[at:], None
    return raw, None


def _joined(fields: list[tuple[str, str]]) -> bytes:
    return ("{" + ",".join(f'"{key}":{value}' for key, value in fields) + "}").encode()
