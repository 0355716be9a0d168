from libc.stdint cimport int64_t, uint32_t, uint64_t
from libcpp cimport bool as cbool
from libcpp.memory cimport shared_ptr

from dsline._cpp.channel cimport Outcome
from dsline._cpp.error cimport raise_current_error


cdef extern from "dsline/tally.hpp" namespace "dsline" nogil:
    cdef cppclass CppTally "dsline::Tally":
        @staticmethod
        shared_ptr[CppTally] create() except +raise_current_error
        @staticmethod
        shared_ptr[CppTally] adopt(int) except +raise_current_error
        int descriptor() noexcept

        void shut_down(cbool) noexcept
        cbool is_shut_down() noexcept
        cbool is_shut_down_at_once() noexcept

        void keep() except +raise_current_error
        void let_go() noexcept
        void sent() noexcept
        uint64_t own_pending() noexcept
        uint64_t pending() noexcept
        uint64_t waiting() noexcept
        cbool forget_the_dead() except +raise_current_error

        void take_part() except +raise_current_error
        void begin_put() noexcept
        void put_is_over(cbool entered) noexcept
        uint64_t unfinished() noexcept
        cbool finish_one() noexcept
        Outcome wait_until_finished(int64_t) noexcept

        uint32_t room_word() noexcept
        Outcome wait_for_room(uint32_t, int64_t) noexcept
        void tell_of_room() noexcept
