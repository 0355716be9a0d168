# Programs over columns, run by the C++ core. Part of _core.pyx.

# Fewer rows than this cost less than letting go of the GIL.
cdef enum:
    NOGIL_ROWS = 8192


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
            out = np.empty(rows, self._result)
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
        cdef size_t found
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
        if rows < NOGIL_ROWS:
            found = self._program.get().filter(views.data(), rows, kept.data(), kept.size())
        else:
            with nogil:
                found = self._program.get().filter(views.data(), rows, kept.data(), kept.size())
        return found

    def filter_columns(self, dict data not None, tuple names not None, dict out):
        """`filter` of whole columns, which `data` has by name: the rows kept, in `out` or in arrays of their own.

        None where something is not as it must be: the caller finds out what.
        """
        cdef vector[CppColumnView] views
        cdef vector[CppRowsToKeep] kept
        cdef CppColumnView view
        cdef CppRowsToKeep one
        cdef cnp.ndarray source, target
        cdef Py_ssize_t rows = -1
        cdef size_t found
        cdef dict targets = {}
        cdef list sources = []  # the dict is the user's, and may change while the GIL is let go
        if len(names) != self._columns or not names:
            return None
        for name, dtype in zip(names, self._dtypes):
            given = data.get(name)
            if type(given) is not np.ndarray:
                return None
            sources.append(given)
            source = given
            if cnp.PyArray_NDIM(source) != 1 or (source.dtype is not dtype and source.dtype != dtype):
                return None
            view.data = <const byte*> cnp.PyArray_DATA(source)
            view.stride = cnp.PyArray_STRIDES(source)[0]
            views.push_back(view)
            rows = cnp.PyArray_DIMS(source)[0]
        for name, given in data.items():
            if type(given) is not np.ndarray:
                return None
            sources.append(given)
            source = given
            if cnp.PyArray_NDIM(source) != 1 or cnp.PyArray_DIMS(source)[0] != rows or source.dtype.hasobject:
                return None
            if out is None:
                dtype = source.dtype
                Py_INCREF(dtype)  # stolen by the call
                target = PyArray_NewFromDescr(
                    <PyTypeObject*> cnp.ndarray, dtype, 1, cnp.PyArray_DIMS(source), NULL, NULL, 0, None)
            else:
                given = out.get(name)
                if type(given) is not np.ndarray:
                    return None
                target = given
                if (cnp.PyArray_NDIM(target) != 1 or cnp.PyArray_DIMS(target)[0] < rows or source.dtype != target.dtype
                        or not cnp.PyArray_IS_C_CONTIGUOUS(target) or not cnp.PyArray_ISWRITEABLE(target)):
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
        if rows < NOGIL_ROWS:
            found = self._program.get().filter(views.data(), rows, kept.data(), kept.size())
        else:
            with nogil:
                found = self._program.get().filter(views.data(), rows, kept.data(), kept.size())
        return {name: target[:found] for name, target in targets.items()}


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
