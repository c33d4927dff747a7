# infer/tensor.h and infer/model_spec.h
from libc.stdint cimport int64_t, uint8_t, uint32_t
from libcpp cimport bool
from libcpp.string cimport string
from libcpp.string_view cimport string_view
from libcpp.vector cimport vector


cdef extern from "infer/tensor.h" namespace "tidegate" nogil:
    cdef enum class DataType(uint8_t):
        kInvalid
        kBytes

    const int kMaxRank
    size_t ElementBytes(DataType type)
    string_view WireName(DataType type)

    cdef cppclass DimsArray "std::array<int64_t, tidegate::kMaxRank>":
        int64_t& operator[](size_t index)

    cdef cppclass Dims:
        uint8_t rank
        DimsArray d


cdef extern from "infer/model_spec.h" namespace "tidegate" nogil:
    const size_t kMaxInputs
    const size_t kMaxOutputs

    cdef cppclass TensorSpec:
        string name
        DataType type
        Dims dims
        Dims model_dims

    cdef cppclass ModelSpec:
        string name
        string version
        uint32_t max_batch_size
        vector[TensorSpec] inputs
        vector[TensorSpec] outputs
        bool has_free_dims
