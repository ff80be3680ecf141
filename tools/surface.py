"""Write what a user can do with this build, so that two builds can be compared.

    python -m tools.surface                       print it as JSON
    python -m tools.surface --write FILE          write it
    python -m tools.surface --compare FILE        print each difference from FILE; exit 1 if there is any

In it: commands with options, arguments, defaults, variables and help; configuration keys with type, bounds and default;
metrics with type and labels; services, methods and messages of gRPC, and which methods each listener serves; paths and
methods of each HTTP listener with the status that answers them; environment variables; exit codes; reasons of errors;
names of policies. Listeners are asked over the network, of a process that serves without engines. All else that has to
be imported is named in WHERE and nowhere else in this file.

A difference has a path, such as `commands/serve/options/--config/help`, and is "lost", "added" or "changed".
`tests/golden/surface.json` is the surface of this build: write it again with a change that is meant; its diff then says
what users can do now and could not before.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import http.client
import importlib
import inspect
import json
import pkgutil
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

CONFIGURATION = (
    ("", "sidecar.config:Config"),
    ("backends[]", "sidecar.backends.triton.kind:TritonEntry"),
    ("backends[]", "sidecar.backends.openai.vllm:VllmEntry"),
)
"""Models of the configuration, by the key that they stand below: "" for the whole, "backends[]" for an entry there."""
WHERE = {
    "/metrics": "sidecar.shell.metric_table:METRICS",  # of each: name, kind, labels, help
    "/metrics/model-server": "sidecar.shell.metric_table:MODEL_SERVER",
    "exits": "sidecar.cli.exits:Exit",
    "reasons": "sidecar.errors:TABLE",
    "policies": "policies.registry:POLICIES",
    "protocols": "sidecar.proto",  # the package of the generated modules
}

HTTP_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
HTTP_PATHS = (
    *("/", "/metrics", "/metrics/model-server", "/livez", "/readyz", "/healthz", "/health", "/drain", "/version"),
    *("/docs", "/openapi.json"),
    *("/v1", "/v1/models", "/v1/models/some", "/v1/completions", "/v1/chat/completions", "/v1/embeddings"),
    *("/v1/responses", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/tokenize", "/generate", "/rerank"),
    "/ping",
)
KSERVE_PATHS = (
    *(
        "/v2",
        "/v2/",
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/models/m",
        "/v2/models/m/ready",
        "/v2/models/m/config",
    ),
    *("/v2/models/m/stats", "/v2/models/stats", "/v2/models/m/versions/1", "/v2/models/m/infer"),
    *("/v2/models/m/generate", "/v2/models/m/generate_stream", "/v2/repository/index"),
    *("/v2/repository/models/m/load", "/v2/repository/models/m/unload", "/v2/systemsharedmemory/status"),
    *("/v2/systemsharedmemory/region/r/register", "/v2/systemsharedmemory/region/r/unregister"),
    *("/v2/cudasharedmemory/status", "/v2/cudasharedmemory/region/r/register", "/v2/trace/setting", "/v2/logging"),
)
UNREADABLE = b"\xff"
"""No protobuf message: a served method answers with an error and does nothing."""


def imported(place: str) -> Any:
    """Import and return `module:name`, or a module."""
    module, _, name = place.partition(":")
    found = importlib.import_module(module)
    return getattr(found, name) if name else found


def surface() -> dict[str, Any]:
    """Return the whole surface."""
    with tempfile.TemporaryDirectory() as folder, Serving(Path(folder)) as serving:
        here = {
            "commands": commands(),
            "configuration": configuration(),
            "environment": environment(),
            "exit_codes": {exit_.name: int(exit_) for exit_ in imported(WHERE["exits"])},
            "policies": {kind: sorted(names) for kind, names in imported(WHERE["policies"]).items()},
            "protocols": protocols(),
            "reasons": reasons(),
        }
        listeners = serving.ready()
        here["metrics"] = metrics(listeners["probes"])
        here["grpc"] = grpc_listeners({name: listeners[name] for name in ("data", "admin")})
        here["http"] = http_listeners({name: listeners[name] for name in ("http", "probes", "drain")})
        here["exit_codes"]["after a drain"] = serving.ended()
    return here


# Imported objects.


def commands() -> dict[str, Any]:
    """Return every command of the command line by its words, and the root as ""."""
    from tools.commands import root_command

    root = root_command()
    return dict(_commands(root, root.context_class(root, info_name="sidecar"), ""))


def _commands(command: Any, context: Any, words: str) -> Iterator[tuple[str, Any]]:
    record: dict[str, Any] = {"help": _prose(command.help), "options": {}, "arguments": {}}
    if getattr(command, "epilog", None):
        record["epilog"] = _prose(command.epilog)
    for place, parameter in enumerate(command.params):
        is_argument = not any(name.startswith("-") for name in parameter.opts)
        if is_argument:
            record["arguments"][parameter.name] = {"place": place, **_parameter(parameter)}
        else:
            record["options"][", ".join(sorted(parameter.opts, key=len))] = _parameter(parameter)
    yield words, record
    if hasattr(command, "list_commands"):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            below = child.context_class(child, info_name=name, parent=context)
            yield from _commands(child, below, f"{words} {name}".strip())


def _parameter(parameter: Any) -> dict[str, Any]:
    kind = parameter.type_descriptor.annotation if hasattr(parameter, "type_descriptor") else parameter.type
    record = {
        "help": _prose(getattr(parameter, "help", None)),
        "type": _type_name(kind),
        "default": _plain(parameter.default),
        "shown_default": parameter.show_default if isinstance(parameter.show_default, str) else None,
        "required": parameter.required or None,
        "repeated": parameter.multiple or parameter.nargs != 1 or None,
        "env": parameter.envvar,
        "no": ", ".join(parameter.secondary_opts) or None,
        "bounds": [getattr(parameter, "min", None), getattr(parameter, "max", None)],
        "hidden": getattr(parameter, "hidden", False) or None,
    }
    if record["bounds"] == [None, None]:
        del record["bounds"]
    return {name: value for name, value in record.items() if value is not None}


def _type_name(kind: Any) -> str:
    """Return a type's name without its module, since modules move, or the choices of an enum."""
    if inspect.isclass(kind) and hasattr(kind, "__members__"):
        return f"one of {', '.join(str(member.value) for member in kind)}"
    text = kind.__name__ if inspect.isclass(kind) and not hasattr(kind, "__args__") else str(kind)
    return re.sub(r"\b(?:\w+\.)+(?=\w)", "", text)


