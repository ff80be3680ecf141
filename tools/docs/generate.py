"""Generate pages from code, and check that the checked-in ones are current."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from sidecar.core.eligibility import Why
from sidecar.core.enums import Voided
from sidecar.errors import TABLE, Family, Reason
from sidecar.fronts.openai.errors import STATUSES
from sidecar.shell.metric_table import GROUPS as METRIC_GROUPS
from sidecar.shell.metric_table import MODEL_SERVER, Metric
from sidecar.telling.waits import VOID_BECAUSE, because
from tools.docs import configuration, protocols
from tools.docs.pages import ROOT, named

NOTE = "<!-- Made by `python -m tools.docs generate` from {source}; do not edit. -->\n\n"
METRICS_PAGE = """# Metrics

`/metrics` of the probes listener speaks Prometheus's text format. Every family is listed here by what it is about, in
the order in which it is shown.

The number of series does not grow with what clients send. Counted under `_other` are adapters past
`adapter_labels_max`, tenants past 200 and those of `queue.tenant_weights`, names that nobody registered, and tenants of
which nothing was sent to an engine; under `_base`, requests for the base model. Who comes first keeps its label.

Every request for an answer counts once, whichever front or gateway brought it and whatever ended it. One that a front
refuses before it is read, such as an invalid one or one without a credential, counts as refused, for the adapter
`_other`. Two kinds are not counted: requests whose clients leave before all of it has come, and messages of a stream
that are larger than `message_bytes_max`, which gRPC itself cuts off.
[Operations](operations.md) says what to look at first, the [runbook](runbook.md) what each alert asks for.
"""
METRICS_HEAD = """| metric | type | labels | meaning |
|---|---|---|---|
"""
PICKERS = """
## For endpoint pickers

`/metrics/model-server` of the same listener says some of it under vLLM's names, for [endpoint pickers](pickers.md) and
for dashboards made for vLLM. Let Prometheus scrape one page or the other: they count the same requests.

"""
BY_OTLP = """
## By OTLP

