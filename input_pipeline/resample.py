"""Resizes to a square, crops and mirrors in one pass, with the same bits as Pillow or TensorFlow 2 in three steps.

Pillow computes whole images, one channel value at a time; this module computes only the pixels of the crop, whole rows
at a time, and mirrors them on the way. Numba compiles it once per machine and keeps the result. Images of few pixels
are left to Pillow, which resizes thousands of them in the time that it takes to import Numba.
"""

import functools
import math
import threading
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

Method = Literal["pillow", "tf"]
BITS = 22  # fractional bits of Pillow's fixed-point weights: 32, less 8 for the pixel and 2 of head-room
HALF = np.int32(1 << (BITS - 1))
SMALL = 64  # largest side in pixels of images, before and after, that Numba is not imported for
KEPT = 48 << 20  # the most bytes that a thread keeps for each use: an image of 16 megapixels
_kept = threading.local()
_compiling = threading.Lock()


def _compiled(function: Callable) -> Callable:
    """Has Numba compile the function when it is first called. Importing Numba takes a third of a second, and most
    processes that import this module resize nothing."""

    @functools.cache
    def compiled() -> Callable:
        import numba

        try:
            return numba.njit(nogil=True, cache=True)(function)
        except RuntimeError:  # no cache folder can be written, so it is compiled in every process
            return numba.njit(nogil=True)(function)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        with _compiling:  # threads that decode begin together, and each would compile for itself
            kernel = compiled()
        return kernel(*arguments)

    return call


class Window(NamedTuple):
    """A square part of the resized image.

    Attributes:
        top, left: the window's first row and column.
        side: the window's side in pixels.
        mirrored: whether left and right change places, after cropping.
    """

    top: int
    left: int
    side: int
    mirrored: bool = False


def resample(
    pixels: np.ndarray, side: int, window: Window, method: Method = "pillow", into: np.ndarray | None = None
) -> np.ndarray:
    """Returns a window of an image that is resized to a square without keeping the aspect ratio.

    Args:
        pixels: the image, uint8 [height, width, 3].
        side: the side in pixels of the square that the whole image is resized to.
        window: the part of the square to return.
        method: `pillow`: bilinear with antialiasing, like `Image.resize((side, side), BILINEAR)` and so torchvision's
            `Resize` on Pillow images. `tf`: bilinear from the four nearest pixels, like `tf.image.resize`, rounded to
            whole grey levels.
        into: array that receives the result; None: new memory.

    Returns:
        uint8 [window.side, window.side, 3].
    """
    shown = np.empty((window.side, window.side, 3), np.uint8) if into is None else into
    height, width = pixels.shape[:2]
    small = max(height, width, side) <= SMALL
    if small and method == "pillow":
        pixels = np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BILINEAR))
    if pixels.shape[:2] == (side, side):  # both methods leave the pixels as they are if the size does not change
        rows = slice(window.top, window.top + window.side)
        if window.mirrored and not small:
            _mirrored(_flat(np.ascontiguousarray(pixels[rows])), window.left, _flat(shown))
        else:
            view = pixels[rows, window.left : window.left + window.side]
            shown[...] = view[:, ::-1] if window.mirrored else view
        return shown
    compute = _tensorflow if method == "tf" else _pillow
    compute(np.ascontiguousarray(pixels), side, *window, shown)
    return shown


def _pillow(pixels: np.ndarray, side: int, top: int, left: int, size: int, mirrored: bool, shown: np.ndarray) -> None:
    height, width = pixels.shape[:2]
    rows, columns = _antialiased(height, side), _antialiased(width, side)
    if _vertical_first(height, width, side):
        between = scratch("between", size, width)
        _along_columns(_flat(pixels), *rows, top, _flat(between))
        _along_rows(_flat(between), *columns, left, mirrored, _flat(shown))
    else:
        first, count, weights = rows
        start, stop = first[top], first[top + size - 1] + count[top + size - 1]
        between = scratch("between", stop - start, size)
        _along_rows(_flat(pixels[start:stop]), *columns, left, mirrored, _flat(between))
        _along_columns(_flat(between), first - start, count, weights, top, _flat(shown))


def _vertical_first(height: int, width: int, side: int) -> bool:
    """Whether Pillow makes the vertical pass first, and rounds after it; from version 13 on it does if columns shrink
    much more."""
    return side < height and 2 * width * side < side * (height + side)


def _tensorflow(
    pixels: np.ndarray, side: int, top: int, left: int, size: int, mirrored: bool, shown: np.ndarray
) -> None:
    height, width = pixels.shape[:2]
    _between_four(_flat(pixels), *_nearest(height, side), *_nearest(width, side), top, left, mirrored, _flat(shown))


def scratch(use: str, height: int, width: int) -> np.ndarray:
    """Returns uint8 [height, width, 3] of any content, valid until this thread asks again for the same use.

    An image is so large that malloc would take its memory from the system and give it back every time, with a page
    fault for every 4 KiB; decoding and resizing would take 2.4 ms instead of 1.7. The memory of a rare huge image is
    not kept, because every thread would hold it until the program ends.
    """
    size = height * width * 3
    if size > KEPT:
        return np.empty((height, width, 3), np.uint8)
    if len(getattr(_kept, use, ())) < size:
        setattr(_kept, use, np.empty(size, np.uint8))
    return getattr(_kept, use)[:size].reshape(height, width, 3)


def _flat(pixels: np.ndarray) -> np.ndarray:
    """Returns [height, width, 3] as [height, 3 width] in the same memory."""
    return pixels.reshape(len(pixels), -1)


