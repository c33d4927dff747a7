# server.settings.BatchSettings -> BatchSettings, and a queue's view -> a dict.

from batch_settings cimport BatchSettings, QueuePolicy, QueueView, TimeoutAction


cdef QueuePolicy to_queue_policy(object settings) except *:
    cdef QueuePolicy policy
    policy.timeout_action = TimeoutAction.kDelay if settings.delay else TimeoutAction.kReject
    policy.default_timeout_us = settings.default_timeout_us
    policy.allow_timeout_override = settings.allow_timeout_override
    policy.max_queue_size = settings.max_queue_size
    return policy


cdef int to_batch_settings(object settings, BatchSettings* out) except -1:
    out.dynamic_batching = settings.dynamic_batching
    out.max_batch_rows = settings.max_batch_rows
    out.preferred_batch_sizes.clear()
    for size in settings.preferred_batch_sizes:
        out.preferred_batch_sizes.push_back(size)
    out.max_queue_delay_us = settings.max_queue_delay_us
    out.preserve_ordering = settings.preserve_ordering
    out.priority_levels = settings.priority_levels
    out.default_priority_level = settings.default_priority_level
    out.default_policy = to_queue_policy(settings.default_policy)
    out.level_policies.clear()
    for level, policy in settings.level_policies.items():
        out.level_policies[level] = to_queue_policy(policy)
    out.slo_us = settings.slo_us
    out.priority_aging_us = settings.priority_aging_us
    return 0


cdef object to_queue_view(const QueueView& view):
    return {
        "waiting": view.waiting,
        "waiting_rows": view.waiting_rows,
        "running_rows": view.running_rows,
        "knee": view.knee,
        "cap": view.cap,
        "l50_ns": tuple(view.l50_ns),
        "l99_ns": tuple(view.l99_ns),
    }
