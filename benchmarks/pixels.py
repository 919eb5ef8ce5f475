"""How far `--resize tf` is from `--resize pillow`, in the units that the model sees: [-1, 1], a grey level is 0.0078.

`python benchmarks/pixels.py` prints the table of docs/imagenet.md.
"""

import io

import numpy as np
from photographs import photograph
from PIL import Image

from input_pipeline import Views
from input_pipeline.preprocess import decode
from input_pipeline.resample import Window, resample

IMAGES = 20
UNIT = 127.5
CASES = (  # what, height, width, side resized to
    ("375x500 to 512x512, growing", 375, 500, 512),
    ("375x500 to 480x480, hardly changing", 375, 500, 480),
    ("1200x1600 to 480x480, shrinking", 1200, 1600, 480),
)


def main() -> None:
    print("| images | of it | largest | mean |")
    print("|---|---|---|---|")
    for what, height, width, side in CASES:
        apart = {"decoding": [], "resizing": [], "both": []}
        for number in range(IMAGES):
            encoded = io.BytesIO()
            pixels = photograph(np.random.default_rng((1, number)), height, width)
            Image.fromarray(pixels).save(encoded, "JPEG", quality=92)
            accurate, fast = (decode(encoded.getvalue(), fast=fast).astype(int) for fast in (False, True))
            apart["decoding"].append(np.abs(accurate - fast))
            window = Window(0, 0, side)
            resized = [resample(accurate.astype(np.uint8), side, window, how).astype(int) for how in ("pillow", "tf")]
            apart["resizing"].append(np.abs(resized[0] - resized[1]))
            shown = [
                Views(side, side, False, how).evaluation(encoded.getvalue()).astype(int) for how in ("pillow", "tf")
            ]
            apart["both"].append(np.abs(shown[0] - shown[1]))
        for part, differences in apart.items():
            largest = max(difference.max() for difference in differences) / UNIT
            mean = np.mean([difference.mean() for difference in differences]) / UNIT
            print(f"| {what} | {part} | {largest:.3f} | {mean:.4f} |")


if __name__ == "__main__":
    main()
