from libc.stddef cimport ptrdiff_t, size_t
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libcpp.vector cimport vector

from dsline._cpp.error cimport raise_current_error


cdef extern from "dsline/expression.hpp" namespace "dsline" nogil:
    ctypedef uint8_t byte "std::byte"

    cdef enum CppElementType "dsline::ElementType":
        pass

    cdef enum CppExpressionOp "dsline::ExpressionOp":
        pass

    cdef cppclass CppExpressionStep "dsline::ExpressionStep":
        CppExpressionOp op
        CppElementType type
        uint16_t args[3]
        uint16_t column
        uint64_t constant

    cdef cppclass CppColumnView "dsline::ColumnView":
        const byte* data
        ptrdiff_t stride

    cdef cppclass CppRowsToKeep "dsline::RowsToKeep":
        const byte* source "from"
        ptrdiff_t stride
        byte* to
        size_t item_bytes

    cdef cppclass CppExpressionProgram "dsline::ExpressionProgram":
        CppExpressionProgram(vector[CppExpressionStep] steps, uint32_t columns) except +raise_current_error
        void evaluate(const CppColumnView* columns, size_t rows, byte* out) except +raise_current_error
        size_t filter(const CppColumnView* columns, size_t rows, const CppRowsToKeep* kept,
                      size_t kept_count) except +raise_current_error

    const char* expression_backend() noexcept
