"""The names of classes, fields and enum members in journals.

The names are kept here, apart from Python's: a class, field or member can be renamed without changing a byte on disk.
`"new=old"` means that Python's `new` is written as `old`. The digest of a step's effects uses these names too.

A row that changes in any other way changes the format: raise `FORMAT` in `segments`, and write the samples again with
`python -m tests.golden.make_journals`. A journal of another format is refused by its number.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

from policies import views
from sidecar import errors
from sidecar.core import (
    config,
    enums,
    facts,
    lateness,
    layout,
    lengths,
    outstanding,
    pace,
    prefetch_accounting,
    shadow,
    silence,
    state,
    store,
)
from sidecar.core import effects as do
from sidecar.core import events as ev


@dataclass(frozen=True)
class Form:
    """The written form of a class: its name, and the names of its fields or members in the order of writing."""

    name: str
    written: str

    @property
    def names(self) -> dict[str, str]:
        """The written names by Python's names."""
        pairs = (entry.partition("=") for entry in self.written.split())
        return {python: written or python for python, _, written in pairs}


def problems(cls: Any, form: Form) -> list[str]:
    """Return what must be changed so that a row fits its class; an empty list if it fits."""
    row, names = f"WRITTEN[{cls.__name__}] in {__name__}", form.names
    if issubclass(cls, Enum):
        what, known = "member", set(cls.__members__)
    else:
        what, known = "field", {each.name for each in fields(cls) if not each.metadata.get("derived")}
    lacking, strange = [name for name in known if name not in names], [name for name in names if name not in known]
    found = [
        f'{cls.__name__} has a {what} without a written name: add "{name}" to {row}, or "{name}=OLD" if it was '
        "called OLD before"
        for name in sorted(lacking)
    ]
    found += [f'{cls.__name__} has no {what} "{name}": rename or remove it in {row}' for name in strange]
    twice = {written for written in names.values() if list(names.values()).count(written) > 1}
    found += [f'two {what}s of {cls.__name__} are written as "{written}" by {row}' for written in sorted(twice)]
    return found


