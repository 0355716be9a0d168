# Loans: slots that the caller fills in place. Included by _core.pyx; docs/design/loans.md has the argument.
#
# What keeps what alive: the user's array → root array → LoanHold → Handle. NumPy lets slices refer to the root, so the
# root's reference count tells of them; what was made from the array by other means (a memoryview, a DLPack capsule, a
# torch tensor) refers to the array itself, as a variable does, and is told from variables by looking at the variables.
# An open Loan holds one reference to each of the three; it drops them when it ends.

from cpython.object cimport PyObject

cdef extern from *:
    """
    #include <frameobject.h>
    #if PY_VERSION_HEX < 0x030D0000
    #ifndef Py_BUILD_CORE
    #define Py_BUILD_CORE 1
    #define DSLINE_BUILD_CORE 1
    #endif
    #include "internal/pycore_frame.h"
    #ifdef DSLINE_BUILD_CORE
    #undef Py_BUILD_CORE
    #endif
    #endif

    // From here on a frame's variables, and what C code is called with, may be borrowed from other frames.
    #define DSLINE_BORROWED_VARIABLES (PY_VERSION_HEX >= 0x030E0000)

    typedef struct {
      PyObject* target;
      Py_ssize_t found;
    } dsline_counter;

    static int dsline_count_visit(PyObject* seen, void* arg) {
      dsline_counter* counter = (dsline_counter*)arg;
      counter->found += seen == counter->target;
      return 0;
    }

    // References that `holder` has to `target`, as the garbage collector would count them.
    static Py_ssize_t dsline_references(PyObject* holder, PyObject* target) {
      dsline_counter counter = {target, 0};
      traverseproc traverse = Py_TYPE(holder)->tp_traverse;
      if (traverse != NULL) traverse(holder, dsline_count_visit, &counter);
      return counter.found;
    }

    // The variables of a running frame that are `target` itself; what the others are is appended to `others`, unless that
    // is NULL. A variable that a nested function shares lives in a cell and is not counted. -1 with an exception.
    static Py_ssize_t dsline_variables(PyObject* running, PyObject* target, PyObject* others) {
      PyFrameObject* frame = (PyFrameObject*)running;
      Py_ssize_t found = 0;
    #if PY_VERSION_HEX < 0x030D0000
      struct _PyInterpreterFrame* inner = frame->f_frame;
      const int count = ((PyCodeObject*)inner->f_code)->co_nlocalsplus;
      for (int i = 0; i < count; ++i) {
        PyObject* value = inner->localsplus[i];
        if (value == NULL) continue;
        if (value == target) {
          ++found;
        } else if (others != NULL && PyObject_IS_GC(value) + PyDict_CheckExact(value) != 0 &&
                   PyList_Append(others, value) < 0) {
          return -1;
        }
      }
    #else
      PyCodeObject* code = PyFrame_GetCode(frame);
      PyObject* names = PyCode_GetVarnames(code);
      PyObject* cells = names == NULL ? NULL : PyCode_GetCellvars(code);
      Py_ssize_t arguments = code->co_argcount + code->co_kwonlyargcount + ((code->co_flags & CO_VARARGS) != 0) +
                             ((code->co_flags & CO_VARKEYWORDS) != 0);
      int borrowed = 0;
      if (cells == NULL) found = -1;
      for (Py_ssize_t i = 0; found >= 0 && i < PyTuple_GET_SIZE(names); ++i) {
        PyObject* name = PyTuple_GET_ITEM(names, i);
        const int shared = PySequence_Contains(cells, name);
        if (shared != 0) {
          if (shared < 0) found = -1;
          continue;
        }
        PyObject* value = PyFrame_GetVar(frame, name);
        if (value == NULL) {
          if (PyErr_ExceptionMatches(PyExc_NameError)) {
            PyErr_Clear();
          } else {
            found = -1;
          }
          continue;
        }
        if (value == target) {
          if (DSLINE_BORROWED_VARIABLES && i < arguments) {
            borrowed = 1;
          } else {
            ++found;
          }
        } else if (others != NULL && PyList_Append(others, value) < 0) {
          found = -1;
        }
        Py_DECREF(value);
      }
      if (found >= 0) found += borrowed;
      Py_XDECREF(cells);
      Py_XDECREF(names);
      Py_DECREF(code);
    #endif
      return found;
    }

    // The dict that is a frame's namespace, or a copy of its variables that somebody asked for; NULL where it has none.
    static PyObject* dsline_namespace(PyObject* running) {
      PyFrameObject* frame = (PyFrameObject*)running;
    #if PY_VERSION_HEX < 0x030D0000
      PyObject* space = frame->f_frame->f_locals;
    #else
      PyCodeObject* code = PyFrame_GetCode(frame);
      PyObject* space = (code->co_flags & CO_OPTIMIZED) == 0 ? PyFrame_GetLocals(frame) : NULL;
      Py_DECREF(code);
      if (space == NULL) {
        PyErr_Clear();
        return NULL;
      }
      Py_DECREF(space);  // the frame's own
    #endif
      return space != NULL && PyDict_CheckExact(space) ? space : NULL;
    }

    static PyObject* dsline_globals(PyObject* running) {
      PyObject* space = PyFrame_GetGlobals((PyFrameObject*)running);
      Py_XDECREF(space);  // the frame's own
      return space;
    }

    static PyObject* dsline_frame() { return (PyObject*)PyEval_GetFrame(); }
    static PyObject* dsline_back(PyObject* running) { return (PyObject*)PyFrame_GetBack((PyFrameObject*)running); }

    static void dsline_settle(PyObject* array, const void* data) {
      PyArrayObject_fields* fields = (PyArrayObject_fields*)array;
      fields->flags &= ~NPY_ARRAY_WRITEABLE;
      fields->data = (char*)data;
    }
    static void dsline_unsettle(PyObject* array, void* data) {
      PyArrayObject_fields* fields = (PyArrayObject_fields*)array;
      fields->flags |= NPY_ARRAY_WRITEABLE;
      fields->data = (char*)data;
    }
    static PyObject* dsline_base(PyObject* array) { return ((PyArrayObject_fields*)array)->base; }
    static void* dsline_data(PyObject* array) { return ((PyArrayObject_fields*)array)->data; }
    static int dsline_same_dealloc(PyObject* a, PyObject* b) {
      return ((PyTypeObject*)a)->tp_dealloc == ((PyTypeObject*)b)->tp_dealloc;
    }
    """
    const bint DSLINE_BORROWED_VARIABLES
    Py_ssize_t dsline_references(PyObject* holder, PyObject* target)
    Py_ssize_t dsline_variables(PyObject* frame, PyObject* target, PyObject* others) except -1
    PyObject* dsline_namespace(PyObject* frame)
    PyObject* dsline_globals(PyObject* frame)
    PyObject* dsline_frame()
    PyObject* dsline_back(PyObject* frame)
    void dsline_settle(PyObject* array, const void* data) noexcept
    void dsline_unsettle(PyObject* array, void* data) noexcept
    PyObject* dsline_base(PyObject* array) noexcept
    void* dsline_data(PyObject* array) noexcept
    bint dsline_same_dealloc(PyObject* a, PyObject* b) noexcept

