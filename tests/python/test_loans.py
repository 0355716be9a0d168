"""alloc and publish: arrays that are filled in place, and what they refuse."""

import contextlib
import ctypes
import gc
import pickle
import threading
import warnings
import weakref

import numpy as np
import pytest
from support import assert_clean, run_script, wait_until

import dsline


@pytest.fixture(params=["shm", "memfd", "heap", "file", "strict"])
def channel(request, tmp_path, name):
    """A channel of 4 slots whose handle may alloc."""
    size = {"capacity": 4, "slot_size": 65536, "max_message_size": 1 << 22, "timeout": 20}
    if request.param == "file":
        made = dsline.FileChannel.create(tmp_path / "loans", zero_copy=True, **size)
    elif request.param == "strict":
        made = dsline.ShmChannel(zero_copy="strict", **size)
    elif request.param == "shm":
        made = dsline.ShmChannel(name, zero_copy=True, **size)
    else:
        made = dsline.ShmChannel(storage=request.param, zero_copy=True, **size)
    with made:
        yield made
        if request.param == "shm":
            made.unlink()


@pytest.fixture
def small():
    with dsline.ShmChannel(capacity=2, slot_size=4096, zero_copy=True, timeout=20) as made:
        yield made


@contextlib.contextmanager
def refused(*words):
    with pytest.raises(BufferError) as caught:
        yield
    for word in ("cannot be published", *words):
        assert word in str(caught.value)


# --- the flag ----------------------------------------------------------------------------------------------------------


def test_without_the_flag(make_channel):
    channel = make_channel()
    assert channel.zero_copy is False
    with pytest.raises(dsline.FeatureUnavailableError, match="zero_copy=True"):
        channel.alloc((4,), "f4")
    with pytest.raises(TypeError, match="Loan"):
        channel.publish(None)


@pytest.mark.parametrize("bad", [None, 1, "yes", "True", 2])
def test_bad_flag(bad):
    with pytest.raises(dsline.InvalidArgumentError, match="'strict'"):
        dsline.ShmChannel(zero_copy=bad)


def test_the_flag_travels_with_the_handle(name):
    with dsline.ShmChannel(name, slot_size=4096, zero_copy="strict") as channel:
        with pickle.loads(pickle.dumps(channel)) as other:
            assert other.zero_copy == "strict"
        with dsline.ShmChannel.open(name) as plain:
            assert plain.zero_copy is False
            assert pickle.loads(pickle.dumps(plain)).zero_copy is False
        with dsline.ShmChannel.open(name, zero_copy=True) as other:
            assert other.zero_copy is True


def test_strict_needs_pages_of_its_own():
    with pytest.raises(dsline.FeatureUnavailableError, match="slot_size>=4096"):
        dsline.ShmChannel(slot_size=64, max_message_size=64, zero_copy="strict")
    with pytest.raises(dsline.FeatureUnavailableError, match="heap"):
        dsline.ShmChannel(storage="heap", zero_copy="strict")


def test_broadcast_lends():
    with dsline.Broadcast(capacity=4, zero_copy=True) as channel, channel.subscribe() as reader:
        with channel.alloc(3, "i4", fill=7):
            pass
        assert reader.recv_array(timeout=10).tolist() == [7, 7, 7]


# --- what arrives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((3, 4), "f8"),
        ((), "i2"),
        (5, "u1"),
        ((0, 7), "f4"),
        ((2, 3, 4), ">c16"),
        ((4,), "M8[ns]"),
        ((3,), [("x", "f4"), ("y", "i8", (2,))]),
        ((2,), "U5"),
        ((1,) * 30, "?"),
        ((600, 600), "f8"),
    ],
)
@pytest.mark.parametrize("order", ["C", "F"])
def test_round_trip(channel, shape, dtype, order):
    for _ in range(6):  # more than there are slots
        with channel.alloc(shape, dtype, order=order) as loan:
            values = np.arange(loan.array.size).astype("u1").reshape(loan.array.shape)
            expected = np.zeros(shape, dtype, order)
            if expected.dtype.names:
                expected["x"] = loan.array["x"] = values
                expected["y"] = loan.array["y"] = 5
            else:
                expected[...] = loan.array[...] = (
                    values.astype("M8[ns]") if expected.dtype.kind == "M" else values
                )
            assert loan.array.flags.f_contiguous == expected.flags.f_contiguous
        assert loan.published
        got = channel.recv_array()
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
        assert got.strides == expected.strides or got.size == 0
        assert np.array_equal(got, expected)
        del got
    assert channel.stats().free_slots == 4