def _plain(value: Any) -> Any:
    if callable(value):
        return "computed"
    if hasattr(value, "value"):
        return value.value
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _prose(text: str | None) -> str | None:
    return " ".join(text.split()) if text else None


def configuration() -> dict[str, Any]:
    """Return every key with its type, bounds and default; `[]` is an entry of a list, `*` a key that users choose."""
    keys: dict[str, Any] = {}
    for prefix, place in CONFIGURATION:
        schema = imported(place).model_json_schema()
        keys |= dict(_keys(schema, schema.get("$defs", {}), prefix, {}))
    return keys


def _keys(node: Mapping[str, Any], sections: Mapping[str, Any], key: str, around: Any) -> Iterator[tuple[str, Any]]:
    """Yield the keys at and below a part of a JSON schema. `around` has the default where the part has none."""
    node = {**_referred(node, sections), **{name: value for name, value in node.items() if name == "default"}}
    others = [_referred(part, sections) for part in node.get("anyOf", ()) if part != {"type": "null"}]
    shape = others[0] if len(others) == 1 else node
    default = node.get("default", around)
    if key and shape.get("properties") is None:
        yield (
            key,
            {
                "type": _shape(node, sections),
                **({} if default is None and "default" not in node else {"default": default}),
            },
        )
    elif key and "anyOf" in node:
        yield key, {"type": "section or null", "default": default}
    for name, part in shape.get("properties", {}).items():
        within = default.get(name) if isinstance(default, Mapping) else None
        yield from _keys(part, sections, f"{key}.{name}" if key else name, within)
    for mark, name in (("[]", "items"), (".*", "additionalProperties")):
        part = shape.get(name)
        if isinstance(part, Mapping) and "properties" in _referred(part, sections):
            yield from _keys(part, sections, f"{key}{mark}", None)


def _referred(node: Mapping[str, Any], sections: Mapping[str, Any]) -> Mapping[str, Any]:
    name = node.get("$ref", "").rpartition("/")[2]
    return sections[name] if name else node


def _shape(node: Any, sections: Mapping[str, Any]) -> Any:
    """Return the type and bounds of a part, without titles, texts and names of classes."""
    node = _referred(node, sections)
    if "properties" in node:
        return "section"
    kept = {name: value for name, value in node.items() if name not in ("title", "description", "default", "$defs")}
    for name in ("items", "additionalProperties"):
        if isinstance(kept.get(name), Mapping):
            kept[name] = _shape(kept[name], sections)
    for name in ("anyOf", "prefixItems"):
        if name in kept:
            kept[name] = [_shape(part, sections) for part in kept[name]]
    return kept["type"] if list(kept) == ["type"] else kept


