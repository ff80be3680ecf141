"""Ask an adapter by name and print the answer as it comes, then where it came from."""

import argparse
import sys

import grpc

from sidecar.proto import gateway_pb2, gateway_pb2_grpc


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("adapter", help='a name, "name@v1", or "" for the base model')
    parser.add_argument("prompt")
    parser.add_argument("--server", default="127.0.0.1:9000")
    arguments = parser.parse_args()
    request = gateway_pb2.GenerateRequest(adapter=arguments.adapter, text=arguments.prompt, max_tokens=48)
    with grpc.insecure_channel(arguments.server) as channel:
        try:
            for message in gateway_pb2_grpc.GatewayStub(channel).Generate(request):
                print(message.text, end="", flush=True)
                if message.HasField("origin"):
                    origin = message.origin
                    print(f"\n\n{origin.version or 'base model'} from {origin.backend}: adapter {origin.cache}")
        except grpc.RpcError as error:
            print(f"{error.code().name}: {error.details()}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
