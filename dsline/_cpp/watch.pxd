from libc.stddef cimport size_t
from libc.stdint cimport int64_t
from libcpp cimport bool as cbool
from libcpp.memory cimport shared_ptr

from dsline._cpp.channel cimport CppChannel, Outcome
from dsline._cpp.error cimport raise_current_error


cdef extern from "dsline/watch.hpp" namespace "dsline" nogil:
    cdef enum CppSide "dsline::Side":
        SideMessage "dsline::Side::Message"
        SideRoom "dsline::Side::Room"

    cdef cppclass CppWatch "dsline::Watch":
        CppWatch(shared_ptr[CppChannel], CppSide) except +raise_current_error
        int descriptor() except +raise_current_error
        cbool arm() except +raise_current_error
        void arm_again() except +raise_current_error
        void clear() except +raise_current_error

    cdef cppclass CppWaited "dsline::Waited":
        CppChannel* channel
        CppSide side
        cbool is_ready

    size_t most_waited() noexcept
    Outcome wait_for_any(CppWaited*, size_t, int64_t, cbool) except +raise_current_error
    void pretend_old_kernel(cbool) noexcept