cdef extern from "Python.h":
    Py_ssize_t Py_REFCNT(PyObject* o)
    void Py_DECREF(PyObject* o)
    void Py_XDECREF(PyObject* o)
    int PyGC_Disable()
    int PyGC_Enable()

cdef enum LoanState:
    LOAN_NEVER_MADE = 0
    LOAN_OPEN = 1
    LOAN_PUBLISHED = 2
    LOAN_ABORTED = 3
    LOAN_OF_PARENT = 4  # this process was forked from the one that holds it

# Room for metadata: the payload's place depends on it, and tags may be set until the loan is published. Up to here
# receivers copy it without an allocation.
cdef enum:
    LOAN_META_BYTES = 256

# Holds whose slot is neither published nor given back; under the GIL.
cdef PyObject* first_open_hold = NULL


@cython.final
@cython.no_gc
cdef class LoanHold:
    """Base of the arrays on a loan. Not a buffer, so NumPy does not make them writable again. The slot goes back, or is no
    longer kept, when the last of them is gone."""

    cdef Handle _handle
    cdef CppLoan _loan
    cdef bint _open
    cdef bint _kept
    cdef PyObject* _owner  # the open Loan, which clears it
    cdef PyObject* _next
    cdef PyObject* _previous

    cdef void link(self):
        global first_open_hold
        self._open = True
        self._handle.loans += 1
        self._next = first_open_hold
        if first_open_hold != NULL:
            (<LoanHold> first_open_hold)._previous = <PyObject*> self
        first_open_hold = <PyObject*> self

    cdef void unlink(self) noexcept:
        global first_open_hold
        if not self._open:
            return
        self._open = False
        self._handle.loans -= 1
        if self._next != NULL:
            (<LoanHold> self._next)._previous = self._previous
        if self._previous != NULL:
            (<LoanHold> self._previous)._next = self._next
        else:
            first_open_hold = self._next
        self._next = self._previous = NULL

    def __dealloc__(self):
        if self._open:
            self.unlink()
            self._handle._channel.get().abort(self._loan)
        elif self._kept:
            self._handle.kept -= 1
            self._handle._channel.get().end_keeping(self._loan)