def test_the_array_is_the_slot(channel):
    """No copy: what is written to the loan is what the receiver's view shows."""
    loan = channel.alloc(1000, "u1", fill=3)
    address = loan.array.ctypes.data
    array = loan.array
    loan.publish()
    got = channel.recv_array()
    assert got.tolist() == [3] * 1000
    assert array.ctypes.data == got.ctypes.data, "both show the read-only mapping of one slot"
    assert (address != array.ctypes.data) == (channel.storage != "heap")


def test_fill_and_shape_forms(channel):
    assert channel.alloc([2, 3], "i4", fill=[1, 2, 3]).array.tolist() == [[1, 2, 3]] * 2
    assert channel.alloc(np.int64(3), np.int8, fill=1).array.tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="broadcast"):
        channel.alloc(3, "i4", fill=[1, 2])
    assert channel.stats().free_slots == 4


def test_meta(channel):
    with channel.alloc(2, "i4", fill=0, meta={"first": 1}) as loan:
        loan.meta["second"] = "zwei"
        loan.meta["first"] = 1.5
    assert channel.recv_message().meta == {"first": 1.5, "second": "zwei"}
    with channel.alloc(2, "i4", fill=0) as loan:
        loan.meta["x"] = b"\0\1"
    message = channel.recv_message()
    assert (message.meta, message.array().tolist()) == ({"x": b"\0\1"}, [0, 0])
    channel.send(np.zeros(2, "i4"), meta={"sent": True})
    assert channel.recv_message().meta == {"sent": True}


def test_meta_needs_room(channel):
    with channel.alloc(2, "i4", fill=9, meta_room=3000) as loan:
        loan.meta["x"] = "y" * 2900
    message = channel.recv_message()
    assert (len(message.meta["x"]), message.array().tolist()) == (2900, [9, 9])
    del message
    loan = channel.alloc(2, "i4", fill=9)
    loan.meta["x"] = "y" * 2900
    with pytest.raises(dsline.MessageTooLargeError, match="meta_room"):
        loan.publish()
    loan.meta["x"] = object()
    with pytest.raises(TypeError, match="meta"):
        loan.publish()
    loan.meta.clear()
    loan.publish()
    assert channel.recv_array().tolist() == [9, 9]
    with pytest.raises(ValueError, match="meta_room"):
        channel.alloc(2, "i4", meta_room=-1)


def test_sends_and_loans_keep_their_order(channel):
    loan = channel.alloc(1, "i8", fill=1)
    channel.send(np.full(1, 0, "i8"))
    loan.publish()
    channel.send(np.full(1, 2, "i8"))
    assert [int(channel.recv_array()[0]) for _ in range(3)] == [0, 1, 2]


# --- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dtype", "error", "words"),
    [
        ((1 << 22,), "f8", dsline.MessageTooLargeError, "max_message_size>=33554432"),
        ((1 << 40, 1 << 40), "f8", dsline.MessageTooLargeError, "max_message_size"),
        ((-1,), "f8", ValueError, "negative"),
        ((1.5,), "f8", TypeError, "integer"),
        ("ab", "f8", TypeError, "shape"),
        (None, "f8", TypeError, "shape"),
        ((1,) * 65, "f8", ValueError, "64"),
        (3, "O", TypeError, "object"),
        (3, [("x", "O")], TypeError, "object"),
        (3, "no dtype", TypeError, "understood"),
        (3, "(2,)f4", TypeError, "shape"),
    ],
)
def test_bad_arguments(channel, shape, dtype, error, words):
    with pytest.raises(error, match=words):
        channel.alloc(shape, dtype)
    with pytest.raises(ValueError, match="order"):
        channel.alloc(3, "f4", order="A")
    assert channel.stats().free_slots == 4


