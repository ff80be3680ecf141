"""`make release` and `make bundle`: build what is checked out into dist/VERSION.

Everything is built from the commit's files, not from the working tree, and carries the commit's time: whoever builds a
commit with the same tools and images gets the same bytes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from tools.release import bundle, chart, images, packages, source
from tools.release.archives import write_sums
from tools.release.commands import Refused

ROOT = Path(__file__).resolve().parents[2]
HELM = Path(os.environ.get("HELM_VENV") or ROOT / ".venv-helm") / "bin" / "helm4"


def release(version: str | None, given: list[str], extras: list[str] | None) -> Path:
    """Build a release, and its bundle if `extras` is a list; return the folder. Raises Refused."""
    found = source.find(ROOT, version)
    with tempfile.TemporaryDirectory(prefix="lora-sidecar-release-") as name:
        scratch = Path(name)
        tree = found.export(scratch / "tree")
        source.check_versions(tree, found.version)
        notes = source.notes(tree, found.version)
        digests = images.pinned(tree, given)
        built = scratch / found.version
        built.mkdir()
        wheel = packages.build(tree, found, built, scratch)
        packages.bill_of_materials(tree, wheel, built / f"lora-sidecar-{found.version}.cdx.json", scratch)
        archive = chart.package(tree, HELM, found, built, scratch)
        chart.layout(tree, archive, found, built / "chart")
        context = images.write_context(tree, found, digests, built, scratch)
        images.write_list(tree, found, digests, context, built / images.LIST)
        (built / "NOTES.md").write_text(f"# lora-sidecar {found.version}\n\nCommit {found.commit}.\n\n{notes}")
        if extras is not None:
            bundle.bundle(tree, found, built, extras, scratch)
        write_sums(built)
        # What is there is replaced only by a whole release.
        target = ROOT / "dist" / found.version
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(exist_ok=True)
        shutil.move(built, target)
    return target


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.release", description=__doc__)
    parser.add_argument("--version", help="default: that of the tag on what is checked out")
    parser.add_argument("--image", action="append", default=[], metavar="NAME:TAG@sha256:DIGEST")
    parser.add_argument("--bundle", action="store_true", help="also for sites without internet")
    parser.add_argument("--extra", action="append", default=[], help=f"of the bundle: {', '.join(bundle.ORIGINS)}")
    options = parser.parse_args()
    try:
        folder = release(options.version, options.image, options.extra if options.bundle else None)
    except Refused as refused:
        print(f"make release: {refused}", file=sys.stderr)
        return 1
    for path in sorted(folder.iterdir()):
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
