"""What `make release` and `make bundle` write is whole, the same each time, and read by other programs."""

from __future__ import annotations

import json
import re
import shlex
import sys
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.e2e.helm.installed import HELMS, HelmInstalled
from tests.e2e.installed import needed
from tests.e2e.release.conftest import NO_DIGEST, Tagged, run, without_network
from tools.release import images, packages, source


def test_all_of_it_is_there_and_has_its_sum(built: Path, tagged: Tagged) -> None:
    run("sha256sum", "--check", "--quiet", "--strict", "SHA256SUMS", cwd=built)
    version = tagged.version
    listed = {line.split()[1] for line in (built / "SHA256SUMS").read_text().splitlines()}
    assert listed == {path.relative_to(built).as_posix() for path in built.rglob("*") if path.is_file()} - {
        "SHA256SUMS"
    }
    assert {path.name for path in built.iterdir()} == {
        f"lora_sidecar-{version}-py3-none-any.whl",
        f"lora_sidecar-{version}.tar.gz",
        f"lora-sidecar-{version}.tgz",
        "chart",
        f"lora-sidecar-image-{version}.tar.gz",
        f"lora-sidecar-{version}.cdx.json",
        f"lora-sidecar-offline-{version}-py{sys.version_info[0]}.{sys.version_info[1]}-linux-x86_64.tar.gz",
        "images.txt",
        "NOTES.md",
        "SHA256SUMS",
    }


def test_built_again_wheel_and_sdist_are_the_same(built: Path, tagged: Tagged, tmp_path: Path) -> None:
    found = source.find(tagged.root, None)
    wheel = packages.build(found.export(tmp_path / "tree"), found, tmp_path, tmp_path)
    assert wheel.read_bytes() == (built / wheel.name).read_bytes()
    (sdist,) = tmp_path.glob("*.tar.gz")
    assert sdist.read_bytes() == (built / sdist.name).read_bytes()


def test_notes_are_the_changelogs(built: Path, tagged: Tagged) -> None:
    notes = (built / "NOTES.md").read_text()
    section = (tagged.root / "CHANGELOG.md").read_text().partition(f"## {tagged.version}\n")[2].partition("\n## ")[0]
    assert section.strip() in notes


def test_the_bill_of_materials_names_what_the_image_installs(built: Path, tagged: Tagged) -> None:
    """With licences; pip and setuptools, which the image does not keep, are not in it."""
    bill = json.loads((built / f"lora-sidecar-{tagged.version}.cdx.json").read_text())
    assert bill["bomFormat"] == "CycloneDX"
    assert bill["metadata"]["component"]["version"] == tagged.version
    components = {each["name"].lower().replace("_", "-"): each for each in bill["components"]}
    for name in ("grpcio", "numpy", "pydantic", "s3fs", "huggingface-hub"):
        assert components[name].get("licenses"), name
    assert not components.keys() & {"pip", "setuptools", "pytest"}