def test_publish_twice(channel):
    loan = channel.alloc(3, "i4", fill=1)
    channel.publish(loan)
    for call in (loan.publish, lambda: channel.publish(loan)):
        with pytest.raises(dsline.LoanEndedError, match="twice"):
            call()
    with pytest.raises(dsline.LoanEndedError, match="published"):
        loan.abort()
    with pytest.raises(dsline.LoanEndedError, match="published"), loan:
        pass
    assert channel.stats().sent == 1
    assert len(channel) == 1


def test_write_after_publish(channel):
    loan = channel.alloc(3, "i4", fill=1)
    kept = loan.array
    loan.publish()
    with pytest.raises(dsline.LoanEndedError, match="published"):
        loan.array[0] = 2
    with pytest.raises(ValueError, match="read-only"):
        kept[0] = 2
    with pytest.raises(ValueError, match="read-only"):
        np.add(kept, 1, out=kept)
    for make in (lambda: kept, lambda: kept[1:], lambda: kept.base):
        with pytest.raises(ValueError, match="WRITEABLE"):
            make().flags.writeable = True
    assert memoryview(kept).readonly
    assert channel.recv_array().tolist() == [1, 1, 1]


def test_writeable_cannot_be_set_by_way_of_the_base(channel):
    with channel.alloc(3, "i4", fill=1) as loan:
        kept = loan.array
    root = kept.base
    with pytest.raises(ValueError, match="WRITEABLE"):
        root.flags.writeable = True
    with pytest.raises(TypeError):
        memoryview(root.base)


def test_another_handle_does_not_publish(name):
    with (
        dsline.ShmChannel(name, capacity=4, zero_copy=True) as channel,
        dsline.ShmChannel(name, zero_copy=True) as other,
    ):
        loan = channel.alloc(3, "i4", fill=1)
        with pytest.raises(dsline.InvalidArgumentError, match="another handle"):
            other.publish(loan)
        channel.publish(loan)
        assert other.recv_array().tolist() == [1] * 3


def test_loans_come_from_alloc():
    with pytest.raises(TypeError, match="alloc"):
        dsline.Loan()


# --- other views -------------------------------------------------------------------------------------------------------

VIEWS = {
    "slice": (lambda a: a[1:], "1 array made from"),
    "reshape": (lambda a: a.reshape(2, 2), "made from"),
    "transpose": (lambda a: a.T, "made from"),
    "view": (lambda a: a.view("u1"), "made from"),
    "ellipsis": (lambda a: a[...], "made from"),
    "memoryview": (memoryview, "memoryview"),
    "memoryview of a slice": (lambda a: memoryview(a[1:]), "made from"),
    "DLPack capsule": (lambda a: a.__dlpack__(), "DLPack"),
    "as_strided": (lambda a: np.lib.stride_tricks.as_strided(a), "DummyArray"),
    "frombuffer": (lambda a: np.frombuffer(a, "u1"), "made from"),
    "matrix": (lambda a: np.asarray(a).view(np.matrix), "subclass"),
    "masked": (lambda a: np.ma.array(a, copy=False), ""),
    "flat": (lambda a: a.flat, ""),
    "nditer": (lambda a: np.nditer(a, op_flags=["readwrite"]), ""),
    "ctypes pointer": (lambda a: a.ctypes.data_as(ctypes.POINTER(ctypes.c_int)), ""),
    "ctypes array": (np.ctypeslib.as_ctypes, ""),
    "ctypes attribute": (lambda a: a.ctypes, "ctypes"),
    "from_buffer": (lambda a: (ctypes.c_char * a.nbytes).from_buffer(a), ""),
    "bound method": (lambda a: a.fill, "builtin_function_or_method"),
    "object array": (lambda a: np.array([a, None], dtype=object), ""),
    "root": (lambda a: a.base, "made from"),
}


