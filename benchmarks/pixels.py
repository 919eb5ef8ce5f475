"""Measures how far `--resize tf` is from `--resize pillow`.

The differences are in the units that the model sees: pixels are in [-1, 1], and a grey level is 0.0078. `python
benchmarks/pixels.py` prints the table of docs/imagenet.md.
"""

import io

import numpy as np
from photographs import photograph
from PIL import Image

from input_pipeline import Views
from input_pipeline.preprocess import decode
from input_pipeline.resample import Window, resample

IMAGES = 20
METHODS = ("pillow", "tf")
UNIT = 127.5  # grey levels
CASES = (  # name, height, width, side resized to
    ("375x500 to 512x512, growing", 375, 500, 512),
    ("375x500 to 480x480, hardly changing", 375, 500, 480),
    ("1200x1600 to 480x480, shrinking", 1200, 1600, 480),
)


def main() -> None:
    """Prints the largest and the mean differences as a Markdown table."""
    print("| images | of it | largest | mean |")
    print("|---|---|---|---|")
    for name, height, width, side in CASES:
        differences = {"decoding": [], "resizing": [], "both": []}
        for number in range(IMAGES):
            encoded = io.BytesIO()
            pixels = photograph(np.random.default_rng((1, number)), height, width)
            Image.fromarray(pixels).save(encoded, "JPEG", quality=92)
            accurate, fast = (decode(encoded.getvalue(), fast=fast).astype(int) for fast in (False, True))
            differences["decoding"].append(np.abs(accurate - fast))
            window = Window(0, 0, side)
            image = accurate.astype(np.uint8)
            resized = [resample(image, side, window, method).astype(int) for method in METHODS]
            differences["resizing"].append(np.abs(resized[0] - resized[1]))
            views = [Views(side, side, False, method).evaluation(encoded.getvalue()).astype(int) for method in METHODS]
            differences["both"].append(np.abs(views[0] - views[1]))
        for part, of_images in differences.items():
            largest = max(difference.max() for difference in of_images) / UNIT
            mean = np.mean([difference.mean() for difference in of_images]) / UNIT
            print(f"| {name} | {part} | {largest:.3f} | {mean:.4f} |")


if __name__ == "__main__":
    main()
