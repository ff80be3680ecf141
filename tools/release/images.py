"""The images that a site needs, by digest, and what the product's own is built from."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import yaml

from deploy.try_dockerfile import ignored
from tools.release.archives import digest, pack
from tools.release.commands import Refused
from tools.release.source import CHART, Source

PINNED = re.compile(r"[^@\s]+@sha256:[0-9a-f]{64}")
DOCKERFILE = "deploy/Dockerfile"
LIST = "images.txt"


def needed(tree: Path) -> dict[str, str]:
    """Return the images of others that the Dockerfile and the chart name, each with what it is for."""
    tag = re.search(r"^ARG PYTHON_TAG=(\S+)$", (tree / DOCKERFILE).read_text(), re.MULTILINE)
    assert tag is not None
    values = yaml.safe_load((tree / CHART / "values.yaml").read_text())
    return {
        f"python:{tag[1]}": "the base that the image is built on",
        values["redis"]["bundled"]["image"]: "the chart's redis.bundled",
        values["envoy"]["image"]: "the chart's envoy.enabled",
    }


def pinned(tree: Path, given: list[str]) -> dict[str, str]:
    """Return the digest of each image that is needed, by its name. Raises Refused for one that is not given."""
    for image in given:
        if not PINNED.fullmatch(image):
            raise Refused(f"{image} is not NAME:TAG@sha256:DIGEST")
    digests: dict[str, str] = {}
    for name, digest_given in (image.split("@") for image in given):
        if digests.setdefault(name, digest_given) != digest_given:
            raise Refused(f"{name} has two digests, {digests[name]} and {digest_given}: leave one of them in IMAGES")
    wanted = needed(tree)
    for image in digests.keys() - wanted.keys():
        raise Refused(f"{image} is none of the images that are needed: {', '.join(wanted)}")
    for image in wanted:
        if image not in digests:
            command = f"docker buildx imagetools inspect {image} --format '{{{{.Manifest.Digest}}}}'"
            raise Refused(f"no digest of {image}: add {image}@$({command}) to IMAGES")
    return digests


def write_context(tree: Path, source: Source, digests: dict[str, str], output: Path, scratch: Path) -> Path:
    """Write what a builder is sent, with the base's digest as the Dockerfile's default; return the archive."""
    folder = scratch / f"lora-sidecar-image-{source.version}"
    lines = (tree / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line.strip() and not line.startswith("#")]
    for path in sorted(tree.rglob("*")):
        name = path.relative_to(tree).as_posix()
        if path.is_file() and (name in (DOCKERFILE, ".dockerignore") or not ignored(name, patterns)):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / name)
    (base,) = (digests[image] for image in digests if image.startswith("python:"))
    text = (folder / DOCKERFILE).read_text()
    (folder / DOCKERFILE).write_text(text.replace("\nARG PYTHON_DIGEST\n", f"\nARG PYTHON_DIGEST={base}\n"))
    return pack(folder, output / f"{folder.name}.tar.gz", source.epoch)


def write_list(tree: Path, source: Source, digests: dict[str, str], context: Path, target: Path) -> None:
    """Write which images to bring to a site, a line each: what to pull, and after # what for."""
    lines = [f"{image}@{digests[image]}  # {what}" for image, what in needed(tree).items()]
    lines.append(f"lora-sidecar:{source.version}  # built from {context.name}, sha256:{digest(context)}")
    target.write_text("\n".join(lines) + "\n")
