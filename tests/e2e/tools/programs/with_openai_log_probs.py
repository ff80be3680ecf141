"""The OpenAI SDK: log probabilities of a completion and of a chat."""

from __future__ import annotations

import json
import sys

import openai


def main() -> None:
    url, name = sys.argv[1:]
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    on = {"ignore_eos": True}
    text = client.completions.create(model=name, prompt="hello", max_tokens=12, logprobs=0, extra_body=on)
    chat = client.chat.completions.create(
        model=name, messages=[{"role": "user", "content": "hello"}], max_tokens=12, logprobs=True, extra_body=on
    )
    of_text, of_chat = text.choices[0].logprobs, chat.choices[0].logprobs
    assert of_text is not None
    assert of_chat is not None
    print(json.dumps({"text": of_text.token_logprobs, "chat": [one.logprob for one in of_chat.content or []]}))


if __name__ == "__main__":
    main()
