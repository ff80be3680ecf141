"""Ask the OpenAI API for several adapters at once, and print which engine gave each answer."""

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt")
    parser.add_argument("adapters", nargs="+", metavar="adapter")
    parser.add_argument("--server", default="127.0.0.1:9002", help="the sidecar's http listener")
    arguments = parser.parse_args()
    with httpx.Client(base_url=f"http://{arguments.server}", timeout=60) as client, ThreadPoolExecutor() as threads:

        def ask(adapter):
            body = {"model": adapter, "prompt": arguments.prompt, "max_tokens": 48, "temperature": 0}
            return client.post("/v1/completions", json=body)

        for adapter, reply in zip(arguments.adapters, threads.map(ask, arguments.adapters), strict=True):
            answer = reply.json()
            if reply.status_code != httpx.codes.OK:
                print(answer["error"]["message"], file=sys.stderr)
                return 1
            print(f"{reply.headers['x-lora-backend']:7} {adapter:7} {answer['choices'][0]['text']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
