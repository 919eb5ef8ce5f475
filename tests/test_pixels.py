"""Pixels, bit for bit: what Pillow, torchvision and TensorFlow make of the same files, ordinary and not."""

import io
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import PIL
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from input_pipeline import DamagedImage, Views, image_file
from input_pipeline import resample as resampling
from input_pipeline.preprocess import decode, native_area
from input_pipeline.resample import Window, resample
from parity.in_torch import pipeline
from parity.sides import images
from parity.sides import images as pillow
from parity.sides.inputs import pictures

PHOTO = pictures(1, 97, 131, 0)[0]


def encoded(image: Image.Image | np.ndarray, kind: str = "JPEG", **settings) -> bytes:
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **settings)
    return file.getvalue()


@st.composite
def windows(draw):
    """Image height and width, side resized to, and a window in it; shrinking and growing, wide and high."""
    height, width = draw(st.integers(1, 400)), draw(st.integers(1, 400))
    side = draw(st.integers(1, 250))
    size = draw(st.integers(1, side))
    top, left = draw(st.integers(0, side - size)), draw(st.integers(0, side - size))
    return height, width, side, Window(top, left, size, draw(st.booleans()))


def noise(height, width):
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), np.uint8)


def shown(image, window):
    top, left, size, mirrored = window
    view = image[top : top + size, left : left + size]
    return view[:, ::-1] if mirrored else view


@settings(max_examples=150, deadline=None)
@given(windows())
def test_pillow_bit_for_bit(case):
    height, width, side, window = case
    pixels = noise(height, width)
    whole = np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(resample(pixels, side, window), shown(whole, window))


@pytest.mark.parametrize(
    ("height", "width", "side"),
    [(375, 500, 512), (500, 375, 480), (333, 500, 480), (2000, 1500, 512), (768, 1024, 160), (8, 8, 160), (1, 700, 32)],
)
def test_pillow_bit_for_bit_at_imagenets_sizes(height, width, side):
    pixels = noise(height, width)
    whole = np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(resample(pixels, side, Window(0, 0, side)), whole)


@pytest.mark.parametrize("window", [Window(0, 0, 70), Window(3, 11, 40), Window(30, 6, 40, mirrored=True)])
def test_an_image_as_large_as_asked_is_only_cropped(window, monkeypatch):
    pixels = noise(70, 70)
    whole = np.asarray(Image.fromarray(pixels).resize((70, 70), Image.Resampling.BILINEAR))
    of_tensorflow = np.floor(bilinear_of_tensorflow_2(pixels, 70) + np.float32(0.5)).astype(np.uint8)
    for passes in ("_pillow", "_tensorflow"):
        monkeypatch.setattr(f"input_pipeline.resample.{passes}", None)  # it takes neither
    np.testing.assert_array_equal(resample(pixels, 70, window), shown(whole, window))
    np.testing.assert_array_equal(resample(pixels, 70, window, "tf"), shown(of_tensorflow, window))


def test_small_images_are_left_to_pillow(monkeypatch):
    """Numba takes a second to import, in every process; a run on small images is not worth that."""
    for kernel in ("_antialiased", "_mirrored", "_along_columns", "_along_rows"):
        monkeypatch.setattr(f"input_pipeline.resample.{kernel}", None)
    for height, width, side in ((8, 8, 36), (64, 20, 36), (64, 64, 64)):
        pixels = noise(height, width)
        whole = np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BILINEAR))
        for window in (Window(2, 3, 30), Window(2, 3, 30, mirrored=True)):
            np.testing.assert_array_equal(resample(pixels, side, window), shown(whole, window))
    with pytest.raises(TypeError):
        resample(noise(65, 20), 36, Window(0, 0, 36))