@pytest.mark.parametrize("kind", VIEWS)
def test_other_views_refuse(channel, kind):
    """Anything that can write beside the array itself holds publish up, until it is gone."""
    make, words = VIEWS[kind]
    loan = channel.alloc(4, "i4", fill=1)
    array = loan.array
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PendingDeprecationWarning)  # of numpy.matrix
        view = make(array)
    for _ in range(2):
        with refused(words):
            loan.publish()
    with refused(words), loan:
        pass
    assert not loan.published
    array[0] = 5
    assert loan.array[0] == 5, "it is still open"
    del view
    gc.collect()  # some of them are cycles
    loan.publish()
    assert channel.recv_array().tolist() == [5, 1, 1, 1]


def test_a_view_refuses_without_a_variable(small):
    loan = small.alloc(4, "i4", fill=1)
    view = memoryview(loan.array)
    with refused("memoryview"):
        small.publish(loan)
    view.release()
    small.publish(loan)


def test_views_and_variables_are_told_apart(small):
    """Many names, and one memoryview among them."""
    loan = small.alloc(4, "i4", fill=1)
    a = b = c = loan.array
    names = {"d": a, "e": [b, (c, a)]}
    view = memoryview(b)
    with refused("1 reference"):
        loan.publish()
    del view
    loan.publish()
    assert names["e"][1][0] is a


class Holder:
    """A class of Python."""


def in_attribute(array):
    holder = Holder()
    holder.array = array
    return holder


def in_slot(array):
    class Slotted:
        __slots__ = ("array",)

    holder = Slotted()
    holder.array = array
    return holder


def in_generator(array):
    def steps():
        mine = array
        yield mine.shape
        yield mine.shape

    generator = steps()
    next(generator)
    return generator


def in_traceback(array):
    def fail(mine):
        raise KeyError(mine.shape)

    try:
        fail(array)
    except KeyError as error:
        return error
    raise AssertionError


NAMES = {
    "variable": lambda a: a,
    "list": lambda a: [a, a],
    "dict": lambda a: {"x": a},
    "tuple": lambda a: (a, 1, a),
    "nested": lambda a: {"x": [(a,)]},
    "attribute": in_attribute,
    "slot": in_slot,
    "closure": lambda a: lambda: a,
    "default": lambda a: lambda b=a: b,
    "generator": in_generator,
    "traceback": in_traceback,
}


@pytest.mark.parametrize("kind", NAMES)
def test_names_do_not_refuse(small, kind):
    loan = small.alloc(4, "i4", fill=1)
    holder = NAMES[kind](loan.array)
    assert holder is not None
    loan.publish()
    assert small.recv_array().tolist() == [1, 1, 1, 1]
    assert small.stats().free_slots == 1, "the name still shows the slot"
    del holder
    gc.collect()
    assert small.stats().free_slots == 2


@pytest.mark.parametrize("kind", NAMES)
def test_names_do_not_hide_a_view(small, kind):
    loan = small.alloc(4, "i4", fill=1)
    holder = NAMES[kind](loan.array)
    view = memoryview(loan.array)
    with refused():
        loan.publish()
    del holder
    with refused():
        loan.publish()
    del view
    gc.collect()
    loan.publish()


MODULE_VARIABLE = None


def test_names_of_callers_and_modules(small):
    global MODULE_VARIABLE

    def fill_and_publish(array, loan):
        array[:] = 3
        loan.publish()

    def further_down(array, loan):
        mine = array
        fill_and_publish(array, loan)
        return mine

    loan = small.alloc(4, "i4")
    MODULE_VARIABLE = loan.array
    here = loan.array
    assert further_down(loan.array, loan) is here
    assert small.recv_array().tolist() == [3] * 4
    MODULE_VARIABLE = None


