"""Build a sealed blob from a PEFT folder: read, check, pack, seal. Runs in a thread."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from time import monotonic_ns
from typing import NamedTuple

from sidecar.adapters.buffers import PRIVATE, Blob, Regions
from sidecar.adapters.folder import Folder
from sidecar.adapters.layout import Layout, numpy_dtype
from sidecar.adapters.packed import PackPlan, PackReport, pack, plan
from sidecar.adapters.peft import AdapterSource, Hashing, open_adapter
from sidecar.adapters.refusal import malformed
from sidecar.core.facts import packed_key
from sidecar.errors import Invalid


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
    *,
    name: str | None = None,
    expected_digest: str | None = None,
    regions: Regions = PRIVATE,
) -> Built:
    """Read a PEFT folder and pack it into a new blob; a failed build leaves nothing behind.

    `expected_digest` is the digest of the version being built: other content in the folder is refused. Raises Invalid
    for a faulty adapter, Refused when memory is short.
    """
    started_ns = monotonic_ns()
    with open_adapter(folder, name=name) as source:
        opened_ns = monotonic_ns()
        packing = plan(source, layout)
        blob = Blob(packing.size_bytes, regions)
        try:
            report, digest = _fill(blob, source, packing, expected_digest)
            blob.seal()
        except BaseException:
            blob.release()
            raise
    modules = (target.module for target in source.targets)
    report = replace(
        report,
        packed_key=packed_key(digest, layout.for_modules(modules), generation),
        fetch_ns=opened_ns - started_ns,
        pack_ns=monotonic_ns() - opened_ns,
    )
    return Built(blob, packing, report)


def _fill(blob: Blob, source: AdapterSource, packing: PackPlan, expected: str | None) -> tuple[PackReport, str]:
    """Pack into a blob; return the report and the digest of what was packed. Other content is told before faults."""
    out, hashing = blob.array(numpy_dtype(packing.layout), packing.shape), Hashing(source)
    try:
        report = pack(source, packing, out, tensors=hashing)
    except Invalid:
        check_digest(source.name, hashing.digest(), expected)
        raise
    check_digest(source.name, digest := hashing.digest(), expected)
    return report, digest


def check_digest(adapter: str, digest: str, expected: str | None) -> None:
    """Raise Invalid unless a digest is the expected one; None accepts any."""
    if expected is not None and digest != expected:
        raise malformed(
            adapter,
            f"its folder now holds other content ({digest[:12]}) than the registered version ({expected[:12]}); "
            "register it as a new version",
        )
