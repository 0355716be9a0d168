"""SIGKILL: the stream goes on, what the dead held comes back flagged, and no slot is lost.

Deaths at random points of loops; the C++ suite has those at each step. Only processes started here are killed.
"""

import random
import struct
from collections import Counter

import pytest
from support import TIMEOUT, Child, check_proof, proof, wait_until

import dsline
from dsline._core import list_names


def drain(channel):
    """Receive until nothing comes for a while, in which the dead are looked for: [(producer, number, redelivered)]."""
    got = []
    while True:
        try:
            message = channel.recv_message(timeout=0.3)
        except dsline.BufferEmptyError:
            return got
        with message:
            got.append((*check_proof(message.array()), message.redelivered))


def all_free(channel):
    """Every slot comes back, at the latest when somebody waits."""

    def look():
        with pytest.raises(dsline.BufferEmptyError):
            channel.recv(timeout=0.06)
        stats = channel.stats()
        return (stats.free_slots, stats.participants) == (channel.capacity, 1)

    wait_until(look)


@pytest.fixture
def channel(name):
    with dsline.ShmChannel(name, capacity=8, slot_size=256, timeout=TIMEOUT) as channel:
        yield channel
        channel.unlink()


def test_a_consumer_killed_with_messages_in_hand(channel):
    for number in range(4):
        channel.send(proof(1, number))
    with Child("hold", channel.name, 3) as consumer:
        assert consumer.read() == [0, 1, 2]
        consumer.kill()
    got = []
    for _ in range(4):
        with channel.recv_message() as message:
            got.append(
                (check_proof(message.array())[1], message.sequence, message.redelivered, message.attempt)
            )
    # What nobody had taken may come before the death is noticed.
    assert sorted(got) == [(0, 0, True, 2), (1, 1, True, 2), (2, 2, True, 2), (3, 3, False, 1)]
    assert [number for number, _, redelivered, _ in got if redelivered] == [0, 1, 2]
    assert channel.stats().redelivered == 3
    all_free(channel)


def test_a_message_that_kills_its_consumers_counts_its_attempts(channel):
    channel.send(proof(1, 0))
    for _ in range(2):
        with Child("hold", channel.name) as consumer:
            assert consumer.read() == [0]
            consumer.kill()
    with channel.recv_message() as message:
        assert (message.attempt, message.redelivered) == (3, True)
    all_free(channel)


def test_a_producer_killed_after_sending(channel):
    with Child("send_proofs", channel.name, 1, 0, 5) as producer:
        assert producer.read() == "sent 5"
        producer.kill()
    assert drain(channel) == [(1, number, False) for number in range(5)]
    all_free(channel)


def test_a_waiting_sender_is_freed_by_the_death_of_who_fills_the_channel(channel):
    for number in range(8):
        channel.send(proof(1, number))
    with Child("hold", channel.name, 8) as consumer:
        assert len(consumer.read()) == 8
        with pytest.raises(dsline.BufferFullError, match="8 are held by receivers"):
            channel.send(b"x", timeout=0)
        consumer.kill()
    # They come back to the queue: full still, but somebody can receive them now.
    assert [number for _, number, redelivered in drain(channel) if redelivered] == list(range(8))
    assert channel.send(b"x", timeout=0)
    assert channel.recv_bytes() == b"x"
    all_free(channel)


@pytest.mark.parametrize("call", ["wait_in_recv", "wait_in_send"])
def test_a_killed_waiter_swallows_no_wake_up(channel, call):
    if call == "wait_in_send":
        channel.send_many([b"x"] * 8)
    with Child(call, channel.name) as first, Child(call, channel.name) as second:
        for child in (first, second):
            assert child.read() == "waiting"
        wait_until(lambda: sleeps(first.pid) and sleeps(second.pid))
        first.kill()
        if call == "wait_in_recv":
            channel.send(b"for the second")
        else:
            assert channel.recv_bytes() == b"x"
        second.finish()
    if call == "wait_in_send":
        assert [channel.recv_bytes() for _ in range(8)] == [b"x"] * 7 + [b"never"]
    all_free(channel)


def sleeps(pid):
    """The main thread of the process sleeps in the kernel."""
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "S"


