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
        OutcomeNotSynced "dsline::Outcome::NotSynced"

    cdef enum CppBackpressure "dsline::Backpressure":
        BackpressureBlock "dsline::Backpressure::Block"
        BackpressureRaise "dsline::Backpressure::Raise"
        BackpressureDropNewest "dsline::Backpressure::DropNewest"
        BackpressureDropOldest "dsline::Backpressure::DropOldest"

    cdef enum CppOnStale "dsline::OnStale":
        pass

    cdef enum CppStart "dsline::Start":
        pass

    cdef enum CppOnDeath "dsline::OnDeath":
        OnDeathRedeliver "dsline::OnDeath::Redeliver"
        OnDeathDrop "dsline::OnDeath::Drop"

    cdef enum CppOpenMode "dsline::OpenMode":
        pass

    cdef enum CppRemoval "dsline::Removal":
        pass

    const int kBytesMessage
    const int kArrayMessage
    const int kObjectMessage
    const int kEndMessage
    const int kGapMessage

    cdef cppclass CppChannelOptions "dsline::ChannelOptions":
        uint32_t capacity
        uint64_t slot_size
        uint64_t max_message_size
        uint32_t max_handles
        int checksum
        uint32_t mode
        CppOnStale on_stale
        uint64_t first_position
        uint32_t max_groups
        int history
        uint32_t max_deliveries
        int dead_letters
        int default_group
        int sync
        uint64_t default_slot_size
        string schema

    cdef cppclass CppSubscribeOptions "dsline::SubscribeOptions":
        string group
        CppStart start
        CppOnDeath on_death
        cbool durable

    cdef cppclass CppLoan "dsline::Loan":
        uint32_t slot
        uint32_t meta_bytes
        uint64_t payload_bytes
        void* meta
        void* payload
        const void* shown

    cdef enum CppAfterPublish "dsline::AfterPublish":
        AfterPublishLetGo "dsline::AfterPublish::LetGo"
        AfterPublishKeep "dsline::AfterPublish::Keep"

    cdef cppclass CppReceived "dsline::Received":
        uint32_t slot
        uint32_t attempts
        uint64_t sequence
        uint32_t process
        uint32_t group
        uint64_t word
        uint32_t meta_bytes
        uint64_t payload_bytes
        uint64_t schema_hash
        int64_t timestamp_ns
        int kind
        const void* payload
        const char* fault
        const void* meta() noexcept

    cdef cppclass CppPlace "dsline::Place":
        uint32_t slot
        uint64_t sequence

    cdef struct CppMemoryUse "dsline::MemoryUse":
        uint64_t used_bytes
        uint64_t idle_bytes
        uint32_t used_slots

    cdef struct CppChannelStats "dsline::ChannelStats":
        uint64_t depth
        uint64_t next_sequence
        uint64_t head_sequence
        uint64_t dropped_newest
        uint64_t dropped_oldest
        uint64_t lost
        uint64_t redelivered
        uint64_t unheard
        uint64_t buried
        uint64_t letters_dropped
        uint64_t deaths
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
        uint32_t dead_letters
        uint32_t kept_slots
        uint32_t participants

    cdef cppclass CppDeadLetter "dsline::DeadLetter":
        string group
        uint32_t last_pid
        cbool last_holder_died

    cdef struct CppDeath "dsline::Death":
        uint64_t number
        uint64_t noticed_ns
        uint64_t joined_ns
        uint64_t start_time
        uint32_t pid
        uint32_t participant
        string group
        uint32_t writing
        uint32_t held

    cdef struct CppParticipant "dsline::Report::Participant":
        uint32_t number
        uint32_t pid
        uint64_t start_time
        uint64_t joined_ns
        uint32_t waiting_on
        uint32_t group
        cbool alive
        uint32_t writing
        uint32_t kept
        uint32_t held
        int64_t held_for_ns

    cdef struct CppGroup "dsline::Report::Group":
        uint32_t number
        string name
        cbool active
        cbool durable
        cbool retention
        CppOnDeath on_death
        uint32_t members
        uint64_t cursor
        uint64_t lag
        uint32_t held
        uint32_t dead_letters
        uint64_t dropped_oldest
        uint64_t redelivered

    cdef struct CppHolder "dsline::Report::Holder":
        uint32_t group
        uint32_t participant
        uint32_t attempts
        int64_t for_ns

    cdef struct CppSlot "dsline::Report::Slot":
        uint32_t number
        string state
        uint32_t owner
        uint64_t sequence
        uint32_t pending
        uint64_t reserved_bytes
        vector[CppHolder] holders

    const uint32_t kNoGroup "dsline::Report::kNoGroup"

    cdef struct CppReport "dsline::Report":
        string path
        string storage
        string uuid
        uint64_t created_ns
        uint32_t creator_pid
        uint64_t slot_size
        uint64_t max_message_size
        uint64_t next_sequence
        uint32_t max_handles
        uint32_t history
        uint32_t max_deliveries
        cbool default_group
        cbool sync
        cbool shut_down
        cbool other_boot
        CppChannelStats stats
        vector[CppParticipant] participants
        vector[CppGroup] groups
        vector[CppSlot] slots

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

        shared_ptr[CppChannel] subscribe(const CppSubscribeOptions&) except +raise_current_error

        Outcome try_alloc(uint64_t, uint32_t, CppBackpressure, CppLoan&) except +raise_current_error
        Outcome try_alloc(uint64_t, uint32_t, CppBackpressure, CppLoan&, cbool for_copy) except +raise_current_error
        Outcome publish(const CppLoan&, int, uint64_t) noexcept
        Outcome publish(const CppLoan&, int, uint64_t, CppAfterPublish, cbool seal) except +raise_current_error
        cbool withhold(const CppLoan&) noexcept
        void end_keeping(const CppLoan&) noexcept
        cbool can_seal() noexcept
        cbool part_with_loans() noexcept
        void abort(const CppLoan&) noexcept
        Outcome try_send(const void*, uint64_t, int, const void*, uint32_t, uint64_t,
                         CppBackpressure) except +raise_current_error
        Outcome send(const void*, uint64_t, CppBackpressure, int64_t) except +raise_current_error

        Outcome try_recv(CppReceived&) except +raise_current_error
        void release(uint32_t, uint32_t, uint32_t) noexcept
        void give_back(const CppReceived&) noexcept
        void put_back(const CppReceived&) noexcept
        cbool is_last_to_circulate() noexcept

        Outcome try_take_dead_letter(CppReceived&, CppDeadLetter&) except +raise_current_error
        void revive(const CppReceived&) noexcept

        Outcome try_read_latest(cbool, uint64_t, CppReceived&) except +raise_current_error
        cbool is_unchanged(const CppReceived&) noexcept
        uint64_t payload_offset(const CppReceived&) noexcept
        Outcome wait_for_newer(cbool, uint64_t, int64_t, cbool) except +raise_current_error

        cbool anyone_entering() noexcept
        uint64_t end_of_order() noexcept
        cbool is_outstanding(uint64_t) noexcept
        uint64_t first_available() noexcept
        cbool anything_outstanding_before(uint64_t) noexcept
        cbool any_control_before(uint64_t) noexcept

        Outcome wait_for_space(int64_t, cbool) except +raise_current_error
        Outcome wait_for_message(int64_t, cbool) except +raise_current_error
        void pass_on_wake() noexcept

        Outcome try_place(const void*, uint64_t, uint64_t, CppPlace&) except +raise_current_error
        Outcome try_take_between(uint64_t, uint64_t, CppReceived&) except +raise_current_error
        Outcome try_take_into(const CppPlace&, void*, uint64_t) except +raise_current_error
        Outcome publish_placed "publish"(const CppLoan&, int, uint64_t, CppPlace&) noexcept
        cbool try_withdraw(const CppPlace&) noexcept
        cbool is_there(const CppPlace&) noexcept
        uint32_t discard_older(int64_t) noexcept
        CppMemoryUse memory_use() noexcept
        void trim() noexcept

        void shutdown(cbool) except +raise_current_error
        cbool is_shut_down() noexcept
        void close() noexcept
        cbool is_closed() noexcept
        @staticmethod
        void abandon_all() noexcept
        void unlink() except +raise_current_error
        void refuse_calls() noexcept

        cbool check_peers() noexcept
        uint64_t deaths() noexcept
        vector[CppDeath] deaths_since(uint64_t) except +raise_current_error
        void remove_group(const string&) except +raise_current_error
        CppReport report() except +raise_current_error
        @staticmethod
        CppReport report_of(const string&) except +raise_current_error
        @staticmethod
        CppRemoval remove_channel(const string&, int64_t, cbool, cbool) except +raise_current_error

        uint64_t depth() noexcept
        cbool is_full() noexcept
        CppChannelStats stats() noexcept
        uint32_t capacity() noexcept
        uint64_t slot_size() noexcept
        uint64_t max_message_size() noexcept
        uint32_t max_handles() noexcept
        int checksum() noexcept
        uint32_t history() noexcept
        uint32_t max_deliveries() noexcept
        cbool has_default_group() noexcept
        cbool is_synced() noexcept
        const string& schema() noexcept
        string group() except +raise_current_error
        cbool can_receive() noexcept
        string storage() except +raise_current_error
        string label() except +raise_current_error
        string path() except +raise_current_error
        string uuid() except +raise_current_error
        int descriptor() noexcept

    uint64_t available_memory() except +raise_current_error
    string channel_directory() except +raise_current_error
    vector[string] list_channels() except +raise_current_error