@cython.final
@cython.no_gc_clear
cdef class Loan:
    """A slot of a channel that the caller fills in place, made by `alloc` of a channel with ``zero_copy=True``.

    As a context manager it publishes at the end of the block, and aborts when the block is left by an exception. One that
    is dropped without either is aborted; its slot comes back when the last array on it is gone.

    Attributes
    ----------
    array : numpy.ndarray
        Writable, over the slot. Raises LoanEndedError once the loan has ended; whoever kept it has it read-only.
    meta : dict
        Metadata that is published with it: str keys; str, bytes, int, float, bool or None values.
    published : bool
        Whether it was published.
    """

    cdef object __weakref__
    cdef Channel _channel
    cdef LoanHold _hold
    cdef object _root
    cdef object _array
    cdef ArrayLayout _layout
    cdef dict _meta
    cdef Py_ssize_t _room
    cdef int _state

    def __init__(self):
        raise TypeError("loans are made by alloc() of a channel")

    def __dealloc__(self):
        if self._hold is not None:
            self._hold._owner = NULL

    @property
    def array(self):
        if self._state != LOAN_OPEN:
            raise self._ended_error("its array is no longer there to be written; keep a reference to read it")
        return self._array

    @property
    def meta(self):
        return self._meta

    @property
    def published(self):
        return self._state == LOAN_PUBLISHED

    def publish(self):
        """Make what was written visible to receivers, and the arrays on it read-only.

        Raises
        ------
        BufferError
            Other views of the slot are alive, by which it could still be written; the message says what holds them. The
            loan stays open: drop them and publish again.
        LoanEndedError
            Published or aborted before, or made by the parent of this process.
        ChannelClosedError
            The handle is closed or the channel is shut down; the loan is aborted.
        MessageTooLargeError
            `meta` needs more bytes than `alloc` left room for; the loan stays open.

        Notes
        -----
        Does not copy and does not block (except for the disk, for a channel with ``sync="data"``, without the GIL). Its cost
        does not depend on the size, unless the channel has ``checksum="full"``. Arrays on the loan that are still alive
        show the message and keep its slot from being used again.
        """
        publish_loan(self)

    def abort(self):
        """Give the slot back unpublished. Does nothing the second time; LoanEndedError when it was published.

        Arrays on it that are still alive become read-only (slices do not) and keep the slot until they are gone.
        """
        if self._state == LOAN_PUBLISHED:
            raise self._ended_error("it cannot be taken back")
        if self._state == LOAN_OPEN:
            self._end(LOAN_ABORTED)

    def __enter__(self):
        if self._state != LOAN_OPEN:
            raise self._ended_error("alloc() another one")
        return self

    def __exit__(self, kind, value, traceback):
        if self._state != LOAN_OPEN:
            return
        if kind is not None:
            self._end(LOAN_ABORTED)
        else:
            publish_loan(self)

    def __repr__(self):
        if self._state == LOAN_NEVER_MADE:
            return "<dsline.Loan: never made>"
        state = ("open", "published", "aborted", "of the parent process")[self._state - 1]
        return f"<dsline.Loan of {self._layout.nbytes} bytes: {state}>"

    cdef object _ended_error(self, str way):
        cdef str what = {
            LOAN_NEVER_MADE: "was never made", LOAN_PUBLISHED: "has been published", LOAN_ABORTED: "has been aborted",
            LOAN_OF_PARENT: "belongs to the parent of this process, and is dead in a forked child",
        }[self._state]
        return LoanEndedError(f"the loan {what}: {way}")

    cdef void _end(self, int state) noexcept:
        """Lets go of the arrays, which become read-only. What they show stays theirs until they are gone."""
        cdef LoanHold hold = self._hold
        self._state = state
        if state == LOAN_ABORTED and (Py_REFCNT(<PyObject*> self._root) != 2 or Py_REFCNT(<PyObject*> self._array) != 1):
            # Somebody goes on looking at the slot. Receivers who wait for the end of the channel must not wait for him.
            if hold._handle._channel.get().withhold(hold._loan):
                hold.unlink()
                hold._kept = True
                hold._handle.kept += 1
        if dsline_base(<PyObject*> self._array) == <PyObject*> self._root:
            dsline_settle(<PyObject*> self._array, hold._loan.shown)
        dsline_settle(<PyObject*> self._root, hold._loan.shown)
        hold._owner = NULL
        self._array = self._root = self._hold = None

    cdef bytes _encoded(self):
        """The metadata, padded to the room that was left for it."""
        cdef bytes metadata = encode_meta(self._meta, self._layout) if self._meta else self._layout.metadata
        if len(metadata) > self._room:
            raise MessageTooLargeError(
                f"meta needs {len(metadata) - len(self._layout.metadata)} bytes, and the loan has room for "
                f"{self._room - len(self._layout.metadata)}; give it to alloc(meta=...), or ask for alloc(meta_room=...)")
        return padded(metadata, self._room)


