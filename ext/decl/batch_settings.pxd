# batch/settings.h, and what batch/batch_queue.h shows of a queue
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libcpp cimport bool
from libcpp.map cimport map
from libcpp.vector cimport vector


cdef extern from "batch/settings.h" namespace "tidegate" nogil:
    cdef enum class TimeoutAction(unsigned char):
        kReject
        kDelay

    cdef cppclass QueuePolicy:
        TimeoutAction timeout_action
        int64_t default_timeout_us
        bool allow_timeout_override
        uint32_t max_queue_size

    cdef cppclass BatchSettings:
        bool dynamic_batching
        uint32_t max_batch_rows
        vector[uint32_t] preferred_batch_sizes
        int64_t max_queue_delay_us
        bool preserve_ordering
        uint32_t priority_levels
        uint32_t default_priority_level
        QueuePolicy default_policy
        map[uint32_t, QueuePolicy] level_policies
        int64_t slo_us
        int64_t priority_aging_us
        uint32_t instances


cdef extern from "batch/batch_queue.h" namespace "tidegate" nogil:
    cdef cppclass QueueView:
        uint64_t waiting
        uint64_t waiting_rows
        uint64_t running_rows
        uint32_t knee
        uint32_t cap
        vector[int64_t] l50_ns
        vector[int64_t] l99_ns