def _nearest(size: int, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns for each of `side` resized positions the two nearest pixels and the weight of the second, in float32 as
    TensorFlow's kernel computes them with half-pixel centres."""
    scale = np.float32(size) / np.float32(side)
    at = (np.arange(side, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
    below = np.floor(at)
    low = np.maximum(below.astype(np.int64), 0)
    high = np.minimum(np.ceil(at).astype(np.int64), size - 1)
    return low, high, at - below


@_compiled
def _antialiased(size: int, side: int):
    """Returns for each of `side` resized positions its first pixel, the number of pixels, and their weights in fixed
    point.

    The weights are a normalized triangle around the position's centre, as wide as a resized pixel, but at least one.
    """
    scale = size / side
    width = max(scale, 1.0)
    first, count = np.empty(side, np.int64), np.empty(side, np.int64)
    weights = np.zeros((side, 2 * math.ceil(width) + 1), np.int32)
    for position in range(side):
        centre = (position + 0.5) * scale
        low, high = max(int(centre - width + 0.5), 0), min(int(centre + width + 0.5), size)
        total = 0.0
        for pixel in range(low, high):
            total += max(1.0 - abs((pixel - centre + 0.5) * (1.0 / width)), 0.0)
        for pixel in range(low, high):
            share = max(1.0 - abs((pixel - centre + 0.5) * (1.0 / width)), 0.0) / total
            weights[position, pixel - low] = int(0.5 + share * (1 << BITS))
        first[position], count[position] = low, high - low
    return first, count, weights


@_compiled
def _mirrored(source, start, target):
    """Copies pixels of `source` [height, 3 width] from position `start` on, mirrored, in a fifth of numpy's time."""
    n = target.shape[1] // 3
    for y in range(target.shape[0]):
        for x in range(n):
            for channel in range(3):
                target[y, 3 * x + channel] = source[y, 3 * (start + n - 1 - x) + channel]


@_compiled
def _along_columns(source, first, count, weights, start, target):
    """Computes rows of `target` [rows, n] as weighted sums of rows of `source` [height, n], from position `start`."""
    n = target.shape[1]
    total = np.empty(n, np.int32)
    for y in range(target.shape[0]):
        position = start + y
        total[:] = HALF
        for tap in range(count[position]):
            weight, row = weights[position, tap], source[first[position] + tap]
            for x in range(n):
                total[x] += row[x] * weight
        row = target[y]
        for x in range(n):
            row[x] = total[x] >> BITS


@_compiled
def _along_rows(source, first, count, weights, start, mirrored, target):
    """Computes pixels of `target` [height, 3 n] as weighted sums of pixels of `source` [height, 3 width] in the same
    row.

    Bytes are first gathered and then multiplied, because the second loop then becomes vector instructions.
    """
    n = target.shape[1] // 3
    taps = count[start : start + n].max()
    places = np.empty(3 * n, np.int64)
    shares = np.zeros((taps, 3 * n), np.int32)
    for x in range(n):
        position = start + (n - 1 - x if mirrored else x)
        # a position with fewer taps than others gets taps of weight 0, and begins earlier where the row would end
        place = min(first[position], source.shape[1] // 3 - taps)
        for channel in range(3):
            places[3 * x + channel] = 3 * place + channel
            for tap in range(count[position]):
                shares[first[position] - place + tap, 3 * x + channel] = weights[position, tap]
    total, gathered = np.empty(3 * n, np.int32), np.empty(3 * n, np.uint8)
    for y in range(target.shape[0]):
        total[:] = HALF
        for tap in range(taps):
            row, share = source[y, 3 * tap :], shares[tap]
            for x in range(3 * n):
                gathered[x] = row[places[x]]
            for x in range(3 * n):
                total[x] += gathered[x] * share[x]
        row = target[y]
        for x in range(3 * n):
            row[x] = total[x] >> BITS


@_compiled
def _between_four(source, above, below, down, before, after, across, top, left, mirrored, target):
    """Interpolates bilinearly in float32, first along two rows, then between them, and rounds half up."""
    n = target.shape[1] // 3
    near, far, shares = np.empty(3 * n, np.int64), np.empty(3 * n, np.int64), np.empty(3 * n, np.float32)
    for x in range(3 * n):
        position = left + (n - 1 - x // 3 if mirrored else x // 3)
        near[x], far[x] = 3 * before[position] + x % 3, 3 * after[position] + x % 3
        shares[x] = across[position]
    lines, held = np.empty((2, 3 * n), np.float32), np.full(2, -1)  # the next row often needs them again
    gathered = np.empty((2, 3 * n), np.uint8)
    for y in range(target.shape[0]):
        for number, other in ((above[top + y], below[top + y]), (below[top + y], above[top + y])):
            if held[0] != number and held[1] != number:
                slot = 1 if held[0] == other else 0
                row, line = source[number], lines[slot]
                for x in range(3 * n):
                    gathered[0, x], gathered[1, x] = row[near[x]], row[far[x]]
                for x in range(3 * n):
                    start = np.float32(gathered[0, x])
                    line[x] = start + (np.float32(gathered[1, x]) - start) * shares[x]
                held[slot] = number
        upper = lines[0 if held[0] == above[top + y] else 1]
        lower = lines[0 if held[0] == below[top + y] else 1]
        share, row = down[top + y], target[y]
        for x in range(3 * n):
            row[x] = np.uint8(upper[x] + (lower[x] - upper[x]) * share + np.float32(0.5))
