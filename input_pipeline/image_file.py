"""Image files: which are read, which formats are opened, how large an image may be. One rule for all who read.

An image is bytes that `read_image_file` takes from a file or a dataset keeps, and `opened` makes a Pillow image of
them. Pillow knows four dozen formats, one of which starts Ghostscript; here it is asked for the few in `FORMATS`.
"""

import io
import logging
import os
import stat
import warnings

# the seven formats' readers, so that Pillow need not look for more of them when it is given a file
from PIL import (  # noqa: F401
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from input_pipeline.examples import DamagedImage, DatasetError, cannot_read

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "PPM", "TIFF")  # Pillow's names; PPM is also PBM, PGM and PNM
MAX_PIXELS = 178_956_970  # what Pillow, and so torchvision, refuses to open beyond: twice its MAX_IMAGE_PIXELS
MAX_BYTES = 1 << 30  # of a file; MAX_PIXELS uncompressed with alpha are 0.72e9

# Pillow warns from half the limit on, which is no fault of the image
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# what Pillow logs of a damaged file, the error says that is raised; without a handler Python would print it
logging.getLogger("PIL").addHandler(logging.NullHandler())


def read_image_file(path: str | os.PathLike) -> bytes:
    """Reads the whole content of an image file.

    Raises:
        CannotRead: the operating system refuses to open or to read it.
        DatasetError: it is no regular file, which might never end or never begin, or it is larger than `MAX_BYTES`.
    """
    return read_regular_file(path, MAX_BYTES)


def read_regular_file(path: str | os.PathLike, most: int) -> bytes:
    """Reads the whole content of a file of at most `most` bytes; it raises what `read_image_file` raises."""
    try:
        # without O_NONBLOCK, opening a FIFO that nobody writes to never returns
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb", buffering=0) as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise DatasetError(_not_regular(path, status.st_mode))
            if status.st_size > most:
                raise DatasetError(f"{path} has {status.st_size:,} bytes, and at most {most:,} are read of a file")
            return file.read()
    except OSError as error:
        try:
            mode = os.stat(path).st_mode
        except OSError:
            mode = stat.S_IFREG
        if not stat.S_ISREG(mode):  # a socket cannot be opened at all
            raise DatasetError(_not_regular(path, mode)) from None
        raise cannot_read(path, error) from None


def kind_of(mode: int) -> str:
    """Says in words what kind of file a mode stands for."""
    kinds = {
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFLNK: "a symbolic link to nothing",
    }
    return kinds.get(stat.S_IFMT(mode), "no regular file")


def _not_regular(path: str | os.PathLike, mode: int) -> str:
    return f"{path} is {kind_of(mode)}, and only regular files are read; take it out of there or name a file"


def opened(data: bytes) -> Image.Image:
    """Opens an encoded image with Pillow, which reads its header and not yet its pixels.

    Raises:
        DamagedImage: the bytes are of none of `FORMATS`, or the image has more than `MAX_PIXELS`.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except MemoryError:  # says nothing about the image
        raise
    except Exception as error:  # readers of many formats raise what they come across
        raise damaged(error) from None
    check_pixels(image.height, image.width)
    return image


def check_pixels(height: int, width: int) -> None:
    """Refuses an image by the size that its header claims, before memory is taken for it.

    Raises:
        DamagedImage: it has more than `MAX_PIXELS`.
    """
    if height * width > MAX_PIXELS:
        raise DamagedImage(
            f"not a readable image (it has {height:,}x{width:,} pixels; at most {MAX_PIXELS:,} are read)"
        )


def damaged(error: Exception) -> DatasetError:
    """Turns what a decoder raised into the error for bytes that are no image; what the system refused stays apart."""
    if isinstance(error, OSError) and error.errno:
        return cannot_read("an image", error)
    known = isinstance(error, UnidentifiedImageError)
    reason = f"its first bytes are of none of the formats {', '.join(FORMATS)}" if known else error
    return DamagedImage(f"not a readable image ({reason})")