WRITTEN: dict[type, Form] = {
    # Events.
    ev.Received: Form(
        "Received",
        "request adapter tenant klass input_tokens output_tokens_max deadline_ns session size_bytes only sequences "
        "client_id versions",
    ),
    ev.ClientLeft: Form("ClientLeft", "request moved by_operator revoked shut_down"),
    ev.ClientStalled: Form("ClientStalled", "request"),
    ev.OtherVersion: Form("OtherVersion", "ordinal adapter origin generation kept"),
    ev.AdapterRegistered: Form(
        "AdapterRegistered", "name adapter origin ordinal generation allow pinned others canary"
    ),
    ev.AdapterUnregistered: Form("AdapterUnregistered", "name"),
    ev.EvictAsked: Form("EvictAsked", "ask name"),
    ev.PrefetchAsked: Form("PrefetchAsked", "ask name backends"),
    ev.ReleaseAsked: Form("ReleaseAsked", "name"),
    ev.DrainSet: Form("DrainSet", "backend draining"),
    ev.ShutdownBegun: Form("ShutdownBegun", ""),
    ev.BackendAdded: Form("BackendAdded", "backend facts owned pool fresh"),
    ev.BackendLeaving: Form("BackendLeaving", "backend leaving serves_queue"),
    ev.BackendRemoved: Form("BackendRemoved", "backend cause successor"),
    ev.ConfigChanged: Form("ConfigChanged", "config"),
    ev.BackendPlanned: Form("BackendPlanned", "backend versions"),
    ev.BackendTaken: Form("BackendTaken", "backend epoch"),
    ev.BackendGivenUp: Form("BackendGivenUp", "backend cause"),
    ev.BackendUp: Form("BackendUp", "backend facts others"),
    ev.BackendMeasured: Form("BackendMeasured", "backend seats kv_tokens kv_used others"),
    ev.BackendProbed: Form("BackendProbed", "backend alive text"),
    ev.BackendLost: Form("BackendLost", "backend cause"),
    ev.Fetched: Form("Fetched", "key"),
    ev.FetchFailed: Form("FetchFailed", "key reason text"),
    ev.Spilled: Form("Spilled", "key"),
    ev.SpillFailed: Form("SpillFailed", "key text"),
    ev.DiskHolds: Form("DiskHolds", "key version size_bytes"),
    ev.LoadDone: Form("LoadDone", "load"),
    ev.LoadFailed: Form("LoadFailed", "load fault text"),
    ev.FirstToken: Form("FirstToken", "request attempt unheard unseen"),
    ev.RunEnded: Form("RunEnded", "request attempt output_tokens seen client_left"),
    ev.RunFailed: Form("RunFailed", "request attempt fault text output_tokens"),
    ev.Progress: Form("Progress", "backend tokens"),
    ev.Tick: Form("Tick", ""),
    # Effects.
    do.Fetch: Form("Fetch", "key digest origin layout size_bytes from_disk"),
    do.Drop: Form("Drop", "key"),
    do.Spill: Form("Spill", "key"),
    do.DropDisk: Form("DropDisk", "key"),
    do.Load: Form("Load", "load backend name digest packed epoch"),
    do.Dispatch: Form(
        "Dispatch",
        "request attempt backend name digest ordinal task_id cache queue_ns load_ns heals packed_key attach epoch",
    ),
    do.CancelRun: Form("CancelRun", "request attempt backend"),
    do.RegisterRegions: Form("RegisterRegions", "backend"),
    do.Probe: Form("Probe", "backend within_ns"),
    do.Settle: Form(
        "Settle",
        "request outcome name tenant klass queue_ns input_tokens output_tokens reason message backend version "
        "retry_after_ns bound_ns voided",
    ),
    do.Heal: Form("Heal", "backend reason version"),
    do.Quarantine: Form("Quarantine", "digest text"),
    do.Answer: Form("Answer", "ask lines"),
    do.WakeAt: Form("WakeAt", "at_ns"),
    # What they and the state are made of.
    errors.Reason: Form(
        "Reason",
        "QUEUE_FULL DRAINING DEADLINE_UNMEETABLE NO_BACKEND NOT_OWNER ADAPTER_UNAVAILABLE UNKNOWN_ADAPTER NOT_ALLOWED "
        "QUARANTINED INVALID_REQUEST TOKEN_TOO_OLD CHANGED_MEANWHILE STATE_UNAVAILABLE CRASHED EXPIRED CANCELLED "
        "BACKEND_FAILED BACKEND_REJECTED CLIENT_STALLED DEADLINE_EXCEEDED SIDECAR_FAILED POISONOUS ADAPTER_MALFORMED "
        "ADAPTER_UNSUPPORTED ADAPTER_MISMATCH ADAPTER_TOO_LARGE ORIGIN_NOT_ALLOWED ORIGIN_UNREADABLE INVALID_NAME "
        "NO_PREVIOUS_VERSION MANAGED_ELSEWHERE CONFIG_INVALID DATA_DIRECTORY_IN_USE PORT_IN_USE BACKEND_UNREACHABLE "
        "UNKNOWN_BACKEND UNAUTHENTICATED NOT_A_JOURNAL STATE_INCOMPATIBLE STATE_NOT_EMPTY RATE_LIMITED PAUSED "
        "UNKNOWN_REQUEST UNOBSERVED",
    ),
    enums.Fault: Form(
        "Fault",
        "MISS FULL PAGE_CLAIM WHOLE_ENGINE UNKNOWN_REGION QUEUE_FULL LOST NO_ANSWER REJECTED NOT_OWNED DEADLY",
    ),
    enums.Seen: Form("Seen", "ALL ESTIMATED NOTHING"),
    enums.Phase: Form("Phase", "DOWN UP"),
    enums.Cache: Form("Cache", "BASE RESIDENT HOST FETCHED JOINED"),
    enums.Outcome: Form("Outcome", "OK REFUSED EXPIRED CANCELLED FAILED"),
    facts.EngineFacts: Form(
        "EngineFacts",
        "kind base_models models dtype rank_multiple tp rank_max modules layers optimal_rank cached_rank_max "
        "host_bytes host_pages device_pages seats kv_tokens input_tokens_max sequence_tokens_max heads kv_heads "
        "head_size pace message_bytes_max by_reference caches queue_max base_apart reads_files canonical_files "
        "base_only host_pages_assumed unloads without_lora",
    ),
    facts.Packed: Form("Packed", "key task_id size_bytes pages"),
    facts.Adapter: Form("Adapter", "digest base_model rows dtype"),
    layout.Row: Form("Row", "module module_id layer rank in_dim out_dim"),
    layout.Heads: Form("Heads", "query key_value size"),
    layout.Layout: Form("Layout", "dtype rank_multiple tp fused heads files"),
    pace.Pace: Form("Pace", "fixed_ns seat_ns context_token_ns prompt_token_ns"),
    pace.Yield: Form("Yield", "busy_ns expected_ns at_ns seen"),
    pace.Runs: Form("Runs", "mean_ns square"),
    config.ClassLimit: Form("ClassLimit", "queue_wait_ns_max patience_ns"),
    config.CoreConfig: Form(
        "CoreConfig",
        "store_bytes disk_bytes fetches_max output_tokens_assumed sequence_tokens_assumed queued_max "
        "queued_tokens_max queued_bytes_max tenant_queued_max tenant_queued_tokens_max tenant_queued_bytes_max "
        "tenant_weights heals_max visits_max seat_slack seats_default retry_ns retry_ns_max joining_ns_max pools "
        "base_requests classes eviction disk_eviction ordering routing prefetch prefetch_bytes_per_s raise_on",
    ),
    views.Waiting: Form(
        "Waiting",
        "id version name tenant klass arrived_ns input_tokens output_tokens_max weight sequences",
    ),
    views.Promise: Form("Promise", "expected_ns bound_ns overdue_ns urgent_ns"),
    lateness.Missing: Form("Missing", "since begun begun_ns"),
    lateness.Lateness: Form("Lateness", "missing stood_ns stands_since_ns"),
    outstanding.Outstanding: Form(
        "Outstanding",
        "requests input_tokens expected_tokens queued_tokens footprint_tokens tenants weights lengths "
        "guessed unsure_tokens",
    ),
    prefetch_accounting.PrefetchCounts: Form("AheadCounts", "begun used late wasted_bytes"),
    prefetch_accounting.Guess: Form("Guess", "size_bytes given_up"),
    prefetch_accounting.Guesses: Form("Guesses", "unused ask_after_ns budget_bytes budget_ns counts"),
    prefetch_accounting.PrefetchedLoad: Form("LoadAhead", "size_bytes done_ns"),
    prefetch_accounting.PrefetchedLoads: Form("LoadsAhead", "unused rest paused_until_ns counts"),
    shadow.Belief: Form("Belief", "pages since_ns source running"),
    shadow.CacheShadow: Form("CacheShadow", "pages_total held evictions"),
    shadow.EngineShadow: Form("EngineShadow", "host device"),
    silence.Silence: Form("Silence", "since_ns due_ns suspected found excused reading"),
    silence.Reading: Form("Reading", "slowest_ns before_ns read"),
    # The state.
    state.Name: Form("Name", "name digest ordinal allow pinned versions kept canary"),
    lengths.Answers: Form("Answers", "count tokens"),
    lengths.Overrun: Form("Overrun", "expected came seen"),
    lengths.Alike: Form("Alike", "ended cut tokens"),
    lengths.Lengths: Form("Lengths", "alike next_weight answers"),
    state.Version: Form(
        "Version",
        "adapter origin generation names requests answered suspect lost_backends quarantined refused_by loads lengths",
    ),
    state.Request: Form(
        "Request",
        "view ordinal expires_ns deadline_ns size_bytes only client_id expected_tokens promise counted voided backend "
        "running settled attempt tokens first_token progressing heals engine_failures region_heals losses pinned_key "
        "cache fetch dispatched_ns fetch_ns queued_clock fetch_allowed_ns load_ns counted_tokens "
        "unsure_tokens guessed unheard unseen",
    ),
    state.Slot: Form("Slot", "opened_ns pages load running stale"),
    state.LoadRun: Form("LoadRun", "id backend digest key begun_ns"),
    state.HealNote: Form("HealNote", "at_ns reason version"),
    state.SlotEstimate: Form("SlotEstimate", "pages fastest_ns hold_until_ns"),
    state.Joining: Form("Joining", "until_ns is_planned planned"),
    state.Backend: Form(
        "Backend",
        "id facts ordering phase draining owned epoch pool leaving fresh running more_sequences kv_reserved "
        "kv_of_others queued queued_by_version outstanding slowness slowness_promised steps yielded runs silence "
        "slots busy resting busy_pages stale shadow estimate loads lone_load full_until_ns full_backoff_ns "
        "seats_learned seats_credit pages_learned pages_credit quiet_until_ns quiet_backoff_ns warmups ahead "
        "steal_from heals overrun others",
    ),
    state.Queued: Form("Queued", "requests tokens size_bytes"),
    state.State: Form(
        "State",
        "config store disk routing prefetch guesses disk_paused_until_ns names versions backends requests unrouted "
        "loads load_count suspects joining ahead_of_removed draining waiting tenant_queued voided timers wake_ns "
        "listen_ns steal_ns wanted lateness hungry_heap fetched_for prefetches answers base_lengths",
    ),
    store.Entry: Form("Entry", "size_bytes digest ready pins held_by_operator doomed"),
    store.StoreIndex: Form("StoreIndex", "budget_bytes policy entries bytes_used fetches evictions"),
}
