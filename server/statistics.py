"""Per-version counters of the native core -> the ModelStatistics message.

Durations are sums in nanoseconds. `success` and `fail` count requests from their arrival, `queue` and `compute_*` the
successful requests' shares; `inference_count` counts rows and `execution_count` batches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from protos.gen import grpc_service_pb2 as pb

if TYPE_CHECKING:
    from server.placement import Placement


def model_statistics(placement: Placement) -> pb.ModelStatistics:
    """The statistics of one loaded version."""
    counted = placement.native.statistics()
    n_success = counted.success_count
    return pb.ModelStatistics(
        name=placement.name,
        version=placement.version,
        last_inference=counted.last_inference_ms,
        inference_count=counted.inference_count,
        execution_count=counted.execution_count,
        inference_stats=pb.InferStatistics(
            success=_duration(n_success, counted.success_ns),
            fail=_duration(counted.fail_count, counted.fail_ns),
            queue=_duration(counted.queue_count, counted.queue_ns),
            compute_input=_duration(n_success, counted.compute_input_ns),
            compute_infer=_duration(n_success, counted.compute_infer_ns),
            compute_output=_duration(n_success, counted.compute_output_ns),
            # No response cache: sent as zeros because clients print them.
            cache_hit=_duration(0, 0),
            cache_miss=_duration(0, 0),
        ),
        batch_stats=[
            pb.InferBatchStatistics(
                batch_size=batch.batch_size,
                compute_input=_duration(batch.count, batch.compute_input_ns),
                compute_infer=_duration(batch.count, batch.compute_infer_ns),
                compute_output=_duration(batch.count, batch.compute_output_ns),
            )
            for batch in counted.batches
            if batch.count
        ],
        memory_usage=[_memory(placement)],
    )


def _duration(count: int, ns: int) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=count, ns=ns)


def _memory(placement: Placement) -> pb.MemoryUsage:
    """The version's memory under the device of its first instance group.

    What is measured is one sum; it is not split between the devices of a version that has several.
    """
    device = placement.settings.instance_groups[0].session.device_id
    return pb.MemoryUsage(
        type="CPU" if device < 0 else "GPU", id=max(device, 0), byte_size=placement.memory_bytes
    )