def test_a_builder_finds_all_that_the_dockerfile_copies(built: Path, tagged: Tagged, tmp_path: Path) -> None:
    with tarfile.open(built / f"lora-sidecar-image-{tagged.version}.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    (context,) = tmp_path.iterdir()
    text = (context / "deploy" / "Dockerfile").read_text()
    assert f"\nARG PYTHON_DIGEST={NO_DIGEST}\n" in text
    copied = re.findall(r"^COPY (?!--from)(.+)$", text, re.MULTILINE)
    sources = [word for line in copied for word in shlex.split(line)[:-1]]
    assert sources
    assert all((context / name).exists() for name in sources)
    assert not (context / "tests").exists()


def test_images_are_listed_by_digest(built: Path, tagged: Tagged) -> None:
    *others, own = (built / "images.txt").read_text().splitlines()
    assert [line.split()[0] for line in others] == [f"{name}@{NO_DIGEST}" for name in images.needed(tagged.root)]
    assert re.match(rf"lora-sidecar:{tagged.version}  # built from \S+, sha256:[0-9a-f]{{64}}$", own)


class Registry(BaseHTTPRequestHandler):
    """What of a registry's protocol a pull asks for, from an OCI image layout."""

    def __init__(self, layout: Path, *arguments: object) -> None:
        self._layout = layout
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        _, _, kind, reference = self.path.rsplit("/", 3)
        index = json.loads((self._layout / "index.json").read_text())
        if kind == "tags":
            self._send("application/json", json.dumps({"name": "charts/lora-sidecar", "tags": [_tag(index)]}).encode())
            return
        digest = index["manifests"][0]["digest"] if reference == _tag(index) else reference
        blob = self._layout / "blobs" / digest.replace(":", "/")
        if not blob.exists():
            self.send_error(404)
            return
        media_type = index["manifests"][0]["mediaType"] if kind == "manifests" else "application/octet-stream"
        self._send(media_type, blob.read_bytes(), digest)

    def do_HEAD(self) -> None:
        self.do_GET()

    def _send(self, media_type: str, content: bytes, digest: str | None = None) -> None:
        self.send_response(200)
        self.send_header("content-type", media_type)
        self.send_header("content-length", str(len(content)))
        if digest is not None:
            self.send_header("docker-content-digest", digest)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def _tag(index: dict) -> str:
    return index["manifests"][0]["annotations"]["org.opencontainers.image.ref.name"]


@contextmanager
def registry(layout: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Registry, layout)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"oci://127.0.0.1:{server.server_port}/charts/lora-sidecar"
        server.shutdown()


@pytest.mark.parametrize("helm", HELMS)
def test_helm_pulls_and_renders_the_layout(helm: str, built: Path, tagged: Tagged, tmp_path: Path) -> None:
    """From a registry that serves the layout's blobs as they are; what is pulled is the archive."""
    tools = needed(HelmInstalled)
    with registry(built / "chart") as address:
        homes = {f"HELM_{name}_HOME": str(tmp_path / name) for name in ("CACHE", "CONFIG", "DATA")}
        words = ("--version", tagged.version, "--plain-http")
        pulled = tools.run(helm, "pull", address, *words, "--destination", str(tmp_path), **homes)
        assert pulled.returncode == 0, pulled.stderr
        values = ("--set", "backends[0].url=triton://engine:8001")
        rendered = tools.run(helm, "template", "pool", address, *words, *values, **homes)
        assert rendered.returncode == 0, rendered.stderr
    archive = f"lora-sidecar-{tagged.version}.tgz"
    assert (tmp_path / archive).read_bytes() == (built / archive).read_bytes()
    assert f"helm.sh/chart: lora-sidecar-{tagged.version}\n" in rendered.stdout
    assert f"lora-sidecar:{tagged.version}" in rendered.stdout


def test_the_bundle_works_without_a_network(new: Path, unpacked: Path, tagged: Tagged, tmp_path: Path) -> None:
    """`install.sh` has run where nothing can be reached; the version and the demo, too."""
    assert run(new / "sidecar", "--version", cwd=tmp_path) == f"lora-sidecar {tagged.version}\n"
    told = run(*without_network(new / "sidecar", "demo"), cwd=tmp_path)
    assert "lora" in told.lower()
    assert {"README.md", "install.sh", "images.txt", "chart", "wheels"} <= {path.name for path in unpacked.iterdir()}


def test_a_damaged_bundle_is_not_installed(unpacked: Path, tmp_path: Path) -> None:
    """A file that is not what SHA256SUMS says ends the script before anything is made."""
    notes = unpacked / "NOTES.md"
    whole = notes.read_bytes()
    notes.write_bytes(whole + b"more")
    try:
        with pytest.raises(AssertionError, match=r"NOTES\.md"):
            run(unpacked / "install.sh", tmp_path / "venv", cwd=tmp_path, PYTHON=sys.executable)
    finally:
        notes.write_bytes(whole)
    assert not (tmp_path / "venv").exists()
