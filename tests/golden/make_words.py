"""`python -m tests.golden.make_words` writes each voice's words of every cause, misfit and wait, for people to read."""

from __future__ import annotations

import json
from pathlib import Path

from sidecar.core import causes, eligibility, enums, misfits
from sidecar.core.causes import Cause
from sidecar.core.facts import Suspicion
from sidecar.core.misfits import Misfit
from sidecar.ownership.enums import Why
from sidecar.telling.endings import Voice, told
from sidecar.telling.misfits import label, reason, sentence
from sidecar.telling.waits import VOID_BECAUSE, because

WORDS = Path(__file__).parent / "words.json"
S = 1_000_000_000
LOST = "the connection broke"
SAMPLES: tuple[Cause, ...] = (
    causes.Said("the sidecar failed on this request"),
    causes.NoAdapterNamed(),
    causes.UnknownAdapter("sqll", ("sql", "sql-2"), False, "acme"),
    causes.UnknownAdapter("poetry", (), False, "acme"),
    causes.UnknownAdapter("poetry", (), True, "acme"),
    causes.UnknownAdapter("poetry", (), True, ""),
    causes.UnknownAdapter("poetry", (), False, None),
    causes.UnknownAdapter("poetry", (), True, None),
    causes.UnknownVersion("sql", "v9", ((1, "24abaf61b7fae38f"), (2, "029f7c73a9b0efd2"))),
    causes.UnknownVersion("sql", "v9", ()),
    causes.NotAllowed("acme", "sql", False),
    causes.NotAllowed("acme", "sql", True),
    causes.ShuttingDown(),
    causes.Quarantined(Suspicion(("gpu-1", "gpu-2"), LOST)),
    causes.Quarantined(Suspicion(("gpu-1",), "CUDA error", has_ended=True)),
    causes.UnknownClass("batchh", ("batch", "default")),
    causes.DeadlineBefore(),
    causes.QueueFull("requests", 64, 64, None),
    causes.QueueFull("tokens", 60, 70, "acme"),
    causes.WaitTooLong("gpu-1", 640 * S, "default", 600 * S),
    causes.DeadlineTooSoon("gpu-1", 12 * S, 10 * S),
    causes.PromptTooLong(9000, 8192),
    causes.TooManySequences(9, 8),
    causes.NoBackend(0, (), ()),
    causes.NoBackend(0, (), ("blue", "green")),
    causes.NoBackend(2, (), ()),
    causes.NoBackend(3, (("gpu-1", misfits.RankTooLarge(64, 32)), ("gpu-2", misfits.Drained())), ()),
    causes.Gone(("gpu-1",)),
    causes.NotOwned(("gpu-1", "gpu-2")),
    *(causes.OwnerChanged("gpu-1", why.value) for why in Why),
    causes.Moved(),
    causes.LeaseEnded("gpu-1"),
    causes.NoOwner(),
    causes.NoMember("rep-2"),
    causes.BackendDown("gpu-1"),
    causes.ReplicaAway("rep-2", "Socket closed"),
    causes.Unowned("gpu-1", causes.ReplicaAway("rep-2", "Socket closed")),
    causes.Unowned("gpu-1", causes.Said("the inbox is full")),
    causes.ReplicaLost("rep-2", "gpu-1", "Socket closed"),
    causes.BrokeOff("gpu-1", "connection reset"),
    causes.Broken("'NoneType' object is not iterable"),
    causes.SidecarFailed("", "KeyError"),
    causes.SidecarFailed("job-7", "KeyError"),
    causes.Crashed(True),
    causes.Crashed(False),
    causes.Poisonous("job-7", ("rep-1", "rep-2")),
    causes.DeadlinePassed(2 * S, 2 * S, False),
    causes.DeadlinePassed(2 * S, 2 * S, True),
    causes.NoneUp(600 * S),
    causes.WaitedTooLong(600 * S, "default", 600 * S),
    causes.ReachedTooLate(9 * S, S, "gpu-1", 2 * S, 2000),
    causes.NotFetched("its origin is gone"),
    causes.NotLoaded("gpu-1", "wrong shape"),
    causes.CancelledByClient(),
    causes.Revoked(),
    causes.CancelledByOperator(),
    causes.ReadTooSlowly(),
    causes.Stopped(False),
    causes.Stopped(True),
    causes.Rejected("max_tokens is too large"),
    causes.GivenUp(4, "gpu-1", "engine_miss"),
    causes.FailedTwice("gpu-1", "CUDA error"),
    causes.Failed("gpu-1", 3, "CUDA error"),
    causes.Lost(("gpu-1", "gpu-2"), LOST, 2),
    causes.LostMidway("gpu-1", LOST),
    causes.Unobserved(),
)


MISFITS: tuple[Misfit, ...] = (
    misfits.NoLora(),
    misfits.NoFolder(),
    misfits.NoSizes(),
    misfits.NoBaseNamed("meta-llama/Llama-3.1-8B"),
    misfits.OtherBase("mistralai/Mistral-7B-v0.3", "meta-llama/Llama-3.1-8B"),
    misfits.RankTooLarge(64, 32),
    misfits.OtherHeads(6144, (4096, 512, 512)),
    misfits.PartsUnknown("attn_qkv", "heads"),
    misfits.UnevenHeads(8, 3),
    misfits.NoModule("mlp_gate_up"),
    misfits.Alone("mlp_gate", "mlp_h_to_4h", 3),
    misfits.OtherDims("attn_q", (4096, 4096), (5120, 5120)),
    misfits.TooFewLayers(39, 32),
    misfits.MessageTooLarge(3_000_000_000, 2_147_483_647),
    misfits.TooFewPages(48, 32),
    misfits.StoreTooSmall(3_000_000_000, 1_000_000_000),
    misfits.LoadRejected("rank must be one of 8, 16"),
    misfits.LoadRejected(""),
    misfits.Draining(),
    misfits.Drained(),
)


def written() -> str:
    """Return the samples' words as JSON; a client's and a stranger's only where they differ."""
    rows = []
    for cause in SAMPLES:
        operator, client, stranger = (told(cause, "sql", voice) for voice in Voice)
        row = {"cause": type(cause).__name__, "operator": operator}
        row |= {"client": client} if client != operator else {}
        rows.append(row | ({"stranger": stranger} if stranger != client else {}))
    rows += [
        {"misfit": type(each).__name__, "label": label(each), "operator": sentence(each), "client": reason(each)}
        for each in MISFITS
    ]
    rows += [{"why": why.value, "clause": because(why, "gpu-1", "sql")} for why in eligibility.Why]
    rows += [{"voided": voided.value, "sentence": VOID_BECAUSE[voided]} for voided in enums.Voided]
    return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    WORDS.write_text(written())