def test_in_a_script_without_functions():
    """Variables of a module are not those of a frame."""
    assert_clean(
        run_script(
            "import dsline\n"
            "ch = dsline.ShmChannel(capacity=2, slot_size=4096, zero_copy=True)\n"
            "with ch.alloc(3, 'i4') as loan:\n"
            "    x = loan.array\n"
            "    x[:] = 5\n"
            "assert ch.recv_array().tolist() == [5, 5, 5]\n"
            "loan = ch.alloc(3, 'i4')\n"
            "x = loan.array; m = memoryview(x)\n"
            "try:\n"
            "    loan.publish()\n"
            "except BufferError as error:\n"
            "    assert 'memoryview' in str(error)\n"
            "else:\n"
            "    raise AssertionError\n"
        )
    )


def test_a_call_that_uses_the_array_refuses(small):
    """C code in between was called with the array, and may write to it when the callback returns."""
    loan = small.alloc(2, "f8", fill=1)
    refusals = []

    def callback(_):
        try:
            loan.publish()
        except BufferError as error:
            refusals.append(str(error))
        return 4.0

    array = loan.array
    np.frompyfunc(callback, 1, 1)(np.zeros(2), out=array, casting="unsafe")
    assert len(refusals) == 2
    assert array.tolist() == [4, 4]
    loan.publish()


def test_another_threads_names(small):
    loan = small.alloc(2, "f8", fill=1)
    entered, leave = threading.Event(), threading.Event()

    def keep(array):
        entered.set()
        leave.wait(20)
        return array[0]

    thread = threading.Thread(target=keep, args=(loan.array,))
    thread.start()
    assert entered.wait(20)
    with contextlib.suppress(BufferError):  # the thread's arguments may be where nobody sees them
        loan.publish()
    leave.set()
    thread.join()
    del thread
    if not loan.published:
        loan.publish()
    assert small.recv_array().tolist() == [1, 1]


def test_memory_that_was_exchanged_refuses(small):
    loan = small.alloc(2, "f8", fill=1)
    array = loan.array
    array.__setstate__((1, (2,), np.dtype("f8"), False, bytes(16)))
    with pytest.raises(BufferError, match="other memory"):
        loan.publish()
    del array
    loan.abort()
    del loan
    assert small.stats().free_slots == 2


@pytest.mark.parametrize("how", ["from_numpy", "from_dlpack", "slice"])
def test_torch(small, how):
    torch = pytest.importorskip("torch")
    loan = small.alloc(4, "f4", fill=1)
    if how == "from_numpy":
        tensor = torch.from_numpy(loan.array)
    elif how == "from_dlpack":
        tensor = torch.from_dlpack(loan.array)
    else:
        tensor = torch.from_numpy(loan.array[1:])
    tensor[0] = 8
    with refused("made from" if how == "slice" else "torch"):
        loan.publish()
    del tensor
    loan.publish()
    assert 8 in small.recv_array()


# --- ends --------------------------------------------------------------------------------------------------------------


def test_exception_aborts(channel):
    with pytest.raises(KeyError), channel.alloc(3, "i4") as loan:
        kept = loan.array[1:]
        raise KeyError
    assert not loan.published
    with pytest.raises(dsline.LoanEndedError, match="aborted"):
        loan.publish()
    with pytest.raises(dsline.LoanEndedError, match="aborted"):
        loan.array  # noqa: B018
    assert channel.stats().free_slots == 3, "a slice still shows it"
    del kept
    gc.collect()  # the exception's traceback
    assert channel.stats().free_slots == 4
    assert len(channel) == 0


def test_abort(channel):
    loan = channel.alloc(3, "i4", fill=1)
    kept = loan.array
    loan.abort()
    loan.abort()
    assert not kept.flags.writeable
    with pytest.raises(ValueError, match="WRITEABLE"):
        kept.flags.writeable = True
    assert channel.stats().free_slots == 3
    del kept
    assert channel.stats().free_slots == 4
    assert channel.stats().loans == 0