cdef bytes padded(bytes metadata, Py_ssize_t room):
    cdef Py_ssize_t left = room - len(metadata)
    if left == 0:
        return metadata
    return metadata + (kPaddingEntry | (left - 8) << 32).to_bytes(8, "little") + bytes(left - 8)


# --- making one ----------------------------------------------------------------------------------------------------------

cdef ArrayLayout loan_layout(Channel channel, object shape, object dtype, object order):
    """The layout of an array to be lent; the last one is remembered."""
    cdef int64_t dims[64]
    cdef int ndim = 0
    cdef ArrayLayout layout = channel._loan_layout
    key = (shape, order)
    if layout is not None and channel._loan_dtype is dtype and channel._loan_key == key and layout.names is None:
        return layout
    if order != "C" and order != "F":
        raise ValueError(f"order is {order!r}, must be 'C' or 'F'")
    given = np.dtype(dtype)
    if given.subdtype is not None:
        raise TypeError(f"dtype is {given}, which has a shape of its own; put that into shape")
    _dtypes.encode_dtype(given)  # refuses Python objects by name
    if isinstance(shape, (tuple, list)):
        sizes = tuple(shape)
    elif hasattr(shape, "__index__"):
        sizes = (shape,)
    else:
        raise TypeError(f"shape is a {type(shape).__name__}, must be an int or a tuple of ints")
    if len(sizes) > 64:
        raise ValueError(f"shape has {len(sizes)} dimensions, must have 64 at most")
    size = given.itemsize
    numbers = []
    for number in sizes:
        number = _operator.index(number)
        if number < 0:
            raise ValueError(f"shape is {shape!r}, must not have negative sizes")
        size *= number
        numbers.append(number)
    if size > channel._cpp.max_message_size():
        raise MessageTooLargeError(
            f"shape {tuple(numbers)} of {given} needs {size} bytes, channel '{channel._label()}' takes at most "
            f"{channel._cpp.max_message_size()}; create it with max_message_size>={size}")
    for number in numbers:
        if number > INT64_MAX:
            raise ValueError(f"shape is {shape!r}, its sizes must fit into 64 bits")
        dims[ndim] = number
        ndim += 1
    # As NumPy says it of an array of one dimension, or of one element: both orders at once, so C.
    cdef bint fortran = order == "F" and sum(1 for number in numbers if number != 1) > 1 and size > 0
    if channel._schema is not None:
        example = np.empty(tuple(numbers), given, order)
        layout = channel._schema.layout_for(example)
        if layout is None:
            raise channel._mismatch(_specs.array_text(example), "alloc() what the spec says")
    else:
        layout = ArrayLayout.make(given, ndim, dims, fortran, None)
        describe(layout)
    if isinstance(dtype, (type, np.dtype)) and isinstance(shape, (int, tuple)):
        channel._loan_layout = layout
        channel._loan_dtype = dtype
        channel._loan_key = key
        channel._loan_metadata = padded(layout.metadata, loan_room(layout, None, None))
    return layout