def environment() -> list[str]:
    """Return the environment variables that the code reads: names with the product's prefix, and keys of `environ`."""
    found: set[str] = set()
    for path in (ROOT / "sidecar").rglob("*.py"):
        text = path.read_text()
        if "environ" not in text and "LORA_SIDECAR_" not in text:
            continue
        tree = ast.parse(text)
        assigned = [
            (target, node.value) for node in tree.body if isinstance(node, ast.Assign) for target in node.targets
        ]
        named = {ast.unparse(name): value for pair in assigned for name, value in _pairs(*pair)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and re.fullmatch(r"LORA_SIDECAR_[A-Z_]*", str(node.value)):
                found.add(node.value)
            asked = _asked_of_environment(node)
            value = named.get(ast.unparse(asked), asked) if asked is not None else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                found.add(value.value)
    return sorted(found)


def _pairs(target: ast.expr, value: ast.expr) -> list[tuple[ast.expr, ast.expr]]:
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        return list(zip(target.elts, value.elts, strict=True))
    return [(target, value)]


def _asked_of_environment(node: ast.AST) -> ast.expr | None:
    if isinstance(node, ast.Subscript) and re.search(r"environ(ment)?$", ast.unparse(node.value)):
        return node.slice
    if isinstance(node, ast.Call) and node.args:
        called = ast.unparse(node.func)
        if called.endswith("getenv") or re.search(r"environ(ment)?\.(get|pop|setdefault)$", called):
            return node.args[0]
    return None


def reasons() -> dict[str, str]:
    """Return each reason of an error with its family, its gRPC code and whether it is retryable."""
    return {
        reason.value: f"{row.family.value} {row.code}{' retry' if row.retryable else ''}"
        for reason, row in imported(WHERE["reasons"]).items()
    }


def protocols() -> dict[str, Any]:
    """Return services with their methods, messages with their fields, and enums, of our own protocols."""
    found: dict[str, Any] = {"services": {}, "messages": {}, "enums": {}}
    for descriptor in _files():
        for service in descriptor.services_by_name.values():
            found["services"][service.full_name] = {method.name: _signature(method) for method in service.methods}
        for message in descriptor.message_types_by_name.values():
            _add_message(message, found)
        for enum in descriptor.enum_types_by_name.values():
            found["enums"][enum.full_name] = {value.name: value.number for value in enum.values}
    return found


def _files() -> list[Any]:
    package = imported(WHERE["protocols"])
    found = {module.name for module in pkgutil.iter_modules(package.__path__) if module.name.endswith("_pb2")}
    names = sorted(found - {"envoy_pb2"})  # Envoy's own protocol; the names of its parts are on no wire
    return [imported(f"{package.__name__}.{name}").DESCRIPTOR for name in names]


def _signature(method: Any) -> str:
    streams = ["stream " if streaming else "" for streaming in (method.client_streaming, method.server_streaming)]
    return f"{streams[0]}{method.input_type.full_name} -> {streams[1]}{method.output_type.full_name}"


def _add_message(message: Any, found: dict[str, Any]) -> None:
    found["messages"][message.full_name] = {field.name: _field(field) for field in message.fields}
    for nested in message.nested_types:
        _add_message(nested, found)
    for enum in message.enum_types:
        found["enums"][enum.full_name] = {value.name: value.number for value in enum.values}


def _field(field: Any) -> str:
    named = field.message_type or field.enum_type
    kinds = {getattr(type(field), name): name[5:].lower() for name in dir(type(field)) if name.startswith("TYPE_")}
    kind = named.full_name if named else kinds[field.type]
    oneof = f" of {field.containing_oneof.name}" if field.containing_oneof else ""
    return f"{field.number} {'repeated ' if field.is_repeated else ''}{kind}{oneof}"


# Requests to a serving process.


class Serving:
    """A process that serves without engines, all its listeners open."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._drain = f"127.0.0.1:{free.getsockname()[1]}"
        self._errors = folder / "errors.txt"
        file = folder / "config.json"  # which is YAML as well
        listeners = {name: {"address": "127.0.0.1:0"} for name in ("data", "admin", "http", "probes")}
        listeners["drain"] = {"address": self._drain}
        file.write_text(json.dumps({"listeners": listeners, "drain_timeout_s": 5}))
        command = [sys.executable, "-m", "sidecar", "serve", "--json", "--config", str(file)]
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True)

    def ready(self) -> dict[str, str]:
        """Wait until the process serves; return its addresses. Raises SystemExit with its stderr if it fails."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"sidecar serve did not come up: {self._errors.read_text()}")
        return json.loads(line) | {"drain": self._drain}

    def ended(self) -> int:
        return self._process.wait(timeout=10)

    def __enter__(self) -> Serving:
        return self

    def __exit__(self, *raised: object) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
        self._process.communicate()


def metrics(address: str) -> dict[str, Any]:
    """Return each exported metric family of each page, with its labels from the tables of metrics."""
    shown: dict[str, dict[str, Any]] = {}
    for page in ("/metrics", "/metrics/model-server"):
        status, text = request(address, "GET", page)
        assert status == 200, text
        for line in text.splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                _, what, name, rest = [*line.split(" ", 3), ""][:4]
                shown.setdefault(name, {})[what.lower()] = rest
        for metric in imported(WHERE[page]):
            shown.setdefault(metric.name, {"not shown": True})["labels"] = list(metric.labels)
    return shown


def request(address: str, method: str, path: str) -> tuple[int, str]:
    """Send one request, with an empty JSON object as its body, if any; return the status and the text."""
    connection = http.client.HTTPConnection(address, timeout=10)
    body = None if method in ("GET", "HEAD", "OPTIONS") else "{}"
    try:
        connection.request(method, path, body, {"content-type": "application/json"} if body else {})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def http_listeners(addresses: Mapping[str, str]) -> dict[str, dict[str, dict[str, int]]]:
    """Return the status of each method, by listener and path, without unknown paths (404) and methods (405).

    The last request drains the process.
    """
    found: dict[str, dict[str, dict[str, int]]] = {name: {} for name in addresses}
    for name, address in addresses.items():
        for path in (*HTTP_PATHS, *(KSERVE_PATHS if name == "http" else ())):
            asked = [method for method in HTTP_METHODS if (name, path, method) != ("drain", "/drain", "POST")]
            statuses = {method: request(address, method, path)[0] for method in asked}
            if set(statuses.values()) != {404}:
                found[name][path] = {method: status for method, status in statuses.items() if status != 405}
    found["drain"]["/drain"]["POST"] = request(addresses["drain"], "POST", "/drain")[0]
    return found


def grpc_listeners(addresses: Mapping[str, str]) -> dict[str, Any]:
    """Return the methods that each listener serves, and the services that its reflection names."""
    import grpc
    from grpc_health.v1 import health_pb2
    from grpc_reflection.v1alpha import reflection_pb2
    from tritonclient.grpc import service_pb2

    others = [module.DESCRIPTOR for module in (health_pb2, reflection_pb2, service_pb2)]
    services = [service for file in (*_files(), *others) for service in file.services_by_name.values()]
    found = {}
    for name, address in addresses.items():
        with grpc.insecure_channel(address) as channel:
            methods = [f"/{service.full_name}/{method.name}" for service in services for method in service.methods]
            served = [method for method in methods if _is_served(channel, method)]
            found[name] = {"methods": sorted(served), "reflected": _reflected(channel)}
    return found


def _is_served(channel: Any, method: str) -> bool:
    import grpc

    call = channel.stream_stream(method)(iter([UNREADABLE]), timeout=5)
    with contextlib.suppress(grpc.RpcError):
        for _ in call:
            pass
    return bool(call.code() is not grpc.StatusCode.UNIMPLEMENTED)


def _reflected(channel: Any) -> list[str]:
    import grpc
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

    try:
        return sorted(ProtoReflectionDescriptorDatabase(channel).get_services())
    except grpc.RpcError:
        return []


# Differences.


@dataclass(frozen=True)
class Difference:
    path: str
    change: str
    before: Any = None
    after: Any = None

    def __str__(self) -> str:
        values = {"lost": f": {self.before!r}", "added": f": {self.after!r}"}
        return f"{self.change:8}{self.path}{values.get(self.change, f': {self.before!r} -> {self.after!r}')}"


def differences(before: Any, after: Any, path: str = "") -> list[Difference]:
    """Return the differences; a part that was lost or added as a whole is one difference, at its highest path."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        found = []
        for key in sorted({*before, *after}):
            below = f"{path}/{key}" if path else key
            if key not in after:
                found.append(Difference(below, "lost", before=before[key]))
            elif key not in before:
                found.append(Difference(below, "added", after=after[key]))
            else:
                found += differences(before[key], after[key], below)
        return found
    if isinstance(before, list) and isinstance(after, list) and all(isinstance(one, str) for one in before + after):
        lost = [Difference(f"{path}/{one}", "lost") for one in before if one not in after]
        return lost + [Difference(f"{path}/{one}", "added") for one in after if one not in before]
    return [] if before == after else [Difference(path, "changed", before, after)]


def as_json(record: Any) -> str:
    return json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Write what a user can do with this build, or compare it.")
    parser.add_argument("--write", type=Path, metavar="FILE")
    parser.add_argument("--compare", type=Path, metavar="FILE")
    options = parser.parse_args()
    now = surface()
    if options.write is not None:
        options.write.write_text(as_json(now))
    elif options.compare is None:
        print(as_json(now), end="")
    else:
        found = differences(json.loads(options.compare.read_text()), json.loads(as_json(now)))
        print(*found, sep="\n")
        return 1 if found else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