def test_ended_by_hand_inside_the_block(channel):
    with channel.alloc(3, "i4", fill=1) as loan:
        loan.publish()
    with channel.alloc(3, "i4", fill=2) as loan:
        loan.abort()
    assert channel.recv_array().tolist() == [1, 1, 1]
    assert len(channel) == 0


def test_dropped(channel):
    """Without publish: the slot comes back with the last view."""
    loan = channel.alloc(1000, "i4", fill=7)
    assert channel.stats().loans == 1
    views = [loan.array[i::3] for i in range(3)]
    memory = memoryview(loan.array)
    gone = weakref.ref(loan)
    del loan
    assert gone() is None
    assert channel.stats().free_slots == 3
    views[0][:] = 1
    del views[0], views
    assert channel.stats().free_slots == 3
    assert memory[1] == 7
    del memory
    assert channel.stats().free_slots == 4
    assert channel.stats().loans == 0
    assert len(channel) == 0


def test_dropped_in_a_cycle(channel):
    loan = channel.alloc(10, "i4")
    loan.meta["me"] = loan
    del loan
    gc.collect()
    assert channel.stats().free_slots == 4


def test_a_kept_array_keeps_its_slot(channel):
    """Published, received and released: as long as the publisher looks at it, it does not change."""
    kept = []
    for i in range(3):
        with channel.alloc(100, "i4", fill=i) as loan:
            kept.append(loan.array)
    assert [int(channel.recv_array()[0]) for _ in range(3)] == [0, 1, 2]
    assert (channel.stats().free_slots, channel.stats().kept_slots) == (1, 3)
    for i in range(20):
        channel.send(np.full(100, 50 + i, "i4"))
        assert channel.recv_array()[0] == 50 + i
    assert [set(array.tolist()) for array in kept] == [{0}, {1}, {2}]
    part = kept.pop(1)[5:]
    assert channel.stats().kept_slots == 3
    del part
    assert (channel.stats().free_slots, channel.stats().kept_slots) == (2, 2)
    kept.clear()
    assert (channel.stats().free_slots, channel.stats().kept_slots) == (4, 0)


def test_kept_arrays_fill_a_channel(small):
    kept = []
    for i in range(2):
        with small.alloc(10, "i4", fill=i) as loan:
            kept.append(loan.array)
        small.recv_array()
    assert {slot.state for slot in small.inspect().slots} == {"KEPT"}
    for call in (lambda: small.alloc(3, "i4", timeout=0.05), lambda: small.send(b"x", timeout=0.05)):
        with pytest.raises(
            dsline.BufferFullError, match=r"2 are kept by arrays on published loans \(2 of this"
        ) as caught:
            call()
    assert caught.value.blockers[0].keeps == 2
    assert "published loan" in str(caught.value.blockers[0])
    waiting = threading.Thread(target=lambda: small.send(b"x"))
    waiting.start()
    wait_until(lambda: small.stats().send_waits > 2)
    del loan
    kept.clear()
    waiting.join(20)
    assert bytes(small.recv()) == b"x"


def test_open_loans_fill_a_channel(small):
    loans = [small.alloc(1, "i4") for _ in range(2)]
    with pytest.raises(
        dsline.BufferFullError, match=r"2 are not published yet \(2 of them loans of this handle"
    ):
        small.alloc(1, "i4", timeout=0)
    loans.pop()
    small.alloc(1, "i4", timeout=0)


