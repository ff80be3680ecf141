"""For each alert: series, minute by minute, with which it fires in the end, and others with which it does not."""

from __future__ import annotations

from dataclasses import dataclass

POD = 'namespace="lora",service="pool",pod="pool-0"'
OTHER = 'namespace="lora",service="pool",pod="pool-1"'

Series = dict[str, str]
"""Values by series, in promtool's notation: `a+bxn` is a, and n times b more than before."""


@dataclass(frozen=True)
class Case:
    """What fires and what does not, and after how many minutes that is looked at."""

    fires: Series
    quiet: Series
    minutes: int = 60


def _series(short: str, pod: str = POD, **labels: str) -> str:
    more = "".join(f',{name.rstrip("_")}="{value}"' for name, value in labels.items())
    return f"lora_sidecar_{short}{{{pod}{more}}}"


def _gauge(short: str, fires: str, quiet: str, **labels: str) -> Case:
    """A gauge that has one value or another for an hour."""
    name = _series(short, **labels)
    return Case({name: f"{fires}x60"}, {name: f"{quiet}x60"})


def _share(short: str, bad: dict[str, str], good: dict[str, str], fires: int, quiet: int, **labels: str) -> Case:
    """A counter of which so many of 1,000 a minute have the bad label."""
    wrong, right = _series(short, **bad, **labels), _series(short, **good, **labels)
    return Case(
        {wrong: f"0+{fires}x60", right: f"0+{1000 - fires}x60"},
        {wrong: f"0+{quiet}x60", right: f"0+{1000 - quiet}x60"},
    )


def _outcome(name: str, fires: int, quiet: int) -> Case:
    return _share("requests_total", {"outcome": name}, {"outcome": "ok"}, fires, quiet)


def _waits(below_s: str, share: str) -> Series:
    """Waits of which all but 1 % are below a bucket, beside bounds of 30 to 60 s."""
    waits = {f"0+{share}x60": below_s, "0+1000x60": "+Inf"}
    found = {_series("queue_wait_seconds_bucket", class_="chat", le=le): values for values, le in waits.items()}
    found |= {_series("queue_wait_seconds_bucket", class_="chat", le="1"): "0+500x60"}
    found |= {_series("queue_wait_seconds_bucket", class_="chat", le="60"): "0+1000x60"}
    for le, values in (("30", "0x60"), ("60", "0+1000x60"), ("+Inf", "0+1000x60")):
        found[_series("wait_bound_seconds_bucket", class_="chat", le=le)] = values
    return found


def _kept(values: str) -> Series:
    """The versions that an engine keeps, of which it may keep 100; the replica that does not own it tells nothing."""
    return {
        _series("backend_versions_kept", backend="gpu-0"): values,
        _series("backend_versions_max", backend="gpu-0"): "100x60",
        _series("backend_versions_kept", OTHER, backend="gpu-1"): "500x60",
    }


def _apart(known: int) -> Series:
    """Two replicas, of which one knows of so many."""
    versions = {_series("build_info", pod, version="1"): "1x60" for pod in (POD, OTHER)}
    return versions | {_series("replicas"): "2x60", _series("replicas", OTHER): f"{known}x60"}


def _owned(here: int, there: int) -> Series:
    return {
        _series("backend_owned", POD, backend="gpu-0"): f"{here}x60",
        _series("backend_owned", OTHER, backend="gpu-0"): f"{there}x60",
    }


def _store(evicted: str) -> Series:
    fetched, resident = (_series("dispatches_total", cache=cache) for cache in ("fetched", "resident"))
    return {fetched: "0+100x60", resident: "0+900x60", _series("store_evictions_total", tier="memory"): evicted}


def _misses(missed: str) -> Series:
    heals = _series("heals_total", backend="gpu-0", reason="engine_miss")
    return {heals: missed, _series("loads_total", backend="gpu-0", result="ok"): "0+10x60"}


