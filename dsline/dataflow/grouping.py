"""Rows that belong together, found by NumPy: groups of equal rows, and hashes of keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, TypeAlias

import numpy as np

__all__ = ["counts_of", "extremes", "group", "hash_keys", "is_sorted", "mix", "pick", "starts_of"]

Array: TypeAlias = np.ndarray[Any, Any]

_MOST_CODES: Final = int(np.iinfo(np.int64).max)
_BLOCK: Final = 4096
_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)
_SPLITMIX: Final = (
    (np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)),
    (np.uint64(27), np.uint64(0x94D049BB133111EB)),
)
_FEW_CODES: Final = 4  # so many passes are faster than a sort
_FEW: Final = 64  # values that are sorted as fast as hashed


def is_sorted(values: Array) -> bool:
    return bool(np.logical_and.reduce(values[1:] >= values[:-1]))


def extremes(values: Array) -> tuple[int, int]:
    """Smallest and largest of integers."""
    return int(np.minimum.reduce(values)), int(np.maximum.reduce(values))


def starts_of(*columns: Array) -> Array:
    """Where runs of equal elements start."""
    change = columns[0][1:] != columns[0][:-1]
    for column in columns[1:]:
        change |= column[1:] != column[:-1]
    found = np.flatnonzero(change)
    starts = np.empty(len(found) + 1, np.int64)
    starts[0] = 0
    np.add(found, 1, out=starts[1:])
    return starts


def counts_of(starts: Array, size: int) -> Array:
    """Return how many elements each run has."""
    counts = np.empty(len(starts), np.int64)
    np.subtract(starts[1:], starts[:-1], out=counts[:-1])
    counts[-1:] = size - starts[-1:]
    return counts


def _codes(values: Array, by_value: bool) -> tuple[Array, int]:
    """Number values: codes from 0, in the order of the values where asked for, and how many there may be. Equal codes mean equal
    values."""
    if values.dtype.kind in "iub":
        if values.dtype.kind == "b":
            return values.view(np.uint8).astype(np.int64), 2
        lowest, highest = extremes(values)
        if highest - lowest < max(4 * len(values), 1 << 16):
            if values.dtype == np.uint64 and highest > _MOST_CODES:
                return (values - np.uint64(lowest)).astype(np.int64), highest - lowest + 1
            return values.astype(np.int64, copy=False) - lowest, highest - lowest + 1
    if len(values) > _FEW and not (by_value and values.dtype.kind in "iuf"):
        found = _codes_by_hash(values, by_value)
        if found is not None:
            return found
    distinct, inverse = np.unique(values, return_inverse=True)
    return inverse.reshape(-1).astype(np.int64, copy=False), len(distinct)


def _codes_by_hash(values: Array, by_value: bool) -> tuple[Array, int] | None:
    """As `_codes`, by way of hashes, which are compared and sorted faster than texts. None: two values have one hash."""
    hashes = hash_keys(values)
    if not by_value and len(values) > 1024:
        # Of few different values each has 16 bits of its own, usually.
        short = (hashes >> np.uint64(48)).astype(np.uint16)
        place = np.full(1 << 16, -1)
        place[short] = np.arange(len(values))
        used = np.flatnonzero(place >= 0)
        first = place[used]
        place[used] = np.arange(len(used))
        codes = place[short]
        if _are(values, values[first], codes):
            return codes, len(used)
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    inverse = inverse.reshape(-1)
    distinct = values[first]
    if not _are(values, distinct, inverse):
        return None
    if not by_value:
        return inverse, len(distinct)
    rank = np.empty(len(distinct), np.int64)
    rank[np.argsort(distinct, kind="stable")] = np.arange(len(distinct))
    return rank[inverse], len(distinct)


def _order(codes: Array, size: int) -> Array:
    """A stable argsort; NumPy sorts 16 bits by radix."""
    if size <= _FEW_CODES and len(codes) > 256:
        small = codes.astype(np.uint8)
        return np.concatenate([np.flatnonzero(small == code) for code in range(size)])
    if size <= 1 << 16:
        return np.argsort(codes.astype(np.uint16), kind="stable")
    if size <= 1 << 32 and len(codes) > 2048:
        order = np.argsort(codes.astype(np.uint16), kind="stable")
        return order[np.argsort((codes >> 16).astype(np.uint16)[order], kind="stable")]
    return np.argsort(codes, kind="stable")


def group(columns: list[Array], by_value: bool = True) -> tuple[Array | None, Array]:
    """Bring equal rows together.

    Returns
    -------
    order : numpy.ndarray or None
        Indices that sort by the columns, or that only bring equal rows together (`by_value` false); stable. None: they are
        in such an order.
    starts : numpy.ndarray
        Where the groups start in that order.
    """
    if len(columns) == 1 and columns[0].dtype.kind in "iu" and is_sorted(columns[0]):
        return None, starts_of(columns[0])
    codes, size = _codes(columns[0], by_value)
    for column in columns[1:]:
        more, count = _codes(column, by_value)
        if count == 1:
            continue
        if size == 1:
            codes, size = more, count
            continue
        if size * count > _MOST_CODES:
            _, codes = np.unique(codes, return_inverse=True)
            size = len(codes)
        codes = codes * count + more
        size *= count
    if is_sorted(codes):
        return None, starts_of(codes)
    order = _order(codes, size)
    return order, starts_of(codes[order])


def pick(column: Array, order: Array | None) -> Array:
    return column if order is None else column.take(order)


def mix(words: Array) -> Array:
    """The finalizer of splitmix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014). In place."""
    shifted = np.empty(min(len(words), _BLOCK), np.uint64)
    for start in range(0, len(words), _BLOCK):  # which stays in the cache
        block = words[start : start + _BLOCK]
        temporary = shifted[: len(block)]
        for shift, factor in _SPLITMIX:
            np.right_shift(block, shift, out=temporary)
            np.bitwise_xor(block, temporary, out=block)
            np.multiply(block, factor, out=block)
        np.right_shift(block, np.uint64(31), out=temporary)
        np.bitwise_xor(block, temporary, out=block)
    return words


def hash_keys(values: Array) -> Array:
    """Hash a column: uint64, the same in every process, on every machine and for every width of the dtype.

    Integers and truth values hash by their value; floats by theirs as float64, where -0.0 is 0.0 and all NaN are one; texts by
    their code points, bytes by theirs, times by their count of units.

    Raises
    ------
    TypeError
        A dtype that is none of those.
    """
    kind = values.dtype.kind
    if kind in "iub":
        words = values.astype(np.int64 if kind == "i" else np.uint64, copy=False).view(np.uint64)
    elif kind == "f":
        doubles = values.astype(np.float64) + 0.0
        doubles[np.isnan(doubles)] = np.nan
        words = doubles.view(np.uint64)
    elif kind in "mM":
        words = values.astype(values.dtype.newbyteorder("="), copy=False).view(np.uint64)
    elif kind in "SU":
        return _hash_texts(values)
    else:
        raise TypeError(f"a key is {values.dtype}, must be integers, truth values, floats, times or texts")
    return mix(words + _GOLDEN)


def _words(values: Array) -> Iterator[tuple[int, Array]]:
    """Yield texts as whole words, padded with zeros: (number of the first row, a table of some rows, valid until the next)."""
    item = np.dtype(np.uint8 if values.dtype.kind == "S" else np.uint32)
    width = values.dtype.itemsize // item.itemsize
    room = -(-values.dtype.itemsize // 8) * 8 // item.itemsize
    padded = np.zeros((min(len(values), _BLOCK), room), item)
    for start in range(0, len(values) if width else 0, _BLOCK):
        block = np.ascontiguousarray(values[start : start + _BLOCK], values.dtype.newbyteorder("="))
        table = padded[: len(block)]
        table[:, :width] = block.view(item).reshape(len(block), width)
        yield start, table.view(np.uint64)


def _hash_texts(values: Array) -> Array:
    """Sum of words, each times an odd number of its place: nothing follows the end of a text, whatever room the dtype has."""
    hashes = np.full(len(values), _GOLDEN)
    products = np.empty(min(len(values), _BLOCK), np.uint64)
    factors = mix(np.arange(1, values.dtype.itemsize // 8 + 2, dtype=np.uint64) * _GOLDEN) | np.uint64(1)
    for start, table in _words(values):
        block, product = hashes[start : start + len(table)], products[: len(table)]
        for word, factor in zip(table.T, factors, strict=False):
            np.multiply(word, factor, out=product)
            np.add(block, product, out=block)
    return mix(hashes)


def _are(values: Array, distinct: Array, codes: Array) -> bool:
    """Whether each value is the one that its code stands for."""
    if values.dtype.kind not in "SU":
        return bool((distinct[codes] == values).all())
    wanted = np.concatenate([table.copy() for _, table in _words(distinct)]) if len(distinct) else distinct
    # Words are compared faster than texts.
    return all(
        bool((wanted.take(codes[start : start + len(table)], axis=0) == table).all())
        for start, table in _words(values)
    )
