"""Do the offsets of a damaged or hostile Arrow file lead out of its data? Arrow itself follows them wherever they lead.

All of a file is too much to look at when a run starts (150 million texts), so each row is looked at when it is read.
"""

import numpy as np
import pyarrow as pa

BYTES = (pa.types.is_string, pa.types.is_binary, pa.types.is_large_string, pa.types.is_large_binary)


def check_range(array: pa.Array, start: int, stop: int) -> None:
    """Makes sure that the values in [start, stop) can be read, those of nested lists too.

    Raises:
        pa.ArrowInvalid: if they lie outside of what the array has.
    """
    kind = array.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        first, last = _bounds(array, start, stop, len(array.values))
        check_range(array.values, first, last)
    elif any(is_kind(kind) for is_kind in BYTES):
        _bounds(array, start, stop, _size(array))
    elif not pa.types.is_primitive(kind) and not pa.types.is_null(kind):
        array.slice(start, stop - start).validate(full=True)  # (kinds that no converter writes)


def _size(array: pa.Array) -> int:
    """Bytes of the values."""
    data = array.buffers()[2]
    return data.size if data is not None else 0


def _bounds(array: pa.Array, start: int, stop: int, size: int) -> tuple[int, int]:
    """Where the values of [start, stop) begin and end, if that is within `size` and none ends before it begins."""
    buffer = array.buffers()[1]
    if start == stop or buffer is None:
        return 0, 0
    wide = pa.types.is_large_list(array.type) or pa.types.is_large_string(array.type)
    width = np.dtype(np.int64 if wide or pa.types.is_large_binary(array.type) else np.int32)
    place = (array.offset + start) * width.itemsize
    number = stop - start + 1
    if place + number * width.itemsize > buffer.size:
        raise pa.ArrowInvalid("the offsets end before the rows do")
    offsets = np.frombuffer(buffer, width, number, place)
    if offsets[0] < 0 or offsets[-1] > size or (offsets[1:] < offsets[:-1]).any():
        raise pa.ArrowInvalid("the offsets lead out of the data")
    return int(offsets[0]), int(offsets[-1])