CASES: dict[str, Case] = {
    "LoraSidecarErrorBudgetBurns": _outcome("failed", 20, 5),
    "LoraSidecarErrorBudgetShrinks": _outcome("expired", 4, 0),
    "LoraSidecarObjectiveBurns": _share(
        "tenant_requests_total", {"outcome": "failed"}, {"outcome": "ok"}, 20, 5, tenant="acme"
    ),
    "LoraSidecarGone": Case(
        {_series("build_info", version="1"): "1x10 _x50"}, {_series("build_info", version="1"): "1x60"}
    ),
    "LoraSidecarNoEngine": Case(
        {_series("backend_up", backend=name): "0x60" for name in ("gpu-0", "gpu-1")},
        {_series("backend_up", backend=name): f"{up}x60" for name, up in (("gpu-0", 0), ("gpu-1", 1))},
    ),
    "LoraSidecarEngineDown": Case(
        {_series("backend_up", pod, backend="gpu-0"): "0x60" for pod in (POD, OTHER)},
        {_series("backend_up", pod, backend="gpu-0"): f"{up}x60" for pod, up in ((POD, 0), (OTHER, 1))},
    ),
    "LoraSidecarRequestsFail": _outcome("failed", 20, 5),
    "LoraSidecarRequestsRefused": _outcome("refused", 60, 40),
    "LoraSidecarRequestsExpire": _outcome("expired", 20, 5),
    "LoraSidecarBacklog": Case(
        {_series("predicted_wait_seconds", backend=name): "90x60" for name in ("gpu-0", "gpu-1")},
        {_series("predicted_wait_seconds", backend=name): f"{s}x60" for name, s in (("gpu-0", 90), ("gpu-1", 10))},
    ),
    "LoraSidecarWaitsNearBound": Case(_waits("30", "900"), _waits("10", "995")),
    "LoraSidecarBoundBroken": _gauge("wait_bounds_exceeded_total", "0+1", "7+0"),
    "LoraSidecarBoundsVoid": _gauge("wait_bounds_voided_total", "0+60", "0+1", reason="slow"),
    "LoraSidecarLoadsFail": _share("loads_total", {"result": "failed"}, {"result": "ok"}, 200, 50, backend="gpu-0"),
    "LoraSidecarFetchesFail": _share("fetches_total", {"result": "failed"}, {"result": "ok"}, 200, 50),
    "LoraSidecarQuarantine": _gauge("adapters_quarantined", "1+0", "0+0"),
    "LoraSidecarEngineMisses": Case(_misses("0+5x60"), _misses("0+1x60")),
    "LoraSidecarEngineKeepsTooMany": Case(_kept("80+1x60"), _kept("30+1x60")),
    "LoraSidecarAdaptersThrash": _share("dispatches_total", {"cache": "host"}, {"cache": "resident"}, 400, 200),
    "LoraSidecarStoreTooSmall": Case(_store("0+10x60"), _store("5x60")),
    "LoraSidecarDeclaredFails": _gauge("declared_adapters", "1+0", "0+0", phase="Failed"),
    "LoraSidecarDeclaredHeld": Case(
        {_series("declared_held"): "1x900"}, {_series("declared_held"): "1x300 0x600"}, 900
    ),
    "LoraSidecarStateAway": _gauge("state_away_seconds", "40+60", "0+0"),
    "LoraSidecarStateLag": _gauge("state_lag_changes", "2+0", "0+0"),
    "LoraSidecarEngineWithoutOwner": Case(_owned(0, 0), _owned(0, 1)),
    "LoraSidecarTwoOwners": Case(_owned(1, 1), _owned(1, 0)),
    "LoraSidecarOwnersChange": _gauge("ownership_changes_total", "0+1", "4+0", change="taken"),
    "LoraSidecarReplicasApart": Case(_apart(1), _apart(2)),
    "LoraSidecarAuditLost": _gauge("audit_lost_total", "0+1", "7+0", kind="denial"),
    "LoraSidecarPolicyFaulty": _gauge("policy_faulty", "1+0", "0+0"),
    "LoraSidecarConfigRefused": _gauge("config_last_reload_successful", "0+0", "1+0"),
    "LoraSidecarKeysStale": _gauge("access_state_away_seconds", "301+60", "200+0"),
    "LoraSidecarUsageNotWritten": _gauge("usage_errors_total", "0+1", "7+0"),
    "LoraSidecarStalls": _gauge("event_loop_stall_seconds", "0.8+0", "0.02+0"),
    "LoraSidecarJournalBroken": Case(
        {_series("journal_errors_total"): "0+1x60", _series("journal_gaps_total"): "0x60"},
        {_series("journal_errors_total"): "3x60", _series("journal_gaps_total"): "1x60"},
    ),
    "LoraSidecarDrainStuck": _gauge("draining", "1+0", "0+0"),
}
