"""Build a sealed blob from a PEFT folder: read, check, pack, seal. Runs in a thread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import monotonic_ns
from typing import NamedTuple

from sidecar.adapters.buffers import Blob
from sidecar.adapters.folder import Folder
from sidecar.adapters.layout import Layout, numpy_dtype
from sidecar.adapters.packed import PackPlan, PackReport, pack, plan
from sidecar.adapters.peft import AdapterSource, read_adapter
from sidecar.adapters.refusal import malformed
from sidecar.adapters.shared_memory import Mount
from sidecar.core.facts import packed_key

Progress = Callable[[str, int, int], None]
"""Called with the phase (`fetch` or `pack`), bytes done and bytes in all. What it raises ends the build."""


class Built(NamedTuple):
    """A sealed blob (the caller holds its one lease), its plan, and a report with the key and the phases'
    times.
    """

    blob: Blob
    plan: PackPlan
    report: PackReport


def build(
    folder: Path | Folder,
    layout: Layout,
    generation: int = 0,
    progress: Progress | None = None,
    *,
    name: str | None = None,
    expected_digest: str | None = None,
    mount: Mount | None = None,
) -> Built:
    """Read a PEFT folder and pack it into a new blob; a failed build leaves nothing behind.

    `expected_digest` is the digest of the version being built: other content in the folder is refused.
    `mount` holds the blob (None: anonymous memory). Raises Invalid for a faulty adapter, Refused when memory
    is short.
    """
    started_ns = monotonic_ns()
    with read_adapter(folder, name=name, progress=_phase(progress, "fetch")) as source:
        check_digest(source, expected_digest)
        fetched_ns = monotonic_ns()
        packing = plan(source, layout)
        blob = Blob(packing.size_bytes, mount)
        try:
            report = _fill(blob, source, packing, progress)
        except BaseException:
            blob.release()
            raise
    report = replace(
        report,
        packed_key=packed_key(
            source.digest, layout.for_modules(target.module for target in source.targets), generation
        ),
        fetch_ns=fetched_ns - started_ns,
        pack_ns=monotonic_ns() - fetched_ns,
    )
    return Built(blob, packing, report)


def _fill(blob: Blob, source: AdapterSource, packing: PackPlan, progress: Progress | None) -> PackReport:
    out = blob.array(numpy_dtype(packing.layout), packing.shape)
    report = pack(source, packing, out, _phase(progress, "pack"))
    source.file.check_unchanged()
    del out  # a writable array forbids the seal
    blob.seal()
    return report


def check_digest(source: AdapterSource, expected: str | None) -> None:
    """Raise Invalid unless the source has the expected digest; None accepts any."""
    if expected is not None and source.digest != expected:
        raise malformed(
            source.name,
            f"its folder now holds other content ({source.digest[:12]}) than the registered version "
            f"({expected[:12]}); register it as a new version",
        )


def _phase(progress: Progress | None, phase: str) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(phase, done, total)
