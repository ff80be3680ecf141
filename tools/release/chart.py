"""The chart: packed by Helm, and as an OCI image layout, which registries' tools copy as it is.

Helm pushes charts to a registry only, so the layout is written here: three blobs and an index
(https://github.com/opencontainers/image-spec/blob/main/image-layout.md, media types of https://helm.sh/docs/topics/registries/).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from tools.release.archives import digest, repack
from tools.release.commands import run
from tools.release.source import CHART, Source

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.cncf.helm.config.v1+json"
CONTENT = "application/vnd.cncf.helm.chart.content.v1.tar+gzip"


def package(tree: Path, helm: Path, source: Source, output: Path, scratch: Path) -> Path:
    """Pack the chart and return the archive; Helm checks it."""
    run(helm, "package", tree / CHART, "--destination", output)
    archive = output / f"lora-sidecar-{source.version}.tgz"
    repack(archive, scratch / "chart", source.epoch)  # Helm 3 writes the time of packing
    return archive


def layout(tree: Path, archive: Path, source: Source, folder: Path) -> None:
    """Write the OCI image layout of a packed chart; its manifest is referred to by the version."""
    about = yaml.safe_load((tree / CHART / "Chart.yaml").read_text())
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    content = {"mediaType": CONTENT, "digest": f"sha256:{digest(archive)}", "size": archive.stat().st_size}
    shutil.copyfile(archive, blobs / digest(archive))
    annotations = {
        "org.opencontainers.image.title": about["name"],
        "org.opencontainers.image.version": about["version"],
        "org.opencontainers.image.description": about["description"],
        "org.opencontainers.image.revision": source.commit,
        "org.opencontainers.image.created": datetime.fromtimestamp(source.epoch, UTC).isoformat(),
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": _write(blobs, CONFIG, about),
        "layers": [content],
        "annotations": annotations,
    }
    reference = {"org.opencontainers.image.ref.name": source.version}
    index = {
        "schemaVersion": 2,
        "mediaType": INDEX,
        "manifests": [_write(blobs, MANIFEST, manifest) | {"annotations": reference}],
    }
    (folder / "index.json").write_text(json.dumps(index))
    (folder / "oci-layout").write_text(json.dumps({"imageLayoutVersion": "1.0.0"}))


def _write(blobs: Path, media_type: str, content: dict[str, Any]) -> dict[str, Any]:
    """Write a blob of JSON and return its descriptor."""
    written = json.dumps(content).encode()
    name = hashlib.sha256(written).hexdigest()
    (blobs / name).write_bytes(written)
    return {"mediaType": media_type, "digest": f"sha256:{name}", "size": len(written)}