cdef Py_ssize_t loan_room(ArrayLayout layout, object meta, object more) except -1:
    """Bytes to be left for metadata."""
    cdef Py_ssize_t room = len(layout.metadata)
    if meta is not None:
        room = len(encode_meta(meta, layout)) + 128
    if more is not None:
        given = _operator.index(more)
        if not 0 <= given <= 65536:
            raise ValueError(f"meta_room is {more!r}, must be 0 to 65536")
        room += given
    return min((max(room, LOAN_META_BYTES) + 63) // 64 * 64, 65536)


cdef Loan lend(Channel channel, object shape, object dtype, object order, object fill, object timeout, object meta,
               object meta_room):
    require_open(channel)
    if channel._zero_copy == 0:
        raise FeatureUnavailableError(
            "alloc and publish need a handle that was opened with zero_copy=True (or zero_copy='strict'): the array that it "
            "gives is the shared memory itself; send() copies once and needs no flag")
    check_timeout(timeout)
    cdef ArrayLayout layout = loan_layout(channel, shape, dtype, order)
    cdef Loan loan = Loan.__new__(Loan)
    cdef LoanHold hold = LoanHold.__new__(LoanHold)
    loan._layout = layout
    loan._channel = channel
    loan._meta = {}
    if meta is None and meta_room is None:
        loan._room = (len(channel._loan_metadata) if layout is channel._loan_layout
                      else loan_room(layout, None, None))
    else:
        loan._room = loan_room(layout, meta, meta_room)
        if meta is not None:
            loan._meta = dict(meta)
    hold._handle = channel._handle
    if not channel._alloc_room(hold._loan, layout.nbytes, <uint32_t> loan._room, timeout, False):
        raise channel._full_error(0)
    hold.link()
    loan._state = LOAN_OPEN
    loan._hold = hold
    hold._owner = <PyObject*> loan
    loan._root = layout.array_at(hold._loan.payload, hold, True)
    loan._array = layout.array_at(hold._loan.payload, loan._root, True)
    if fill is not None:
        try:
            loan._array[...] = fill
        except:
            loan._end(LOAN_ABORTED)
            raise
    return loan


# --- publishing ----------------------------------------------------------------------------------------------------------

cdef int publish_loan(Loan loan) except -1:
    cdef Channel channel = loan._channel
    cdef LoanHold hold
    cdef bytes metadata
    cdef PyObject* array
    cdef PyObject* root
    cdef Py_ssize_t others
    cdef Outcome outcome
    cdef CppAfterPublish after
    cdef bint seal
    if loan._state != LOAN_OPEN:
        raise loan._ended_error("it cannot be published" if loan._state != LOAN_PUBLISHED else "it cannot be published twice")
    if channel._cpp.is_closed() or channel._cpp.is_shut_down():
        loan._end(LOAN_ABORTED)
        raise channel._closed_error()
    if loan._meta or loan._layout is not channel._loan_layout or loan._room != len(channel._loan_metadata):
        metadata = loan._encoded()
        if loan._state != LOAN_OPEN:  # by what the user's own mapping did
            raise loan._ended_error("it cannot be published")
    else:
        metadata = channel._loan_metadata
    seal = channel._zero_copy == 2
    # From here to the commit no Python code runs, in this thread or another, so what the counts say stays true.
    hold = loan._hold
    array = <PyObject*> loan._array
    root = <PyObject*> loan._root
    if dsline_base(array) != root or dsline_data(array) != hold._loan.payload or dsline_data(root) != hold._loan.payload:
        raise BufferError("the loan's array was made to show other memory (by its data or __setstate__); alloc() another one")
    if Py_REFCNT(root) != 2:
        refuse_views(Py_REFCNT(root) - 2)
    others = Py_REFCNT(array) - 1
    if others != 0 and others != variables_of_caller(array):
        account_for(loan, array, others)
    after = AfterPublishKeep if others != 0 else AfterPublishLetGo
    memcpy(hold._loan.meta, PyBytes_AS_STRING(metadata), loan._room)
    dsline_settle(array, hold._loan.shown)
    dsline_settle(root, hold._loan.shown)
    loan._state = LOAN_PUBLISHED
    try:
        if channel._synced:
            with nogil:
                outcome = channel._cpp.publish(hold._loan, kArrayMessage, loan._layout.hash, after, seal)
        else:
            outcome = channel._cpp.publish(hold._loan, kArrayMessage, loan._layout.hash, after, seal)
    except:
        loan._state = LOAN_OPEN
        dsline_unsettle(root, hold._loan.payload)
        dsline_unsettle(array, hold._loan.payload)
        raise
    if outcome != OutcomeOk and outcome != OutcomeNotSynced:
        loan._end(LOAN_ABORTED)
        raise channel._closed_error()
    hold.unlink()
    if others != 0:
        hold._kept = True
        hold._handle.kept += 1
    loan._end(LOAN_PUBLISHED)
    channel._handle.sent += 1
    channel._handle.bytes_sent += loan._layout.nbytes
    if outcome == OutcomeNotSynced:
        raise channel._not_synced_error()
    return 0


cdef int refuse_views(Py_ssize_t count) except -1:
    raise BufferError(
        f"the loan cannot be published: {count} {'array' if count == 1 else 'arrays'} made from loan.array (slices, reshapes, "
        "transposes, torch tensors of slices) could still write to it; del them first, or write through loan.array only")


cdef Py_ssize_t variables_of_caller(PyObject* array) except -1:
    """Variables of the caller that are the array itself: what nearly every use has, and nothing else."""
    cdef PyObject* frame = dsline_frame()
    if frame == NULL:
        return 0
    cdef Py_ssize_t found = dsline_variables(frame, array, NULL)
    cdef PyObject* space = dsline_namespace(frame)
    if space != NULL:
        found += dsline_references(space, array)
    return found


class _Plain:
    """Any class that is written in Python."""


cdef tuple CONTAINERS = (
    dict, list, tuple, _types.CellType, _types.FunctionType, _types.MethodType, type,
    _types.FrameType, _types.TracebackType,
)
cdef tuple GENERATORS = (_types.GeneratorType, _types.CoroutineType, _types.AsyncGeneratorType)
# Who has one of these gives its memory to others, who then keep it alive instead of the array.
cdef frozenset LENDERS = frozenset((
    "__array_interface__", "__array_struct__", "__array__", "__buffer__", "__dlpack__", "__cuda_array_interface__",
    "_as_parameter_",
))
cdef object POINTER_HOLDER = type(np.zeros(1).ctypes)


cdef bint is_harmless(object holder):
    """True for objects that only name what they hold, so that nothing is written through them."""
    cls = type(holder)
    if cls in CONTAINERS:
        return True
    if cls in GENERATORS:
        # The variables of a running one are those of its frame.
        return not (holder.gi_running if cls is _types.GeneratorType else
                    holder.cr_running if cls is _types.CoroutineType else holder.ag_running)
    if cls is POINTER_HOLDER:
        return False
    for base in cls.__mro__:
        if base is not object and (not dsline_same_dealloc(<PyObject*> base, <PyObject*> _Plain)
                                   or not LENDERS.isdisjoint(base.__dict__)):
            return False
    try:
        own = object.__getattribute__(holder, "__dict__")
    except AttributeError:
        return cls.__mro__[-1] is object and cls is not object
    return type(own) is dict and LENDERS.isdisjoint(own)


cdef int account_for(Loan loan, PyObject* array, Py_ssize_t wanted) except -1:
    """Returns when `wanted` references to the array are names of it, and raises BufferError when one may be more."""
    # A collection would run finalizers, and these other threads.
    cdef int enabled = PyGC_Disable()
    try:
        found = harmless_references(loan, array, wanted)
    finally:
        if enabled:
            PyGC_Enable()
    if found is None:
        return 0
    suspects, known = found
    count = wanted - known
    if suspects:
        what = "held by " + ", ".join(sorted(suspects))
    else:
        what = ("held where Python cannot see it: by a torch tensor, a DLPack capsule or its consumer, an array of a subclass "
                "(matrix, masked array), a C extension, or a call that is still using it")
    raise BufferError(
        f"the loan cannot be published: beside variables, loan.array has {count} "
        f"{'reference' if count == 1 else 'references'} by which it could still be written, {what}; "
        "release or del what was made from the array (memoryview.release(), del tensor) first")


cdef object harmless_references(Loan loan, PyObject* array, Py_ssize_t wanted):
    """None when all are harmless, else (descriptions of what is not, how many are).

    Every holder is looked at once, and its references counted as the garbage collector would, so that none is counted
    twice: too few are found where a holder cannot be seen, never too many.
    """
    cdef Py_ssize_t found = 0
    cdef PyObject* frame
    cdef PyObject* back
    cdef PyObject* space
    cdef set seen = set()
    cdef list level = []
    cdef list dicts = []
    cdef list frames = []
    cdef list further
    cdef int depth
    cdef set suspects = set()
    cdef set namespaces = set()

    # 1. Variables: of the caller, of its callers, of other threads. What C code in between was called with has a reference of
    # its own, which is not counted (where that is so).
    frame = dsline_frame()
    if frame != NULL:
        frames.append(<object> frame)
        if not DSLINE_BORROWED_VARIABLES:
            while True:
                back = dsline_back(frame)
                if back == NULL:
                    break
                frames.append(<object> back)
                Py_DECREF(back)
                frame = back
            mine = frames[0]
            for other in _sys._current_frames().values():
                if other is mine:
                    continue
                while other is not None:
                    frames.append(other)
                    other = other.f_back
    for item in frames:
        frame = <PyObject*> item
        if id(item) in seen:
            continue
        seen.add(id(item))
        found += dsline_variables(frame, array, <PyObject*> level)
        for depth in range(2):
            space = dsline_namespace(frame) if depth == 0 else dsline_globals(frame)
            if space != NULL and id(<object> space) not in namespaces:
                namespaces.add(id(<object> space))
                seen.add(id(<object> space))
                found += dsline_references(space, array)
        if found == wanted:
            return None

    # 2. What the variables hold, some levels down: containers of arrays alone are not seen by the garbage collector.
    for depth in range(4):
        further = []
        for holder in level:
            if <PyObject*> holder == array or holder is loan or id(holder) in seen or len(seen) > 20000:
                continue
            if type(holder) is type or type(holder) in (_types.FrameType, _types.FunctionType) or not is_harmless(holder):
                continue
            seen.add(id(holder))
            count = dsline_references(<PyObject*> holder, array)
            if count != 0:
                found += count
                if type(holder) is dict:
                    dicts.append(holder)
            if depth < 3:
                further.extend(_gc.get_referents(holder))
        level = further
        if found == wanted:
            break

    # 3. Whatever else the garbage collector knows.
    if found < wanted:
        for holder in _gc.get_referrers(<object> array):
            if holder is loan or id(holder) in seen or holder is level or holder is frames:
                continue
            seen.add(id(holder))
            if is_harmless(holder):
                found += dsline_references(<PyObject*> holder, array)
                if type(holder) is dict:
                    dicts.append(holder)
            else:
                suspects.add(described(holder))

    # 4. A dict may be the attributes of something that is not harmless.
    if dicts:
        for owner in _gc.get_referrers(*dicts):
            if owner is dicts or owner is level or type(owner) is _types.ModuleType or is_harmless(owner):
                continue
            suspects.add(described(owner))
    if found == wanted and not suspects:
        return None
    return suspects, found - (1 if found == wanted else 0)


cdef str described(object holder):
    name = type(holder).__name__
    if name in ("managedbuffer", "memoryview", "_buffer_wrapper"):
        return "a memoryview or another user of its buffer"
    if type(holder).__module__ in ("builtins", "__main__"):
        return f"a {name}"
    return f"a {type(holder).__module__}.{name}"


# --- forks and the end of the process ------------------------------------------------------------------------------------

def _loans_after_fork():
    """In a forked child: open loans are the parent's. Whatever the child writes through views of them is seen by it alone."""
    cdef PyObject* at = first_open_hold
    cdef LoanHold hold
    cdef bint parted = True
    while at != NULL:
        hold = <LoanHold> at
        parted = hold._handle._channel.get().part_with_loans() and parted
        if hold._owner != NULL:
            (<Loan> hold._owner)._end(LOAN_OF_PARENT)
        at = hold._next
    if not parted:
        raise OSError("views of open loans in this forked child can still write into the parent's slots; do not use them")


def _end_loans():
    """At the end of the process: open loans are aborted, if no other thread may still be writing to one."""
    cdef PyObject* at
    cdef LoanHold hold
    if first_open_hold == NULL or len(_sys._current_frames()) > 1:
        return
    while first_open_hold != NULL:
        hold = <LoanHold> first_open_hold
        if not hold._handle._channel.get().part_with_loans():
            return
        hold.unlink()
        hold._handle._channel.get().abort(hold._loan)
        if hold._owner != NULL:
            (<Loan> hold._owner)._end(LOAN_ABORTED)


_os.register_at_fork(after_in_child=_loans_after_fork)
_atexit.register(_end_loans)
