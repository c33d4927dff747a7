# batch/node_load.h, batch/batch_queue.h and what a queue needs of infer/request.h
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libcpp cimport bool
from libcpp.vector cimport vector

from batch_settings cimport BatchSettings, QueueView
from status cimport Status


cdef extern from "infer/request.h" namespace "tidegate" nogil:
    cdef cppclass QueuedTimes "tidegate::RequestTimes":
        int64_t arrived_ns

    cdef cppclass CancelledFlag "std::atomic<bool>":
        void store(bool value)

    cdef cppclass QueuedName "tidegate::StreamRef":
        uint32_t slot

    # As a queue sees it; codec.pxd declares what the codec sees.
    cdef cppclass QueuedRequest "tidegate::Request":
        QueuedRequest() except +
        uint32_t rows
        uint32_t priority
        int64_t timeout_us
        uint64_t shape_key
        int64_t due_ns
        QueuedTimes times
        CancelledFlag cancelled
        QueuedName stream
        Status status

    cdef cppclass RequestList:
        void PushBack(QueuedRequest* request)
        QueuedRequest* PopFront()


cdef extern from "batch/node_load.h" namespace "tidegate" nogil:
    cdef cppclass NodeLoad:
        NodeLoad(bool measure_cpu) except +


cdef extern from "batch/batch_queue.h" namespace "tidegate" nogil:
    cdef cppclass Batch:
        vector[QueuedRequest*] requests
        uint32_t rows
        vector[QueuedRequest*] dropped

    cdef cppclass c_BatchQueue "tidegate::BatchQueue":
        c_BatchQueue(const BatchSettings& settings, NodeLoad& node) except +
        int64_t SetDeadlines(QueuedRequest* request) const
        void Push(RequestList* arrivals, RequestList* refused, int64_t now_ns) except +
        bool Remove(QueuedRequest* request, vector[QueuedRequest*]* ready) except +
        int64_t TryTake(uint32_t instance, int64_t now_ns, Batch* batch) except +
        void Finished(uint32_t instance, uint32_t rows, int64_t run_ns, bool ok, int64_t now_ns) except +
        void Release(QueuedRequest* request, vector[QueuedRequest*]* ready) except +
        void Close()
        QueueView View() except +