def test_which_pass_comes_first_is_this_pillows(monkeypatch):
    """Pillow 13 began to shrink columns first where that is cheaper, which rounds otherwise; another Pillow may not."""
    assert int(PIL.__version__.split(".")[0]) == 13, "see resample._vertical_first"
    upright = noise(500, 375)
    monkeypatch.setattr("input_pipeline.resample._vertical_first", lambda *_: False)
    other = np.asarray(Image.fromarray(upright).resize((480, 480), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(resample(upright, 480, Window(0, 0, 480)) - other).max() == 1


def bilinear_of_tensorflow_2(pixels, side):
    """tf.image.resize(pixels, [side, side]), written out: float32, half-pixel centres, the four nearest pixels."""

    def places(size):
        at = (np.arange(side, dtype=np.float32) + np.float32(0.5)) * np.float32(np.float32(size) / np.float32(side))
        at = at - np.float32(0.5)
        low = np.floor(at)
        return np.maximum(low, 0).astype(int), np.minimum(np.ceil(at), size - 1).astype(int), at - low

    (up, down, y), (left, right, x) = places(pixels.shape[0]), places(pixels.shape[1])
    pixels, x, y = pixels.astype(np.float32), x[None, :, None], y[:, None, None]
    top = pixels[up][:, left] + (pixels[up][:, right] - pixels[up][:, left]) * x
    bottom = pixels[down][:, left] + (pixels[down][:, right] - pixels[down][:, left]) * x
    return top + (bottom - top) * y


@settings(max_examples=100, deadline=None)
@given(windows())
def test_tensorflows_resize_to_the_nearest_grey_level(case):
    height, width, side, window = case
    pixels = noise(height, width)
    whole = np.floor(bilinear_of_tensorflow_2(pixels, side) + np.float32(0.5)).astype(np.uint8)
    np.testing.assert_array_equal(resample(pixels, side, window, "tf"), shown(whole, window))


def test_tensorflow_itself():
    """The formula above and the decoder are TensorFlow's own, where it is installed."""
    tf = pytest.importorskip("tensorflow")
    for height, width, side in ((97, 131, 64), (50, 40, 96), (300, 20, 33)):
        pixels = noise(height, width)
        np.testing.assert_array_equal(tf.image.resize(pixels, [side, side]), bilinear_of_tensorflow_2(pixels, side))
    jpeg = encoded(PHOTO, quality=90)
    np.testing.assert_array_equal(decode(jpeg, fast=True), tf.io.decode_image(jpeg, channels=3))
    np.testing.assert_array_equal(decode(jpeg), tf.image.decode_jpeg(jpeg, dct_method="INTEGER_ACCURATE"))
    sixteen = encoded(np.arange(0, 60000, 1000, dtype=np.uint16).reshape(6, 10), "PNG")
    np.testing.assert_array_equal(decode(sixteen), tf.io.decode_image(sixteen, channels=3))


JPEGS = {
    "4:2:0": {},
    "4:2:2": {"subsampling": 1},
    "4:4:4": {"subsampling": 0},
    "4:1:1": {"subsampling": "4:1:1"},
    "progressive": {"progressive": True},
    "worst": {"quality": 5},
    "best": {"quality": 100},
    "kept as RGB": {"keep_rgb": True},
}


@pytest.mark.parametrize("name", JPEGS)
def test_jpegs_are_decoded_as_pillow_does(name):
    jpeg = encoded(PHOTO, **JPEGS[name])
    np.testing.assert_array_equal(decode(jpeg), pillow.decode(jpeg))


@pytest.mark.parametrize("fast", [False, True])
def test_what_only_pillow_reads_is_read_by_pillow(fast):
    """simplejpeg raises a KeyError for this subsampling."""
    jpeg = (Path(__file__).parent / "data" / "subsampling_441.jpg").read_bytes()
    with pytest.raises(KeyError):
        simplejpeg.decode_jpeg_header(jpeg)
    np.testing.assert_array_equal(decode(jpeg, fast=fast, reuse=True), images.decode(jpeg))


def test_whatever_simplejpeg_raises_pillow_decides(monkeypatch):
    jpeg = encoded(PHOTO)
    for name in ("decode_jpeg_header", "decode_jpeg"):
        with monkeypatch.context() as patch:
            patch.setattr(simplejpeg, name, lambda *_, **__: {}["unheard of"])
            np.testing.assert_array_equal(decode(jpeg), images.decode(jpeg))


def unusual():
    photo = Image.fromarray(PHOTO)
    turned = Image.Exif()
    turned[0x0112] = 6  # "rotate by 90 degrees"
    alpha = photo.convert("RGBA")
    alpha.putalpha(Image.fromarray(PHOTO[..., 0]))
    return {
        "CMYK JPEG": encoded(photo.convert("CMYK")),
        "grey JPEG": encoded(photo.convert("L")),
        "EXIF rotation": encoded(photo, exif=turned),
        "PNG": encoded(photo, "PNG"),
        "grey PNG": encoded(photo.convert("L"), "PNG"),
        "palette PNG": encoded(photo.convert("P"), "PNG"),
        "two colours": encoded(photo.convert("1"), "PNG"),
        "alpha": encoded(alpha, "PNG"),
        "BMP": encoded(photo, "BMP"),
        "GIF": encoded(photo, "GIF"),
        "WebP": encoded(photo, "WEBP"),
        "PPM": encoded(photo, "PPM"),
        "TIFF": encoded(photo, "TIFF"),
        "JPEG of two pictures": encoded(photo, "MPO", save_all=True, append_images=[photo]),
    }


@pytest.mark.parametrize("name", unusual())
def test_unusual_files_are_seen_as_torchvision_sees_them(name):
    """Evaluation at ImageNet's size and training views, bit for bit; nothing is rotated, alpha is dropped."""
    data = unusual()[name]
    assert decode(data).shape == (97, 131, 3)
    assert native_area(data) == 97 * 131
    views = Views(64, 48, flip=True)
    image = pillow.decode(data)
    np.testing.assert_array_equal(views.evaluation(data), pipeline.evaluation(image, 48))
    for seed in range(4):
        top, left, _, mirrored = views.draw(np.random.default_rng(seed))
        seen = pipeline.train(image, 64, 48, top, left, mirrored)
        np.testing.assert_array_equal(views.train(data, np.random.default_rng(seed)), seen)


def test_sixteen_bits_keep_the_upper_eight():
    """Pillow alone would show every one of these greys as white; TensorFlow takes the upper byte too."""
    grey = np.arange(0, 65535, 771, dtype=np.uint16).reshape(5, 17)
    data = encoded(grey, "PNG")
    np.testing.assert_array_equal(decode(data), np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=2))
    assert np.unique(pillow.decode(data)).size < 5


def test_the_first_bytes_say_what_a_file_is():
    """ImageNet has a PNG that is named .JPEG; names are not even asked for."""
    assert not encoded(PHOTO, "PNG").startswith(b"\xff\xd8")
    np.testing.assert_array_equal(decode(encoded(PHOTO, "PNG")), PHOTO)


@pytest.mark.parametrize(("kind", "cut"), [("JPEG", 20), ("JPEG", 2000), ("PNG", 300), ("PNG", 20000)])
def test_damaged_files(kind, cut):
    with pytest.raises(DamagedImage, match="not a readable image"):
        decode(encoded(PHOTO, kind)[:-cut])


@pytest.mark.parametrize("data", [b"", b"no image", b"\xff\xd8", b"\xff\xd8\xff\xe0 and on", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image(data):
    for read in (decode, native_area):
        with pytest.raises(DamagedImage, match="not a readable image"):
            read(data)


@pytest.mark.parametrize("kind", ["EPS", "DDS", "PCX", "TGA", "SGI", "ICO", "JPEG2000", "AVIF", "PDF"])
def test_formats_that_are_not_named_are_not_opened(kind):
    """Pillow would start Ghostscript for an EPS, and decode most of the others."""
    data = encoded(PHOTO, kind)
    for read in (decode, native_area):
        with pytest.raises(DamagedImage, match="none of the formats JPEG, PNG, BMP, GIF, WEBP, PPM, TIFF"):
            read(data)


def claiming(height: int, width: int, kind: str) -> bytes:
    """A small file whose header claims another size."""
    data = bytearray(encoded(PHOTO, kind))
    if kind == "PNG":
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    else:
        start = data.index(b"\xff\xc0") + 5
        data[start : start + 4] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_size_beyond_the_limit_is_refused_by_the_header(kind, monkeypatch):
    monkeypatch.setattr("input_pipeline.preprocess.scratch", lambda *_: pytest.fail("memory was taken for it"))
    for read in (lambda data: decode(data, reuse=True), native_area):
        with pytest.raises(DamagedImage, match=r"not a readable image .*178,?956,?970"):
            read(claiming(30000, 30000, kind))


def test_the_limit_is_the_same_for_all_formats_and_is_pillows(monkeypatch):
    assert image_file.MAX_PIXELS == 2 * Image.MAX_IMAGE_PIXELS  # type: ignore[operator]
    monkeypatch.setattr(image_file, "MAX_PIXELS", 97 * 131)
    larger = np.zeros((97, 132, 3), np.uint8)
    for kind in ("JPEG", "PNG", "BMP", "GIF", "WEBP", "PPM", "TIFF"):
        assert decode(encoded(PHOTO, kind)).shape == PHOTO.shape
        for read in (decode, native_area):
            with pytest.raises(DamagedImage, match="it has 97x132 pixels; at most 12,707 are read"):
                read(encoded(larger, kind))


def test_a_lack_of_memory_is_no_damage(monkeypatch):
    for data in (encoded(PHOTO), encoded(PHOTO, "PNG")):

        def lacking(*_, **__):
            raise MemoryError

        with monkeypatch.context() as patch:
            patch.setattr(simplejpeg, "decode_jpeg", lacking)
            patch.setattr(Image.Image, "convert", lacking)
            with pytest.raises(MemoryError):
                decode(data)


def test_threads_keep_no_huge_memory(monkeypatch):
    monkeypatch.setattr(resampling, "KEPT", 3000)
    kept = []

    def use():
        for height, width in ((20, 30), (100, 100), (20, 30)):
            resampling.scratch("test", height, width)
        kept.append(resampling._kept.test.nbytes)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert kept == [20 * 30 * 3]


def test_tensorflows_pixels_differ_in_decoding_and_in_resizing():
    jpeg = encoded(pictures(1, 375, 500, 1)[0], quality=92)
    pillow, tf = (Views(512, 480, flip=False, resize=how).evaluation(jpeg).astype(int) for how in ("pillow", "tf"))
    assert np.abs(pillow - tf).max() > 0
    fast = decode(jpeg, fast=True).astype(int) - decode(jpeg)
    assert 0 < np.abs(fast).max() <= 21  # 0.16 in [-1, 1]


def test_memory_that_is_used_again_changes_no_result():
    small, large = encoded(PHOTO[:40, :30]), encoded(PHOTO)
    views = Views(32, 32, flip=False)
    first = views.evaluation(small)
    kept = first.copy()
    views.evaluation(large)
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(views.evaluation(small), kept)


def test_grey_arrays_become_three_channels():
    np.testing.assert_array_equal(decode(PHOTO[..., 0]), np.repeat(PHOTO[..., :1], 3, axis=2))
    assert simplejpeg.decode_jpeg_header(encoded(PHOTO))[:2] == PHOTO.shape[:2]