@pytest.mark.parametrize("policy", ["raise", "drop_newest", "drop_oldest", "block"])
def test_a_full_channel(policy):
    with dsline.ShmChannel(
        capacity=2, slot_size=64, backpressure=policy, zero_copy=True, timeout=0.05
    ) as channel:
        for i in range(2):
            with channel.alloc(1, "i8", fill=i):
                pass
        if policy == "drop_oldest":
            with channel.alloc(1, "i8", fill=2):
                pass
            assert [int(channel.recv_array()[0]) for _ in range(2)] == [1, 2]
            held = [channel.alloc(1, "i8") for _ in range(2)]
            with pytest.raises(dsline.BufferFullError):
                channel.alloc(1, "i8")
            assert len(held) == 2
        else:
            with pytest.raises(dsline.BufferFullError, match="full"):
                channel.alloc(1, "i8")
            assert channel.stats().dropped_newest == (policy == "drop_newest")
            assert [int(channel.recv_array()[0]) for _ in range(2)] == [0, 1]


def test_a_loop_needs_one_slot():
    """A published loan whose array nobody kept does not hold the next one up."""
    with dsline.ShmChannel(capacity=1, slot_size=64, zero_copy=True, timeout=20) as channel:
        for i in range(100):
            with channel.alloc(1, "i8") as loan:
                loan.array[0] = i
            assert channel.recv_array()[0] == i


# --- close, shutdown ---------------------------------------------------------------------------------------------------


def test_close_with_an_open_loan(name):
    with dsline.ShmChannel(name, capacity=2, slot_size=64, zero_copy=True) as watcher:
        channel = dsline.ShmChannel(name, zero_copy=True)
        loan = channel.alloc(4, "i4", fill=1)
        kept = loan.array
        channel.close()
        assert watcher.stats().free_slots == 1
        with pytest.raises(dsline.ChannelClosedError):
            loan.publish()
        with pytest.raises(dsline.LoanEndedError, match="aborted"):
            loan.publish()
        assert watcher.stats().free_slots == 1, "its array is still there"
        assert kept.tolist() == [1] * 4
        assert not kept.flags.writeable
        assert watcher.stats().participants == 2
        del kept
        assert (watcher.stats().free_slots, watcher.stats().participants) == (2, 1)
        assert watcher.stats().deaths == 0


def test_close_with_a_kept_array(name):
    with dsline.ShmChannel(name, capacity=2, slot_size=64, zero_copy=True) as watcher:
        channel = dsline.ShmChannel(name, zero_copy=True)
        with channel.alloc(4, "i4", fill=1) as loan:
            kept = loan.array
        channel.close()
        del channel, loan
        assert watcher.recv_array().tolist() == [1] * 4
        assert (watcher.stats().free_slots, watcher.stats().participants) == (1, 2)
        for i in range(10):
            watcher.send(np.full(4, i, "i4"))
            assert watcher.recv_array()[0] == i
        assert kept.tolist() == [1] * 4
        del kept
        assert (watcher.stats().free_slots, watcher.stats().participants) == (2, 1)


def test_shutdown_with_an_open_loan(channel):
    loan = channel.alloc(4, "i4", fill=1)
    channel.shutdown()
    with pytest.raises(dsline.ChannelClosedError):
        loan.publish()
    with pytest.raises(dsline.ChannelClosedError):
        channel.alloc(4, "i4")
    del loan
    with pytest.raises(dsline.ChannelClosedError):
        channel.recv(timeout=20)


def test_a_kept_array_does_not_hold_up_the_end(channel):
    """Receivers of a channel that was shut down see its end although the publisher still looks at the last message."""
    with channel.alloc(4, "i4", fill=1) as loan:
        kept = loan.array
    channel.shutdown()
    assert channel.recv_array(timeout=20).tolist() == [1] * 4
    with pytest.raises(dsline.ChannelClosedError):
        channel.recv(timeout=20)
    assert kept.tolist() == [1] * 4


def test_a_kept_array_is_for_late_joiners_too():
    with dsline.ShmChannel(capacity=4, slot_size=64, zero_copy=True, timeout=20) as channel:
        with channel.alloc(4, "i4", fill=1) as loan:
            kept = loan.array
        with channel.subscribe("late", start="oldest") as late:
            assert late.recv_array().tolist() == [1] * 4
        assert kept[0] == 1


