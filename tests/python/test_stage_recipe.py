"""The recipe of docs/design/stage-commit.md, with its steps in any interleaving of three workers that may be gone at any of them.

A worker that is gone leaves the words and the output as they are, and its messages come again. Deaths inside a step are in
tests/cpp/channel/stage_words_test.cpp.
"""

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import dsline
from dsline._core import StageWords

WORKERS = st.integers(0, 2)
MARKER = 17


class Stage(RuleBasedStateMachine):
    @initialize(tickets=st.sampled_from([0, 16, 0, 2, 1]))
    def make(self, tickets):
        self.inbox = dsline.ShmChannel(storage="heap", capacity=8, slot_size=64, max_deliveries=15, timeout=0)
        self.outbox = dsline.ShmChannel(storage="heap", capacity=8, slot_size=64, timeout=0)
        self.words = StageWords.create(1, 1, tickets=tickets)
        self.sent = []  # number of outputs of each message; None: a control frame
        self.lost = set()
        self.out = []  # (sequence, number of the output)
        self.running = [None] * 3
        self.held = [[], [], []]

    # --- the recipe; every yield is a place where the worker may stand still, or be gone ---

    def work(self, worker, message):
        self.held[worker].append(message)
        words, sequence = self.words, message.sequence
        control = message._core_kind == MARKER
        turn = sequence
        if words.tickets:
            turn = words.find_ticket(sequence) if message.redelivered else None
            yield
            while turn is None:
                turn = words.draw_ticket(self.inbox, sequence, 0, control=control)
                yield
                if turn is None:
                    earlier = self.inbox._core_take_between(0, sequence)
                    if earlier is not None:
                        yield from self.work(worker, earlier)
                    yield from self.look(worker)
        while not words.wait_turn(0, turn, 0):
            yield
            yield from self.look(worker)
        if words.done(0) == turn:
            yield
            yield from self.publish(message, turn, 1 if control else self.sent[sequence])
        message.release()
        self.held[worker].remove(message)
        yield
        words.acknowledged()

    def publish(self, message, turn, count):
        first = 0
        if message.redelivered:
            offset, (done,) = self.words.settle(0, self.outbox) or (0, (0,))
            if done > turn:
                self.words.commit(0, done)
                return
            first = offset if done == turn else 0
        for number in range(first, count):
            is_last = number == count - 1
            self.words.begin(0, self.outbox, 0 if is_last else number + 1, turn + is_last)
            yield
            self.outbox.send(b"%d %d" % (message.sequence, number))
            self.out.append(tuple(int(word) for word in self.outbox.recv_bytes().split()))
            yield
        self.words.commit(0, turn + 1)
        yield

    def look(self, worker):
        turn = self.words.done(0)
        sequence = self.words.sequence_of(turn) if self.words.tickets else turn
        if sequence is None:
            return
        yield
        message = self.inbox._core_take_between(sequence, sequence + 1)
        if message is not None:
            yield from self.work(worker, message)
        elif not self.inbox._core_is_outstanding(sequence):
            yield
            _, (done,) = self.words.settle(0, self.outbox) or (0, (0,))
            yield
            if done > turn:
                self.words.commit(0, done)
            else:
                self.words.skip_lost(0, turn)
            yield

    def gone(self, worker):
        self.running[worker].close()
        self.running[worker] = None
        for message in self.held[worker]:
            message.nack()
        self.held[worker].clear()

    # --- what may happen ---

    @precondition(lambda self: self.inbox.stats().free_slots > 0)
    @rule(outputs=st.sampled_from([1, 2, 3, None, 0]))
    def send(self, outputs):
        if outputs is None:
            self.inbox._core_send_control(MARKER, b"", 0)
        else:
            self.inbox.send(b"x")
        self.sent.append(outputs)

    @rule(worker=WORKERS, steps=st.integers(1, 4))
    def go_on(self, worker, steps):
        if self.running[worker] is None:
            try:
                message = self.inbox._core_recv_kept(0)
            except dsline.BufferEmptyError:
                return
            self.running[worker] = self.work(worker, message)
        for _ in range(steps):
            if next(self.running[worker], self) is self:
                self.running[worker] = None
                return

    @rule(worker=WORKERS)
    def die(self, worker):
        if self.running[worker] is not None:
            self.gone(worker)

    @rule(really=st.sampled_from([False, False, True]))
    def lose(self, really):
        """The oldest message that nobody holds is dropped."""
        if not really:
            return
        message = self.inbox._core_take_between(0, len(self.sent))
        if message is not None:
            self.lost.add(message.sequence)
            message.release()

    # --- what must hold ---

    @invariant()
    def every_output_is_there_once_and_in_its_place(self):
        if not hasattr(self, "out"):
            return
        assert len(set(self.out)) == len(self.out)
        if not self.words.tickets:
            assert self.out == sorted(self.out)
            return
        by_message = {}
        for sequence, number in self.out:
            assert by_message.setdefault(sequence, 0) == number
            by_message[sequence] += 1
        for place, (sequence, _) in enumerate(self.out):
            if self.sent[sequence] is None:
                assert all(before < sequence for before, _ in self.out[:place])
                assert all(behind > sequence for behind, _ in self.out[place + 1 :])

    def teardown(self):
        if not hasattr(self, "out"):
            return
        for worker in range(3):
            if self.running[worker] is not None and worker != 1:
                self.gone(worker)
        for _ in range(2000):
            if not self.inbox._core_anything_before(len(self.sent)):
                break
            self.go_on(1, 3)
            self.go_on(0, 3)
        assert not self.inbox._core_anything_before(len(self.sent)), "the stage stands still"
        self.every_output_is_there_once_and_in_its_place()
        wanted = {
            (sequence, number)
            for sequence, outputs in enumerate(self.sent)
            for number in range(1 if outputs is None else outputs)
        }
        missing = wanted - set(self.out)
        assert {sequence for sequence, _ in missing} <= self.lost
        assert set(self.out) <= wanted
        for worker in range(3):
            if self.running[worker] is not None:
                self.gone(worker)
        self.inbox.close()
        self.outbox.close()


TestStage = Stage.TestCase
TestStage.settings = settings(max_examples=80, stateful_step_count=80, deadline=None)
