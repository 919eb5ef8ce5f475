"""Draws JPEGs that take a decoder as long as photographs do, for `python -m parity input` to read.

`python benchmarks/photographs.py FOLDER` writes FOLDER/train/CLASS/*.jpg: 2,000 of 500x375 (a fifth upright), about
114 kB each, as ImageNet's are on average.
"""

import io
import itertools
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

LONG, SHORT = 500, 375
UPRIGHT_EVERY = 5  # of so many images one is upright
QUALITY = 92  # JPEG quality, which gives the average size


def main(folder: tyro.conf.Positional[Path], count: int = 2000, classes: int = 10, seed: int = 0) -> None:
    """Writes the files; the same seed draws the same pictures.

    Args:
        folder: Folder that receives train/CLASS/*.jpg.
        count: Number of images; draw fewer for a quick try.
        classes: Number of classes that the images are spread over in turn.
        seed: Seed of the pictures; another one draws other pictures.
    """
    paths = [folder / "train" / f"class{number % classes:03d}" / f"{number:05d}.jpg" for number in range(count)]
    for directory in {path.parent for path in paths}:
        directory.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        sizes = list(pool.map(_write, paths, itertools.repeat(seed), range(count), chunksize=16))
    print(f"{folder}: {count:,} images, {np.mean(sizes) / 1000:.0f} kB each on average")


def _write(path: Path, seed: int, number: int) -> int:
    size = (LONG, SHORT) if number % UPRIGHT_EVERY == 0 else (SHORT, LONG)
    encoded = io.BytesIO()
    Image.fromarray(photograph(np.random.default_rng((seed, number)), *size)).save(encoded, "JPEG", quality=QUALITY)
    path.write_bytes(encoded.getvalue())
    return encoded.tell()


def photograph(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Returns a picture, uint8 [height, width, 3], of noise and a dozen shapes with edges.

    The noise is largely the same in the three colours, and its spectrum falls about as 1 / frequency, as that of
    photographs does.
    """
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = 1

    def noise(power: float) -> np.ndarray:
        spectrum = np.fft.rfft2(rng.standard_normal((height, width))) / frequency**power
        field = np.fft.irfft2(spectrum, s=(height, width))
        return field / field.std()

    light = noise(1.1)
    image = np.stack([light + 0.5 * noise(1.4) for _ in range(3)], axis=-1)
    y, x = np.mgrid[0:height, 0:width]
    for _ in range(12):
        row, column = rng.uniform(0, height), rng.uniform(0, width)
        radius, stretch = rng.uniform(10, 80), rng.uniform(0.3, 3)
        inside = (y - row) ** 2 + stretch * (x - column) ** 2 < radius**2
        image[inside] = image[inside] * rng.uniform(0.4, 1) + rng.uniform(-1.2, 1.2, 3)
    return np.clip(118 + 52 * image, 0, 255).astype(np.uint8)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
