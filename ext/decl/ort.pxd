# ort/abi.h and ort/library.h
from libc.stdint cimport uint64_t
from libcpp cimport bool
from libcpp.string cimport string
from libcpp.string_view cimport string_view
from libcpp.vector cimport vector

from status cimport Status


cdef extern from "ort/abi.h" namespace "tidegate::ort" nogil:
    cdef struct SlotName:
        int number
        const char* name

    const SlotName* kSlots
    size_t n_slots "std::size" (const SlotName* slots)


cdef extern from "ort/library.h" namespace "tidegate::ort" nogil:
    cdef cppclass Library:
        const string& version()
        const vector[string]& providers()

    Status OpenLibrary "tidegate::ort::Library::Open" (const string& path, bool record_calls) except +
    const Library* GetLibrary "tidegate::ort::Library::Get" ()
    uint64_t LibraryCalls "tidegate::ort::Library::calls" (int number)
    string c_CleanMessage "tidegate::ort::CleanMessage" (string_view message, const vector[string]& folders) except +
