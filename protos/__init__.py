"""The wire's messages. `protos.gen` is generated from the .proto files beside this one.

Our messages live in a descriptor pool of their own. Clients and helper packages in the same process bring the same
messages (`inference.*`, `grpc.health.v1.*`, `grpc.reflection.*`), and protobuf's default pool refuses a second file
that differs in any byte, such as another package path.
"""

from google.protobuf.descriptor_pool import DescriptorPool

POOL = DescriptorPool()
