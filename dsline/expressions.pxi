# Programs over columns, run by the C++ core. Part of _core.pyx.

# Fewer rows than this cost less than letting go of the GIL.
cdef enum:
    NOGIL_ROWS = 8192
    # A row of more numbers than this is computed by NumPy.
    ROW_COLUMNS = 32


cdef uint64_t constant_bits(object value, object dtype):
    cdef uint64_t bits = 0
    cdef bytes raw = np.array(value, dtype).tobytes()
    memcpy(&bits, PyBytes_AS_STRING(raw), min(8, PyBytes_GET_SIZE(raw)))
    return bits


@cython.final
cdef class ExpressionKernel:
    """A program that `dsline.expressions` has made, for the loops of this processor.

    Immutable; any number of threads may run it at once.
    """

    cdef unique_ptr[CppExpressionProgram] _program
    cdef tuple _dtypes
    cdef object _result
    cdef Py_ssize_t _columns
    cdef vector[char] _kinds  # of the columns: one of "?iuf"
    cdef tuple _layout  # of the last records: (their dtype, its names, offsets of the fields that are read)

    def __init__(self, list steps not None, tuple dtypes not None, result):
        """`steps`: (op, type, arguments, column, dtype and value of a constant or None); `dtypes`: of the columns."""
        cdef vector[CppExpressionStep] program
        cdef CppExpressionStep step
        cdef int i
        for op, kind, args, column, constant in steps:
            step.op = <CppExpressionOp> <int> op
            step.type = <CppElementType> <int> kind
            for i in range(3):
                step.args[i] = args[i] if i < len(args) else 0
            step.column = column
            step.constant = 0 if constant is None else constant_bits(constant[1], constant[0])
            program.push_back(step)
        self._program.reset(new CppExpressionProgram(program, <uint32_t> len(dtypes)))
        self._dtypes = dtypes
        self._result = result
        self._columns = len(dtypes)
        for dtype in dtypes:
            self._kinds.push_back(<char> ord("?" if dtype.kind == "b" else dtype.kind))
        self._layout = (None, None, ())

    cdef Py_ssize_t _views(self, tuple arrays, vector[CppColumnView]& views) except? -2:
        """The columns as the core takes them; how many rows, or -1. Requires: the caller keeps the arrays."""
        cdef cnp.ndarray array
        cdef CppColumnView view
        cdef Py_ssize_t rows = -1
        if len(arrays) != self._columns:
            raise ValueError(f"{len(arrays)} columns were given, {self._columns} are needed")
        for one, dtype in zip(arrays, self._dtypes):
            if not isinstance(one, np.ndarray):
                raise TypeError(f"a column is a {type(one).__name__}, must be an ndarray")
            array = one
            if cnp.PyArray_NDIM(array) != 1 or array.dtype != dtype:
                raise ValueError(f"a column is {array.dtype} in {cnp.PyArray_NDIM(array)} dimensions, must be {dtype} in one")
            if rows >= 0 and cnp.PyArray_DIMS(array)[0] != rows:
                raise ValueError(f"columns have different lengths: {rows}, {cnp.PyArray_DIMS(array)[0]}")
            rows = cnp.PyArray_DIMS(array)[0]
            view.data = <const byte*> cnp.PyArray_DATA(array)
            view.stride = cnp.PyArray_STRIDES(array)[0]
            views.push_back(view)
        return rows

    def evaluate(self, tuple arrays not None, Py_ssize_t rows, out=None):
        """The results, one for each of `rows`: in `out` (packed, writable, of the same dtype), or in a new array."""
        cdef vector[CppColumnView] views
        cdef Py_ssize_t given = self._views(arrays, views)
        cdef cnp.ndarray target
        cdef byte* to
        if given >= 0 and given != rows:
            raise ValueError(f"the columns have {given} rows, not {rows}")
        if rows < 0:
            raise ValueError(f"rows is {rows}, must be 0 or more")
        if out is None:
            out = new_array(self._result, rows)
        target = out
        if (cnp.PyArray_NDIM(target) != 1 or cnp.PyArray_DIMS(target)[0] != rows or target.dtype != self._result
                or not cnp.PyArray_ISCARRAY(target)):
            raise ValueError(f"out must be a writable, packed and aligned array of {rows} {self._result}")
        to = <byte*> cnp.PyArray_DATA(target)
        if rows < NOGIL_ROWS:
            self._program.get().evaluate(views.data(), rows, to)
        else:
            with nogil:
                self._program.get().evaluate(views.data(), rows, to)
        return out

    def filter(self, tuple arrays not None, Py_ssize_t rows, tuple sources not None, tuple targets not None):
        """Copy the rows of `sources` for which the result is true to the start of `targets`; how many.

        Targets have room for all rows, are packed, and share no memory with anything that is read.
        """
        cdef vector[CppColumnView] views
        cdef vector[CppRowsToKeep] kept
        cdef CppRowsToKeep one
        cdef cnp.ndarray source, target
        cdef Py_ssize_t given = self._views(arrays, views)
        if self._result != np.bool_:
            raise ValueError(f"a filter needs a truth value, and the result is {self._result}")
        if given >= 0 and given != rows or rows < 0:
            raise ValueError(f"the columns have {given} rows, not {rows}")
        if len(sources) != len(targets):
            raise ValueError(f"{len(sources)} arrays cannot be kept in {len(targets)}")
        for a, b in zip(sources, targets):
            source, target = a, b
            if (cnp.PyArray_NDIM(source) != 1 or cnp.PyArray_NDIM(target) != 1 or source.dtype != target.dtype
                    or cnp.PyArray_DIMS(source)[0] != rows or cnp.PyArray_DIMS(target)[0] < rows
                    or not cnp.PyArray_IS_C_CONTIGUOUS(target) or not cnp.PyArray_ISWRITEABLE(target)
                    or source.dtype.hasobject):
                raise ValueError(
                    f"kept rows need a writable, packed array of {rows} {source.dtype} without Python objects")
            if cnp.PyArray_ITEMSIZE(source) == 0:
                continue
            one.source = <const byte*> cnp.PyArray_DATA(source)
            one.stride = cnp.PyArray_STRIDES(source)[0]
            one.to = <byte*> cnp.PyArray_DATA(target)
            one.item_bytes = cnp.PyArray_ITEMSIZE(source)
            kept.push_back(one)
        return self._filter(views, rows, kept)

    cdef Py_ssize_t _columns_of(self, dict data, tuple names, vector[CppColumnView]& views, list sources) except -2:
        """The columns that are read, which are kept in `sources`; how many rows, or -1 where it is not for the fast path."""
        cdef CppColumnView view
        cdef cnp.ndarray source
        cdef Py_ssize_t rows = -1
        if len(names) != self._columns or not names:
            return -1
        for name, dtype in zip(names, self._dtypes):
            given = data.get(name)
            if type(given) is not np.ndarray:
                return -1
            sources.append(given)
            source = given
            if (cnp.PyArray_NDIM(source) != 1 or (source.dtype is not dtype and source.dtype != dtype)
                    or (rows >= 0 and cnp.PyArray_DIMS(source)[0] != rows)):
                return -1
            view.data = <const byte*> cnp.PyArray_DATA(source)
            view.stride = cnp.PyArray_STRIDES(source)[0]
            views.push_back(view)
            rows = cnp.PyArray_DIMS(source)[0]
        return rows

    cdef Py_ssize_t _fields_of(self, cnp.ndarray records, tuple names, vector[CppColumnView]& views) except -2:
        """The fields that are read; how many rows, or -1 where it is not for the fast path."""
        cdef CppColumnView view
        cdef tuple layout = self._layout
        cdef Py_ssize_t offset
        dtype = records.dtype
        if dtype is not layout[0] or dtype.names is not layout[1]:  # fields can be renamed in place
            if cnp.PyArray_NDIM(records) != 1 or dtype.names is None or len(names) != self._columns or dtype.hasobject:
                return -1
            places = []
            for name, wanted in zip(names, self._dtypes):
                field = dtype.fields.get(name)
                if field is None or field[0] != wanted:
                    return -1
                places.append(field[1])
            layout = self._layout = (dtype, dtype.names, tuple(places))
        if cnp.PyArray_NDIM(records) != 1:
            return -1
        view.stride = cnp.PyArray_STRIDES(records)[0]
        for place in <tuple> layout[2]:
            offset = place
            view.data = <const byte*> cnp.PyArray_DATA(records) + offset
            views.push_back(view)
        return cnp.PyArray_DIMS(records)[0]

    cdef size_t _filter(self, vector[CppColumnView]& views, Py_ssize_t rows, vector[CppRowsToKeep]& kept) except? 0:
        cdef size_t found
        if rows < NOGIL_ROWS:
            return self._program.get().filter(views.data(), rows, kept.data(), kept.size())
        with nogil:
            found = self._program.get().filter(views.data(), rows, kept.data(), kept.size())
        return found

    cdef object _evaluate_row(self, dict row, tuple names):
        """The result for Python numbers; None where one is something else, or does not fit."""
        cdef uint64_t values[ROW_COLUMNS]
        cdef uint64_t result = 0
        cdef CppColumnView views[ROW_COLUMNS]
        cdef int i
        if len(names) != self._columns or not 0 < self._columns <= ROW_COLUMNS:
            return None
        for i in range(self._columns):
            value = row.get(names[i])
            if not put_number(value, self._kinds[i], (<cnp.dtype> self._dtypes[i]).itemsize, &values[i]):
                return None
            views[i].data = <const byte*> &values[i]
            views[i].stride = 0
        self._program.get().evaluate(views, 1, <byte*> &result)
        return number_of(&result, <char> ord((<str> self._result.kind)), (<cnp.dtype> self._result).itemsize)

    def evaluate_data(self, data not None, tuple names not None):
        """The results for a dict of whole columns or of Python numbers, or for records.

        None where something is not as it must be: the caller finds out what.
        """
        cdef vector[CppColumnView] views
        cdef list sources = []
        cdef Py_ssize_t rows = -1
        cdef cnp.ndarray target
        if type(data) is dict:
            rows = self._columns_of(data, names, views, sources)
            if rows < 0 and not sources:
                return self._evaluate_row(data, names)
        elif type(data) is np.ndarray:
            rows = self._fields_of(data, names, views)
        if rows < 0:
            return None
        target = new_array(self._result, rows)
        if rows < NOGIL_ROWS:
            self._program.get().evaluate(views.data(), rows, <byte*> cnp.PyArray_DATA(target))
        else:
            with nogil:
                self._program.get().evaluate(views.data(), rows, <byte*> cnp.PyArray_DATA(target))
        return target

    def filter_records(self, cnp.ndarray records not None, tuple names not None, out):
        """`filter` of records: those kept, in `out` or in an array of their own.

        None where something is not as it must be: the caller finds out what.
        """
        cdef vector[CppColumnView] views
        cdef vector[CppRowsToKeep] kept
        cdef CppRowsToKeep one
        cdef cnp.ndarray target
        cdef Py_ssize_t rows = self._fields_of(records, names, views)
        if rows < 0:
            return None
        if out is None:
            target = new_array(records.dtype, rows)
        elif type(out) is not np.ndarray:
            return None
        else:
            target = out
            if not takes_rows(target, records, rows):
                return None
        one.source = <const byte*> cnp.PyArray_DATA(records)
        one.stride = cnp.PyArray_STRIDES(records)[0]
        one.to = <byte*> cnp.PyArray_DATA(target)
        one.item_bytes = cnp.PyArray_ITEMSIZE(records)
        kept.push_back(one)
        if out is not None and share_memory(kept, rows):
            return None
        return target[:self._filter(views, rows, kept)]

    def filter_columns(self, dict data not None, tuple names not None, dict out):
        """`filter` of whole columns, which `data` has by name: the rows kept, in `out` or in arrays of their own.

        None where something is not as it must be: the caller finds out what.
        """
        cdef vector[CppColumnView] views
        cdef vector[CppRowsToKeep] kept
        cdef CppRowsToKeep one
        cdef cnp.ndarray source, target
        cdef size_t found
        cdef dict targets = {}
        cdef list sources = []  # the dict is the user's, and may change while the GIL is let go
        cdef Py_ssize_t rows = self._columns_of(data, names, views, sources)
        if rows < 0:
            return None
        for name, given in data.items():
            if type(given) is not np.ndarray:
                return None
            sources.append(given)
            source = given
            if cnp.PyArray_NDIM(source) != 1 or cnp.PyArray_DIMS(source)[0] != rows or source.dtype.hasobject:
                return None
            if out is None:
                target = new_array(source.dtype, rows)
            else:
                given = out.get(name)
                if type(given) is not np.ndarray:
                    return None
                target = given
                if not takes_rows(target, source, rows):
                    return None
            targets[name] = target
            one.source = <const byte*> cnp.PyArray_DATA(source)
            one.stride = cnp.PyArray_STRIDES(source)[0]
            one.to = <byte*> cnp.PyArray_DATA(target)
            one.item_bytes = cnp.PyArray_ITEMSIZE(source)
            if one.item_bytes != 0:
                kept.push_back(one)
        if out is not None and share_memory(kept, rows):
            return None
        found = self._filter(views, rows, kept)
        return {name: target[:found] for name, target in targets.items()}


