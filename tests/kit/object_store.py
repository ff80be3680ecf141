"""A real HTTP S3 server (moto's) in a separate process, with empty buckets on demand."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print("%s:%s" % server.get_host_and_port(), flush=True)
sys.stdin.read()
"""


@contextmanager
def object_store() -> Iterator[str]:
    """Run the server and yield its address; it ends when its stdin is closed."""
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        address = process.stdout.readline().decode().strip()
        assert address, "moto's server did not start"
        try:
            yield address
        finally:
            process.kill()


def client(address: str) -> Any:
    """Return a client of the server."""
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=f"http://{address}",
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )


def put_folder(address: str, bucket: str, prefix: str, folder: Path, **options: Any) -> None:
    """Write a folder's files as objects."""
    for file in sorted(folder.iterdir()):
        client(address).put_object(Bucket=bucket, Key=f"{prefix}/{file.name}", Body=file.read_bytes(), **options)