With `otlp.endpoint` and the extra `otel` some are also sent to a collector, as the
[conventions for generative AI](https://github.com/open-telemetry/semantic-conventions-genai) have them in their own
repository:

* Histograms of seconds: `gen_ai.server.request.duration` of every request that was taken;
  `gen_ai.server.time_to_first_token` and `gen_ai.server.time_per_output_token` of answers that do not come in one
  piece; `gen_ai.client.inference.duration` of requests that an engine had, from the last dispatch on.
* Counters of tokens of requests that an engine had: `gen_ai.client.inference.usage.input_tokens` and
  `gen_ai.client.inference.usage.output_tokens`.

`gen_ai.request.model` is the adapter as above, with `_base` and `_other`; `error.type` is the reason of
[Errors](errors.md); `gen_ai.operation.name` is `text_completion`, or by the path of the OpenAI API `chat` (chats,
responses, messages), `embeddings`, `rerank`, `score`, `classify` or `pooling`; `gen_ai.provider.name` is
`lora_sidecar`.
"""
ERRORS_PAGE = """# Errors

Every error names the thing, the reason and the way out. Its machine-readable part is `google.rpc.ErrorInfo` in gRPC's
details, and `[REASON]` at the beginning of the message on a KServe stream. An OpenAI error body has it as `reason`, in
small letters, and `model_not_found` for `UNKNOWN_ADAPTER`: see [the OpenAI API](clients.md#the-openai-api).

The family answers the first question, whether the request may have run:

| family | means |
|---|---|
| refused | never sent to an engine; safe to send again or elsewhere |
| dropped | ended while it waited in the queue; never sent to an engine |
| failed | sent to an engine, so it may have run |
| invalid | an adapter that cannot be served as it is |
| misused | a command, a configuration or a machine that is not as it must be |

`UNOBSERVED` is in the log, usage and metrics only: the client got its answer through Envoy, and no
[access log](envoy.md#the-access-log) told the sidecar how it ended.

A retry can help where the last column says so: the error then carries `google.rpc.RetryInfo`, and over plain gRPC
`grpc-retry-pushback-ms`.

| reason | family | gRPC code | retry |
|---|---|---|---|
"""
ERRORS_OF_ACCESS = """
## Errors of access

What a client gets because of who it is, or of what its tenant has used; see [Access](access.md).

| reason | HTTP | when | what to do |
|---|---|---|---|
"""
OF_ACCESS = {
    Reason.UNAUTHENTICATED: (
        "The call has no credential, or one that is faulty, expired or revoked; the message says which.",
        "Get [a new one](credentials.md); the same call fails again.",
    ),
    Reason.UNKNOWN_ADAPTER: (
        "There is no such name, or you may not use it; nothing tells which.",
        "`/v1/models` lists what you may use. Your operator finds the reason by the id in the message.",
    ),
    Reason.NOT_ALLOWED: (
        "The request names another tenant or class than its credential, or a command is not for you, or an "
        "[external check](access.md#an-external-check) says no; then the HTTP status may be another one.",
        "Leave the tenant and the class out, or ask your operator.",
    ),
    Reason.RATE_LIMITED: (
        "A [limit](access.md#limits) is used up.",
        "Wait as long as `retry-after` or RetryInfo says; OpenAI's SDKs do so by themselves.",
    ),
    Reason.QUARANTINED: (
        "The adapter can't be used; `ADAPTER_…` and `ORIGIN_…` likewise. The cause names its files, so only those hear "
        "it who may register the name.",
        "Ask its publisher or your operator, who finds the cause in the log by the id in the message.",
    ),
    Reason.PAUSED: (
        "An operator has paused the adapter; the message says until when.",
        "Wait until then, or ask whom the message names. OpenAI's SDKs are told not to retry.",
    ),
    Reason.STATE_UNAVAILABLE: (
        "Nobody can tell whether the key is good: [Redis](replicas.md#without-redis) or the tokens' issuer is away, or "
        "an [external check](access.md#an-external-check) did not answer in time.",
        "Send it again; another replica may know.",
    ),
    Reason.CANCELLED: (
        "An operator has cancelled the request, or its credential has ended ([`on_revoked`](credentials.md#api-keys)).",
        "The message says which: ask before you send it again, or get a new credential.",
    ),
}
WAITING_PAGE = """# Why a request waits

`sidecar queue` and `sidecar top` give one of these reasons for the oldest of each group that waits, `sidecar queue
--requests` for each request, and `lora_sidecar_waiting_requests` counts requests by them.
[Operations](operations.md#when-something-is-wrong) and the [runbook](runbook.md) say what to do.

| reason | means |
|---|---|
"""
VOIDED = """
## Why a bound is void

A request that waits was promised a [bound](queue.md#how-long-bounds). These are the reasons why it does not hold any
more, as `sidecar queue` shows them and `lora_sidecar_wait_bounds_voided_total` counts them:

| reason | means |
|---|---|
"""
LONGER = """
## Longer than the class allows

`queue_wait_s_max` limits how long a request is in a queue, and what was not sent to an engine by then expires. The
bound is about the first token of what is sent, and may be longer. In all a request can wait for longer than its class
allows, within its deadline:

* One that was sent, and came back without a token because its engine was lost or refused it, was in no queue meanwhile.
  If its time is over when it comes back, it gets the same time again. So one of a class with 20 s may wait for 45 s.
* One that moves to another replica has its time there again.

`sidecar queue` says under `expires` when that is, counted from its arrival in that replica.
"""


def waiting_page() -> str:
    told = {why.value: because(why, "the backend", "the adapter") for why in Why}
    rows = (f"| {reason} | {because[0].upper()}{because[1:]}. |\n" for reason, because in told.items())
    return (
        WAITING_PAGE
        + "".join(rows)
        + VOIDED
        + "".join(f"| {reason.value} | {VOID_BECAUSE[reason]} |\n" for reason in Voided)
        + LONGER
    )


def metrics_page() -> str:
    def row(metric: Metric) -> str:
        return f"| `{metric.name}` | {metric.kind} | {', '.join(metric.labels)} | {metric.help} |\n"

    def table(metrics: Iterable[Metric]) -> str:
        return METRICS_HEAD + "".join(map(row, metrics))

    groups = (f"\n## {about}\n\n{table(metrics)}" for about, metrics in METRIC_GROUPS.items())
    return METRICS_PAGE + "".join(groups) + PICKERS + table(MODEL_SERVER) + BY_OTLP


def errors_page() -> str:
    order = list(Family)
    rows = sorted(TABLE.items(), key=lambda item: order.index(item[1].family))
    families = (
        f"| `{reason.value}` | {row.family.value} | {row.code} | {'yes' if row.retryable else ''} |\n"
        for reason, row in rows
    )
    access = (
        f"| `{reason.value}` | {STATUSES[TABLE[reason].code]} | {when} | {what} |\n"
        for reason, (when, what) in OF_ACCESS.items()
    )
    return ERRORS_PAGE + "".join(families) + ERRORS_OF_ACCESS + "".join(access)


PAGES: dict[str, tuple[str, Callable[[], str]]] = {
    "docs/configuration-keys.md": ("sidecar.config", configuration.page),
    "docs/metrics.md": ("sidecar/shell/metric_table.py", metrics_page),
    "docs/protocols.md": ("the records of backend kinds", protocols.page),
    "docs/waiting.md": ("sidecar/telling/waits.py", waiting_page),
    "docs/errors.md": ("sidecar/errors.py", errors_page),
}


def made() -> Iterator[tuple[Path, str]]:
    """Yield the path and the text of every generated page."""
    for path, (source, page) in PAGES.items():
        yield ROOT / path, NOTE.format(source=source) + page()


def outdated() -> Iterator[str]:
    """Yield the checked-in generated pages that are outdated."""
    for path, text in made():
        if not path.is_file() or path.read_text() != text:
            yield f"{named(path)} is not what its source says: python -m tools.docs generate"


def generate() -> None:
    for path, text in made():
        path.write_text(text)