cdef bint put_number(object value, char kind, Py_ssize_t nbytes, void* to) except -1:
    """Write a Python number as an element of a column; False where it is none that fits."""
    cdef long long whole
    cdef unsigned long long natural
    cdef double real
    cdef float narrow
    cdef int overflow = 0
    if kind == c"f":
        if type(value) is not float and type(value) is not int:
            return False
        if type(value) is int:
            PyLong_AsLongLongAndOverflow(value, &overflow)
            if overflow != 0:
                return False
        real = value
        if nbytes == 8:
            memcpy(to, &real, 8)
        else:
            narrow = <float> real
            memcpy(to, &narrow, 4)
        return True
    if kind == c"?":
        if type(value) is not bool:
            return False
        (<uint8_t*> to)[0] = value is True
        return True
    if type(value) is not int:
        return False
    if kind == c"u" and nbytes == 8:
        if value < 0 or value >> 64:
            return False
        natural = value
        memcpy(to, &natural, 8)
        return True
    whole = PyLong_AsLongLongAndOverflow(value, &overflow)
    if overflow != 0:
        return False
    if nbytes < 8:
        if kind == c"u":
            if whole < 0 or whole >> (8 * nbytes) != 0:
                return False
        elif whole >> (8 * nbytes - 1) not in (0, -1):
            return False
    memcpy(to, &whole, nbytes)  # the low bytes come first
    return True


