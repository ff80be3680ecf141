#!/bin/sh
# Regenerates sidecar/proto from proto/; OUT may name another folder (the test that proves the code current does so).
set -eu
cd "$(dirname "$0")/.."
out=${OUT:-.}
python=${PYTHON:-.venv/bin/python}
mkdir -p "$out/sidecar/proto"
# The folder is given its import path by the virtual path mapping, so that generated imports read sidecar.proto.….
"$python" -m grpc_tools.protoc -I sidecar/proto=proto/lorasidecar/v1 \
  --python_out="$out" --pyi_out="$out" --grpc_python_out="$out" \
  sidecar/proto/gateway.proto sidecar/proto/admin.proto sidecar/proto/peers.proto
# Its services are Envoy's, and are served by their own names.
"$python" -m grpc_tools.protoc -I sidecar/proto=proto/lorasidecar/v1 \
  --python_out="$out" --pyi_out="$out" sidecar/proto/envoy.proto
