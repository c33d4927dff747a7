"""Our messages are the clients' messages, and both fit into one process."""

import subprocess
import sys
from types import ModuleType

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto

from protos import POOL

OURS = "from protos.gen import grpc_service_pb2, health_pb2, model_config_pb2, reflection_pb2, reflection_v1alpha_pb2"
CLIENT = "import tritonclient.grpc, tritonclient.grpc.aio"
HEALTH = "from grpc_health.v1 import health_pb2, health_pb2_grpc"
REFLECTION = "from grpc_reflection.v1alpha import reflection_pb2"


def wire_of(file: FileDescriptorProto) -> tuple[list[bytes], dict[str, list[bytes]]]:
    """What of a file reaches the wire, without the order of declaration."""
    return (
        sorted(message.SerializeToString(deterministic=True) for message in file.message_type),
        {
            service.name: sorted(method.SerializeToString(deterministic=True) for method in service.method)
            for service in file.service
        },
    )


def proto_of(module: ModuleType) -> FileDescriptorProto:
    return FileDescriptorProto.FromString(module.DESCRIPTOR.serialized_pb)


@pytest.mark.parametrize(
    "order",
    [
        (OURS, CLIENT, HEALTH, REFLECTION),
        (CLIENT, OURS, HEALTH, REFLECTION),
        (HEALTH, REFLECTION, OURS, CLIENT),
        (REFLECTION, HEALTH, CLIENT, OURS),
    ],
)
def test_messages_and_clients_are_imported_in_any_order(order: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, "-c", "\n".join(order)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("name", "theirs"), [("grpc_service", "service"), ("model_config", "model_config")])
def test_files_equal_the_clients_byte_for_byte(name: str, theirs: str) -> None:
    import importlib

    ours = importlib.import_module(f"protos.gen.{name}_pb2").DESCRIPTOR
    client = importlib.import_module(f"tritonclient.grpc.{theirs}_pb2").DESCRIPTOR
    assert ours.name == client.name == f"{name}.proto"
    assert FileDescriptorProto.FromString(ours.serialized_pb) == FileDescriptorProto.FromString(client.serialized_pb)
    assert ours.serialized_pb == client.serialized_pb


def test_health_has_all_that_the_official_package_has() -> None:
    from grpc_health.v1 import health_pb2 as theirs

    from protos.gen import health_pb2 as ours

    our_messages, our_services = wire_of(proto_of(ours))
    their_messages, their_services = wire_of(proto_of(theirs))
    # Older releases of the package have no List.
    assert set(their_messages) <= set(our_messages)
    assert set(their_services["Health"]) <= set(our_services["Health"])


def test_reflection_equals_the_official_package() -> None:
    from grpc_reflection.v1alpha import reflection_pb2 as theirs

    from protos.gen import reflection_v1alpha_pb2 as ours

    assert wire_of(proto_of(ours)) == wire_of(proto_of(theirs))


def test_both_reflection_packages_have_the_same_messages() -> None:
    from protos.gen import reflection_pb2, reflection_v1alpha_pb2

    # The text form, because a shorter package name changes the lengths in the bytes.
    v1, v1alpha = proto_of(reflection_pb2), proto_of(reflection_v1alpha_pb2)
    v1.ClearField("name")
    v1alpha.ClearField("name")
    assert str(v1alpha).replace("v1alpha", "v1") == str(v1)


def test_our_pool_knows_every_service() -> None:
    import protos.gen.grpc_service_pb2
    import protos.gen.health_pb2
    import protos.gen.reflection_pb2
    import protos.gen.reflection_v1alpha_pb2  # noqa: F401

    for service in (
        "inference.GRPCInferenceService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
    ):
        assert POOL.FindServiceByName(service).full_name == service


def test_a_message_goes_from_their_classes_to_ours_and_back() -> None:
    from tritonclient.grpc import service_pb2 as theirs

    from protos.gen import grpc_service_pb2 as ours

    request = theirs.ModelInferRequest(model_name="m", raw_input_contents=[b"\x00"])
    request.parameters["priority"].uint64_param = 3
    same = ours.ModelInferRequest.FromString(request.SerializeToString())
    assert same.parameters["priority"].uint64_param == 3
    assert same.SerializeToString() == request.SerializeToString()
