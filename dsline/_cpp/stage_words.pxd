from libc.stdint cimport int64_t, uint32_t, uint64_t
from libcpp cimport bool as cbool
from libcpp.memory cimport shared_ptr

from dsline._cpp.channel cimport CppChannel, Outcome
from dsline._cpp.error cimport raise_current_error


cdef extern from "dsline/stage_words.hpp" namespace "dsline" nogil:
    cdef cppclass CppStageWords "dsline::StageWords":
        @staticmethod
        shared_ptr[CppStageWords] create(uint32_t, uint32_t, uint32_t) except +raise_current_error
        @staticmethod
        shared_ptr[CppStageWords] adopt(int) except +raise_current_error
        int descriptor() noexcept
        uint32_t inputs() noexcept
        uint32_t outputs() noexcept
        uint32_t tickets() noexcept

        uint64_t done(uint32_t) noexcept
        void set_done(uint32_t, uint64_t) noexcept
        void commit(uint32_t, uint64_t) noexcept
        cbool skip_lost(uint32_t, uint64_t) noexcept
        uint64_t lost(uint32_t) noexcept
        Outcome wait_turn(uint32_t, uint64_t, int64_t, cbool) noexcept
        void intend(uint32_t, uint64_t, uint64_t, const uint64_t*) noexcept
        cbool intended(uint32_t, uint64_t, uint64_t&, uint64_t*) noexcept

        Outcome draw(const CppChannel&, uint64_t, cbool, uint64_t&, int64_t, cbool) noexcept
        cbool find(uint64_t, uint64_t&) noexcept
        cbool sequence_of(uint64_t, uint64_t&) noexcept
        void acknowledged() noexcept

    const uint32_t kMostInputs "dsline::StageWords::kMostInputs"
