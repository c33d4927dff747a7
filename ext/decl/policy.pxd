# batch/policy.h
from libc.stdint cimport int64_t, uint32_t
from libcpp cimport bool


cdef extern from "util/clock.h" namespace "tidegate" nogil:
    const int64_t kNever


cdef extern from "batch/policy.h" namespace "tidegate" nogil:
    const int64_t kSlackNs
    const int64_t kLongAgo
    const uint32_t kTrustedRuns
    const int kMaxSizes

    cdef cppclass SizesArray "std::array<uint32_t, tidegate::kMaxSizes>":
        uint32_t& operator[](size_t size)

    cdef cppclass TimesArray "std::array<int64_t, tidegate::kMaxSizes>":
        int64_t& operator[](size_t size)

    cdef cppclass c_Prediction "tidegate::Prediction":
        int n
        SizesArray sizes
        TimesArray l50_ns
        TimesArray l99_ns
        int64_t beta_ns
        uint32_t knee
        uint32_t cap
        bool trusted
        int64_t L50(uint32_t rows) const
        int64_t L99(uint32_t rows) const

    uint32_t Rank(uint32_t list, int64_t listed_ns, int64_t aging_ns, int64_t now_ns)

    cdef cppclass PlanLimits:
        int64_t max_delay_ns
        uint32_t preferred_rows

    cdef cppclass Candidate:
        uint32_t rows
        int64_t due_ns
        int64_t half_ns

    cdef cppclass CandidateSpan "std::span<const tidegate::Candidate>":
        CandidateSpan()
        CandidateSpan(const Candidate* data, size_t size)

    cdef cppclass PlanView:
        CandidateSpan candidates
        bool all_waiting
        bool draining
        int64_t head_arrived_ns
        int64_t start_by_ns
        int64_t last_start_ns
        int64_t last_refusal_ns
        int64_t expected_gap_ns
        bool other_work

    cdef enum class Action:
        kIdle
        kDrop
        kHold
        kDispatch

    cdef cppclass c_Decision "tidegate::Decision":
        Action action
        uint32_t count
        uint32_t index
        bool probe
        int64_t until_ns

    int64_t PauseNs(int64_t l99_ns)
    c_Decision Plan(const PlanLimits& limits, const c_Prediction& prediction, const PlanView& view, int64_t now_ns)
