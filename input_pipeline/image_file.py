"""Image files: which files are read, which formats are opened and how large an image may be, for the whole program.

The bytes of an image come from `read_image_file` or from a dataset's record, and `opened` makes a Pillow image of them.
Pillow knows four dozen formats, one of which starts Ghostscript; this module allows only those in `FORMATS`.
"""

import io
import logging
import os
import stat
import warnings

# importing the seven formats' readers keeps Pillow from looking for more of them when it opens a file
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
MAX_PIXELS = 178_956_970  # the limit of Pillow, and so of torchvision: twice its MAX_IMAGE_PIXELS
MAX_BYTES = 1 << 30  # the largest file that is read; MAX_PIXELS uncompressed with alpha take 0.72e9

# Pillow warns of images above half the limit, although they are in order
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Pillow logs damage that the error it raises describes as well; without a handler Python would print the log
logging.getLogger("PIL").addHandler(logging.NullHandler())


def read_image_file(path: str | os.PathLike) -> bytes:
    """Reads the whole content of an image file.

    Raises:
        CannotRead: the operating system refuses to open or to read the file.
        DatasetError: the file is larger than `MAX_BYTES`, or not a regular file; reading a pipe might never end.
    """
    return read_regular_file(path, MAX_BYTES)


def read_regular_file(path: str | os.PathLike, most: int) -> bytes:
    """Reads the whole content of a file of at most `most` bytes, with the errors of `read_image_file`."""
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
    """Returns the kind of file that a mode stands for, in words."""
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
        DamagedImage: the bytes have none of the `FORMATS`, or the image has more than `MAX_PIXELS`.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except MemoryError:  # the machine's fault, not the image's
        raise
    except Exception as error:  # the formats' readers raise exceptions of many kinds
        raise damaged(error) from None
    check_pixels(image.height, image.width)
    return image


def check_pixels(height: int, width: int) -> None:
    """Refuses an image by the size in its header, before memory is allocated for it.

    Raises:
        DamagedImage: the image has more than `MAX_PIXELS`.
    """
    if height * width > MAX_PIXELS:
        raise DamagedImage(
            f"not a readable image (it has {height:,}x{width:,} pixels; at most {MAX_PIXELS:,} are read)"
        )


def damaged(error: Exception) -> DatasetError:
    """Turns a decoder's exception into `DamagedImage`, or into `CannotRead` if the system refused to read."""
    if isinstance(error, OSError) and error.errno:
        return cannot_read("an image", error)
    known = isinstance(error, UnidentifiedImageError)
    reason = f"its first bytes are of none of the formats {', '.join(FORMATS)}" if known else error
    return DamagedImage(f"not a readable image ({reason})")
