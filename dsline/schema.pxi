# The schema of a typed channel: what the region says that messages have to be. Included by _core.pyx.
#
# It is stored as the metadata entries that describe an array (docs/design/frame-format.md), with 0 for the length of an
# open axis, and two tags: "open", a bit per such axis, and "record" for a dict of specs.

from dsline import specs as _specs


def make_schema(spec):
    """Check what the user gave as `spec`: the `Schema` of an ArraySpec or of a dict of them."""
    return Schema.of_spec(spec)


def read_schema(bytes encoded not None):
    """Read what a region says: its `Schema`; ValueError when that is none."""
    return Schema.decode(encoded)


@cython.final
cdef class Schema:
    """A spec as the core stores it and as the calls check it. Immutable; shared by every handle of the process.

    `spec` is an ArraySpec, or a dict of them for a record; `fixed` says that no axis is open, and that `layout` is the one
    layout of all messages; a length of -1 in `_shape` is an open one.
    """

    @staticmethod
    cdef Schema of_spec(object spec):
        """Encodes what the user gave. Raises as ArraySpec does."""
        cdef CppMetadataBuilder builder
        cdef bint record = not isinstance(spec, _specs.ArraySpec)
        cdef int64_t open_axes = 0
        cdef int64_t shape[64]
        cdef int i
        cdef ArrayLayout layout
        if record:
            try:
                fields = dict(spec)
            except (TypeError, ValueError):
                raise TypeError(
                    f"spec is a {type(spec).__name__}, must be an ArraySpec or a dict of them (a record)") from None
            spec = _specs.ArraySpec((), _specs.record_dtype(fields))
        for i, dim in enumerate(spec.shape):
            shape[i] = 0 if dim is None else dim
            if dim is None:
                open_axes |= <int64_t> 1 << i
        layout = ArrayLayout.make(spec.dtype, spec.ndim, shape, spec.order == "F", None)
        add_layout_of(builder, layout)
        if open_axes != 0:
            builder.add_tag_int(b"open", open_axes)
        if record:
            builder.add_tag_bool(b"record", True)
        return Schema.decode(as_bytes(builder.bytes()))

    @staticmethod
    cdef Schema decode(bytes encoded):
        """Reads what a region says; ValueError when that is no schema."""
        cdef Schema self = _schemas.get(encoded)
        if self is not None:
            return self
        cdef CppMetadata parsed
        cdef CppTag tag
        cdef string why
        cdef int64_t open_axes = 0
        cdef int i
        self = Schema.__new__(Schema)
        self.encoded = encoded
        if not parse_metadata(PyBytes_AS_STRING(encoded), PyBytes_GET_SIZE(encoded), parsed, why) or not parsed.has_shape:
            raise ValueError(why.decode() or "it describes no array")
        for tag in parsed.tags:
            if tag.key == b"open" and tag.kind == TAG_INT:
                open_axes = tag.i
            elif tag.key == b"record":
                self.record = True
        self.dtype = _dtypes.decode_dtype(as_bytes(parsed.dtype_code))
        self._ndim = <int> parsed.shape.size()
        self._fortran = parsed.fortran
        self.fixed = open_axes == 0
        for i in range(self._ndim):
            self._shape[i] = -1 if open_axes >> i & 1 else parsed.shape[i]
        if self.record:
            if self._ndim != 0 or self.dtype.names is None:
                raise ValueError("its record is no structure")
            self.spec = _specs.record_spec(self.dtype)
        else:
            shape = tuple([None if self._shape[i] < 0 else self._shape[i] for i in range(self._ndim)])
            self.spec = _specs.ArraySpec(shape, self.dtype, "F" if self._fortran else "C")
        if self.fixed:
            self.layout = self._layout(self._shape)
        if len(_schemas) >= 256:
            _schemas.clear()
        _schemas[encoded] = self
        return self

    cdef ArrayLayout _layout(self, const int64_t* shape):
        cdef ArrayLayout layout = ArrayLayout.make(self.dtype, self._ndim, shape, self._fortran, None)
        describe(layout)
        return layout

    cdef ArrayLayout layout_for(self, object array):
        """The layout in which `array` travels; None when it does not fit."""
        cdef cnp.ndarray source = array
        cdef int64_t shape[64]
        cdef int i
        if cnp.PyArray_NDIM(source) != self._ndim:
            return None
        for i in range(self._ndim):
            shape[i] = cnp.PyArray_DIMS(source)[i]
            if self._shape[i] >= 0 and self._shape[i] != shape[i]:
                return None
        dtype = source.dtype
        if dtype is not self.dtype and dtype != self.dtype:
            return None
        return self.layout if self.fixed else self._layout(shape)

    cdef bint fits(self, ArrayLayout layout) except -1:
        """Whether a received array is what the spec says."""
        cdef int i
        if layout is None or layout.ndim != self._ndim:
            return False
        for i in range(self._ndim):
            if self._shape[i] >= 0 and self._shape[i] != layout.shape[i]:
                return False
        return (layout.fortran == self._fortran and
                (layout.dtype is self.dtype or _dtypes.encode_dtype(layout.dtype) == _dtypes.encode_dtype(self.dtype)))

    def text(self):
        """The spec, for messages to people."""
        return _specs.spec_text(self.spec)


