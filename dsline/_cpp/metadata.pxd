from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint64_t
from libcpp cimport bool as cbool
from libcpp.string cimport string
from libcpp.vector cimport vector

from dsline._cpp.error cimport raise_current_error


cdef extern from "dsline/metadata.hpp" namespace "dsline::frames" nogil:
    cdef cppclass CppTag "dsline::frames::Tag":
        string key
        int kind
        int64_t i
        double f
        string s

    cdef cppclass CppMetadata "dsline::frames::Metadata":
        string dtype_code
        cbool has_shape
        vector[int64_t] shape
        cbool fortran
        cbool has_columns
        vector[string] columns
        cbool has_encoding
        string encoding
        vector[CppTag] tags
        uint64_t itemsize

    cdef cppclass CppMetadataBuilder "dsline::frames::MetadataBuilder":
        void add_dtype(const string&) except +raise_current_error
        void add_shape(const int64_t*, size_t) except +raise_current_error
        void add_strides(const int64_t*, size_t) except +raise_current_error
        void add_columns(const vector[string]&) except +raise_current_error
        void add_encoding(const string&) except +raise_current_error
        void add_tag_none(const string&) except +raise_current_error
        void add_tag_bool(const string&, cbool) except +raise_current_error
        void add_tag_int(const string&, int64_t) except +raise_current_error
        void add_tag_float(const string&, double) except +raise_current_error
        void add_tag_str(const string&, const string&) except +raise_current_error
        void add_tag_bytes(const string&, const string&) except +raise_current_error
        const string& bytes() noexcept

    const int kPaddingEntry

    cbool parse_metadata(const void*, size_t, CppMetadata&, string&) except +raise_current_error
    cbool array_bytes(const CppMetadata&, uint64_t&) noexcept
    uint64_t schema_hash(const void*, size_t) noexcept
