from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libcpp cimport bool as cbool
from libcpp.memory cimport shared_ptr
from libcpp.string cimport string
from libcpp.vector cimport vector

from dsline._cpp.error cimport raise_current_error


cdef extern from "dsline/channel.hpp" namespace "dsline" nogil:
    cdef enum Outcome "dsline::Outcome":
        OutcomeOk "dsline::Outcome::Ok"
        OutcomeEmpty "dsline::Outcome::Empty"
        OutcomeFull "dsline::Outcome::Full"
        OutcomeClosed "dsline::Outcome::Closed"
        OutcomeDropped "dsline::Outcome::Dropped"
        OutcomeCorrupted "dsline::Outcome::Corrupted"
        OutcomeTimedOut "dsline::Outcome::TimedOut"
        OutcomeInterrupted "dsline::Outcome::Interrupted"

    cdef enum CppBackpressure "dsline::Backpressure":
        BackpressureBlock "dsline::Backpressure::Block"
        BackpressureRaise "dsline::Backpressure::Raise"
        BackpressureDropNewest "dsline::Backpressure::DropNewest"
        BackpressureDropOldest "dsline::Backpressure::DropOldest"

    cdef enum CppOnStale "dsline::OnStale":
        pass

    cdef enum CppOpenMode "dsline::OpenMode":
        pass

    const int kBytesMessage
    const int kArrayMessage

    cdef cppclass CppChannelOptions "dsline::ChannelOptions":
        uint32_t capacity
        uint64_t slot_size
        uint64_t max_message_size
        uint32_t max_handles
        int checksum
        uint32_t mode
        CppOnStale on_stale
        uint64_t first_position

    cdef cppclass CppLoan "dsline::Loan":
        uint32_t slot
        uint32_t meta_bytes
        uint64_t payload_bytes
        void* meta
        void* payload

    cdef cppclass CppReceived "dsline::Received":
        uint32_t slot
        uint32_t attempts
        uint64_t sequence
        uint32_t process
        uint32_t meta_bytes
        uint64_t payload_bytes
        uint64_t schema_hash
        int64_t timestamp_ns
        int kind
        const void* payload
        const char* fault
        const void* meta() noexcept

    cdef cppclass CppChannelStats "dsline::ChannelStats":
        uint64_t depth
        uint64_t next_sequence
        uint64_t head_sequence
        uint64_t dropped_newest
        uint64_t dropped_oldest
        uint64_t redelivered
        uint64_t corrupted
        uint64_t send_waits
        uint64_t recv_waits
        uint64_t reserved_bytes
        uint32_t free_slots
        uint32_t writing_slots
        uint32_t committed_slots
        uint32_t pinned_slots
        uint32_t corrupted_slots
        uint32_t pinned_by_me
        uint32_t participants

    cdef cppclass CppChannel "dsline::Channel":
        @staticmethod
        shared_ptr[CppChannel] open_named(const string&, const CppChannelOptions&, CppOpenMode) except +raise_current_error
        @staticmethod
        shared_ptr[CppChannel] open_file(const string&, const CppChannelOptions&, CppOpenMode) except +raise_current_error
        @staticmethod
        shared_ptr[CppChannel] create_anonymous(const CppChannelOptions&) except +raise_current_error
        @staticmethod
        shared_ptr[CppChannel] adopt_anonymous(int) except +raise_current_error
        @staticmethod
        shared_ptr[CppChannel] create_heap(const CppChannelOptions&) except +raise_current_error

        Outcome try_alloc(uint64_t, uint32_t, CppBackpressure, CppLoan&) except +raise_current_error
        Outcome publish(const CppLoan&, int, uint64_t) noexcept
        void abort(const CppLoan&) noexcept
        Outcome try_send(const void*, uint64_t, int, const void*, uint32_t, uint64_t,
                         CppBackpressure) except +raise_current_error
        Outcome send(const void*, uint64_t, CppBackpressure, int64_t) except +raise_current_error

        Outcome try_recv(CppReceived&) except +raise_current_error
        void release(uint32_t, uint32_t) noexcept
        void give_back(const CppReceived&) noexcept

        Outcome wait_for_space(int64_t, cbool) except +raise_current_error
        Outcome wait_for_message(int64_t, cbool) except +raise_current_error
        void pass_on_wake() noexcept

        void shutdown(cbool) except +raise_current_error
        cbool is_shut_down() noexcept
        void close() noexcept
        cbool is_closed() noexcept
        @staticmethod
        void abandon_all() noexcept
        void unlink() except +raise_current_error

        uint64_t depth() noexcept
        cbool is_full() noexcept
        CppChannelStats stats() noexcept
        uint32_t capacity() noexcept
        uint64_t slot_size() noexcept
        uint64_t max_message_size() noexcept
        uint32_t max_handles() noexcept
        int checksum() noexcept
        string storage() except +raise_current_error
        string label() except +raise_current_error
        string path() except +raise_current_error
        string uuid() except +raise_current_error
        int descriptor() noexcept

    string channel_directory() except +raise_current_error
    vector[string] list_channels() except +raise_current_error