cdef dict _schemas = {}


cdef int describe(ArrayLayout layout) except -1:
    """Gives a layout the metadata that says it, and the hash of that."""
    cdef CppMetadataBuilder builder
    add_layout_of(builder, layout)
    layout.metadata = as_bytes(builder.bytes())
    layout.hash = schema_hash(PyBytes_AS_STRING(layout.metadata), PyBytes_GET_SIZE(layout.metadata))
    return 0


cdef uint64_t hash_of(ArrayLayout layout) except? 0:
    """Hash of the entries that describe the array of a received layout, whatever other metadata came with it."""
    cdef CppMetadataBuilder builder
    if layout.hash == 0:
        add_layout_of(builder, layout)
        layout.hash = schema_hash(builder.bytes().data(), builder.bytes().size())
    return layout.hash


cdef int add_layout_of(CppMetadataBuilder& builder, ArrayLayout layout) except -1:
    return add_layout(builder, layout.dtype, layout.ndim, <const int64_t*> layout.shape,
                      <const int64_t*> layout.strides if layout.fortran else NULL)


@cython.final
cdef class Field:
    """One field of a record: where it is in the payload, and how it lies there."""

    cdef str name
    cdef Py_ssize_t offset
    cdef ArrayLayout layout


cdef tuple fields_of(ArrayLayout layout):
    """The fields of a layout that is one structure; None where it is not."""
    cdef Field field
    cdef int64_t shape[64]
    cdef int i
    if layout.fields is not None:
        return layout.fields
    if layout.ndim != 0 or layout.names is None:
        return None
    fields = []
    for name in layout.names:
        dtype, offset = layout.dtype.fields[name][:2]
        field = Field.__new__(Field)
        field.name = name
        field.offset = offset
        for i, dim in enumerate(dtype.shape):
            shape[i] = dim
        field.layout = ArrayLayout.make(dtype.base, dtype.ndim, shape, False, None)
        fields.append(field)
    layout.fields = tuple(fields)
    return layout.fields


cdef dict record_over(ArrayLayout layout, const void* payload, object base):
    """The fields of a record as read-only arrays over it, which keep `base` alive."""
    cdef Field field
    record = {}
    for field in fields_of(layout):
        record[field.name] = field.layout.array_at(<char*> payload + field.offset, base, False)
    return record


cdef int write_field(void* target, Field field, object value) except -1:
    """Copies a field's value into a record that is being written. Requires: its dtype and shape are the field's."""
    cdef cnp.ndarray source = value
    cdef void* data = cnp.PyArray_DATA(source)
    cdef size_t size = field.layout.nbytes
    cdef char* to = <char*> target + field.offset
    if not cnp.PyArray_IS_C_CONTIGUOUS(source):
        return PyArray_CopyInto(field.layout.array_at(to, None, True), source)
    if size < NOGIL_COPY_BYTES:
        memcpy(to, data, size)
    else:
        with nogil:
            memcpy(to, data, size)
    return 0
