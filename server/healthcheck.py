"""Asks a server whether it is SERVING, for container health checks: `python -m server.healthcheck HOST:PORT [SERVICE]`.

Exit code 0: it is; 1: it answers something else or not at all, with the reason on stderr; 2: bad usage.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import grpc

from protos.gen import health_pb2

TIMEOUT_S = 3.0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if len(arguments) not in (1, 2):
        print("usage: python -m server.healthcheck HOST:PORT [SERVICE]", file=sys.stderr)
        return 2
    address, service = arguments[0], arguments[1] if len(arguments) > 1 else ""
    with grpc.insecure_channel(address) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        try:
            status = check(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT_S).status
        except grpc.RpcError as error:
            print(f"{address}: {error.code().name}: {error.details()}", file=sys.stderr)
            return 1
    if status != health_pb2.HealthCheckResponse.SERVING:
        print(f"{address}: {health_pb2.HealthCheckResponse.ServingStatus.Name(status)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
