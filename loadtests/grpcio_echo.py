"""The reference that Python users know: an echo of bytes on grpcio's asyncio server. Prints its port when ready."""

from __future__ import annotations

import asyncio
import json
import signal

import grpc
import grpc.aio

METHOD = "/inference.GRPCInferenceService/ModelInfer"


class _AnyMethod(grpc.GenericRpcHandler):
    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        if handler_call_details.method != METHOD:
            return None
        return grpc.unary_unary_rpc_method_handler(_echo)


async def _echo(message: bytes, _context: grpc.aio.ServicerContext) -> bytes:
    return message


async def main() -> None:
    """Serves until SIGTERM."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers((_AnyMethod(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    print(json.dumps({"grpc_port": port}), flush=True)
    await stopping.wait()
    await server.stop(grace=1.0)


if __name__ == "__main__":
    asyncio.run(main())