cdef object number_of(const void* at, char kind, Py_ssize_t nbytes):
    """An element as a Python number."""
    cdef double real
    cdef float narrow
    cdef uint64_t natural = 0
    cdef int64_t whole
    if kind == c"f":
        if nbytes == 8:
            memcpy(&real, at, 8)
            return real
        memcpy(&narrow, at, 4)
        return <double> narrow
    memcpy(&natural, at, nbytes)
    if kind == c"b":
        return natural != 0
    if kind == c"u":
        return natural
    whole = <int64_t> (natural << (64 - 8 * nbytes)) >> (64 - 8 * nbytes)
    return whole


cdef cnp.ndarray new_array(object dtype, Py_ssize_t rows):
    cdef cnp.npy_intp shape = rows
    Py_INCREF(dtype)  # stolen by the call
    return PyArray_NewFromDescr(<PyTypeObject*> cnp.ndarray, dtype, 1, &shape, NULL, NULL, 0, None)


cdef bint takes_rows(cnp.ndarray target, cnp.ndarray source, Py_ssize_t rows):
    return (cnp.PyArray_NDIM(target) == 1 and cnp.PyArray_DIMS(target)[0] >= rows and source.dtype == target.dtype
            and cnp.PyArray_IS_C_CONTIGUOUS(target) and cnp.PyArray_ISWRITEABLE(target))


cdef bint share_memory(const vector[CppRowsToKeep]& kept, Py_ssize_t rows) noexcept:
    """Whether a target may lie where any of the sources is, or another target."""
    cdef size_t i, k
    cdef ptrdiff_t extent
    cdef const byte* low
    cdef const byte* end
    if rows == 0:
        return False
    for i in range(kept.size()):
        end = kept[i].to + rows * kept[i].item_bytes
        for k in range(kept.size()):
            extent = (rows - 1) * kept[k].stride
            low = kept[k].source + min(0, extent)
            if kept[i].to < kept[k].source + max(0, extent) + kept[k].item_bytes and low < end:
                return True
            if i != k and kept[i].to < kept[k].to + rows * kept[k].item_bytes and kept[k].to < end:
                return True
    return False


def expression_backend():
    """The instruction set that expressions run on: "avx512", "avx2" or "baseline"."""
    return cpp_expression_backend().decode()