def test_both_sides_die_and_the_next_ones_go_on(name):
    with Child("send_proofs", name, 1, 0, 6) as producer:
        assert producer.read() == "sent 6"
        with Child("hold", name, 2) as consumer:
            assert consumer.read() == [0, 1]
            producer.kill()
            consumer.kill()
    assert name in list_names()
    with dsline.ShmChannel(name, timeout=TIMEOUT) as channel:
        assert drain(channel) == [(1, number, number < 2) for number in range(6)]
        all_free(channel)
    assert name not in list_names()


def test_stale_and_empty_after_a_kill_is_replaced_on_another_geometry(name):
    with Child("take_and_wait", name_of_new(name)) as child:
        assert child.read() == "taken"
        child.kill()
    with dsline.ShmChannel(name, capacity=3, slot_size=32) as channel:
        assert (channel.capacity, channel.slot_size, channel.stats().participants) == (3, 32, 1)


def name_of_new(name):
    """Make the channel, and leave while somebody else has it open."""
    with Child("send_proofs_and_leave", name, 1, 0, 1) as child:
        child.finish()
    return name


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("words", [16, 20_000])
def test_producers_killed_at_random(channel, tmp_path, words, seed):
    """Every message whose send returned arrives once and whole; at most the one in flight comes on top."""
    chance = random.Random(seed)
    for producer in range(4):
        log = tmp_path / f"log{producer}"
        log.write_bytes(bytes(8))
        got = []
        with Child("send_and_log", channel.name, str(log), producer, words) as child:
            assert child.read() == "ready"
            for _ in range(chance.randrange(1, 200)):
                with channel.recv_message() as message:
                    got.append((*check_proof(message.array()), message.redelivered))
            child.kill()
        got += drain(channel)
        returned = struct.unpack("<Q", log.read_bytes())[0]
        numbers = [number for _, number, _ in got]
        assert numbers == list(range(len(numbers))), "lost, doubled or out of order"
        assert returned <= len(numbers) <= returned + 1
        assert {(who, again) for who, _, again in got} == {(producer, False)}
        all_free(channel)


@pytest.mark.parametrize("seed", range(2))
def test_consumers_killed_at_random(channel, tmp_path, seed):
    """Nothing is lost; what comes twice is flagged."""
    chance = random.Random(seed)
    log = tmp_path / "log"
    log.touch()
    sent = 0
    for _ in range(5):
        with Child("receive_and_log", channel.name, str(log)) as child:
            assert child.read() == "ready"
            for _ in range(chance.randrange(20, 300)):
                channel.send(proof(1, sent))
                sent += 1
            child.kill()
    logged = list(struct.iter_unpack("<QB", log.read_bytes()))
    rest = [(number, again) for _, number, again in drain(channel)]
    seen = Counter(number for number, _ in logged + rest)
    assert set(seen) == set(range(sent)), "lost"
    again = Counter(number for number, redelivered in logged + rest if redelivered)
    assert all(count - 1 <= again[number] for number, count in seen.items()), "doubled without a flag"
    assert sum(again.values()) <= 5, "one message in hand per death"
    all_free(channel)


def test_producers_and_consumers_killed_under_load(channel, tmp_path):
    """A survivor on each side: what the survivor sends arrives, whoever dies around it."""
    chance = random.Random(7)
    consumer_log, producer_log = tmp_path / "consumed", tmp_path / "produced"
    consumer_log.touch()
    sent, mine = 0, []
    for _ in range(6):
        producer_log.write_bytes(bytes(8))
        with (
            Child("receive_and_log_all", channel.name, str(consumer_log)) as consumer,
            Child("send_and_log", channel.name, str(producer_log), 2, 64) as producer,
        ):
            assert (consumer.read(), producer.read()) == ("ready", "ready")
            for _ in range(chance.randrange(20, 100)):
                channel.send(proof(1, sent))
                sent += 1
                if chance.random() < 0.3:
                    with channel.recv_message() as message:
                        mine.append(check_proof(message.array()))
            first, second = chance.sample([consumer, producer], 2)
            first.kill()
            second.kill()
        mine += [(who, number) for who, number, _ in drain(channel)]
        all_free(channel)
    consumed = [(who, number) for who, number in struct.iter_unpack("<QQ", consumer_log.read_bytes())]
    numbers = {number for who, number in mine + consumed if who == 1}
    assert numbers == set(range(sent))
    assert channel.stats().corrupted == 0