def test_nobody_listens():
    with dsline.Broadcast(capacity=1, slot_size=64, zero_copy=True, timeout=0.05) as channel:
        with channel.alloc(4, "i4", fill=1) as loan:
            kept = loan.array
        assert channel.stats().unheard == 1
        with pytest.raises(dsline.BufferFullError):
            channel.send(b"x")
        assert kept.tolist() == [1] * 4
        del kept
        channel.send(b"x")


# --- threads -----------------------------------------------------------------------------------------------------------


def test_another_thread_publishes(small):
    loan = small.alloc(4, "i4", fill=1)
    thread = threading.Thread(target=loan.publish)
    thread.start()
    thread.join()
    assert small.recv_array().tolist() == [1] * 4


def test_two_threads_publish_one_loan(channel):
    for _ in range(50):
        loan = channel.alloc(4, "i4", fill=1)
        start = threading.Barrier(2)
        errors = []

        def publish(loan=loan, start=start, errors=errors):
            start.wait(20)
            try:
                loan.publish()
            except dsline.LoanEndedError as error:
                errors.append(error)

        threads = [threading.Thread(target=publish) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert len(errors) == 1
        assert len(channel) == 1
        assert channel.recv_array().tolist() == [1] * 4


def test_publish_with_sync(tmp_path):
    """The GIL is released while the disk is waited for; the loan has ended by then."""
    with dsline.FileChannel.create(
        tmp_path / "f", capacity=2, slot_size=64, sync="data", zero_copy=True
    ) as channel:
        for i in range(5):
            with channel.alloc(2, "i4", fill=i) as loan:
                kept = loan.array
            assert channel.recv_array().tolist() == kept.tolist() == [i, i]


# --- strict ------------------------------------------------------------------------------------------------------------


def test_sealed_slots_are_used_again(name):
    """By loans and by send, of this handle and of others."""
    with (
        dsline.ShmChannel(name, capacity=2, slot_size=4096, zero_copy="strict", timeout=20) as channel,
        dsline.ShmChannel(name, zero_copy="strict", timeout=20) as other,
    ):
        for i in range(40):
            sender = (channel, other)[i % 3 == 0]
            size = (10, 900, 5000)[i % 3 if i > 20 else 0]
            if i % 2:
                with sender.alloc(size, "i4", fill=i):
                    pass
            else:
                sender.send(np.full(size, i, "i4"))
            assert channel.recv_array().tolist() == [i] * size


def test_end_of_the_process_with_loans(name):
    """Nothing is said, nobody counts as dead."""
    done = run_script(
        "import dsline, sys\n"
        "name = sys.argv[1]\n"
        "ch = dsline.ShmChannel(name, zero_copy=True)\n"
        "a = ch.alloc(4, 'i4', fill=1); s = a.array[1:]\n"
        "b = ch.alloc(4, 'i4', fill=2); kept = b.array; b.publish()\n"
        "sys.c = ch.alloc(4, 'i4', fill=3)\n",
        name,
    )
    assert_clean(done)
    with dsline.ShmChannel(name, timeout=10) as channel:
        assert channel.recv_array().tolist() == [2] * 4
        assert (channel.stats().free_slots, channel.stats().deaths) == (channel.capacity, 0)


@pytest.mark.parametrize("how", ["abort", "publish"])
def test_the_end_of_the_channel_does_not_wait_for_an_array_that_is_kept(how):
    with dsline.ShmChannel(capacity=4, slot_size=4096, zero_copy=True) as channel:
        channel.send(b"last")
        loan = channel.alloc(100, "f4", fill=3)
        kept = loan.array
        slices = kept[:10]
        if how == "abort":
            loan.abort()
        channel.shutdown()
        if how == "publish":
            del slices
            with pytest.raises(dsline.ChannelClosedError):
                loan.publish()
        assert [bytes(view) for view in channel] == [b"last"]
        assert kept.sum() == 300
        assert not kept.flags.writeable
