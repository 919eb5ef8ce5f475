"""BiT's TensorFlow input as tf.data, for comparison: `python -m input_pipeline.tf_data tf.data FOLDER BATCH`.

It follows google-research/big_transfer's `input_pipeline_tf2_or_jax.py`: decode, resize without antialiasing in
float32, crop, flip, scale to [-1, 1]. That file flips every image, this one flips half of them.
"""

import sys
from collections.abc import Iterator
from typing import Any

from input_pipeline.bench import CROP, RESIZE_TO, serve
from input_pipeline.loader import READ_AHEAD
from input_pipeline.sources import open_source


def batches(folder: str, batch: int) -> Iterator[Any]:
    """Yields images, float32 [batch, CROP, CROP, 3], and labels without end."""
    import tensorflow as tf

    source: Any = open_source(f"folder:{folder}", "train")
    files = [str(source.path(index)) for index in range(len(source))]

    def load(path: Any, label: Any) -> tuple[Any, Any]:
        image = tf.io.decode_image(tf.io.read_file(path), channels=3, expand_animations=False)
        image = tf.image.resize(image, [RESIZE_TO, RESIZE_TO])
        image = tf.image.random_crop(image, [CROP, CROP, 3])
        return (tf.image.random_flip_left_right(image) - 127.5) / 127.5, label

    dataset = tf.data.Dataset.from_tensor_slices((files, source.labels)).shuffle(len(files)).repeat()
    dataset = dataset.map(load, num_parallel_calls=tf.data.AUTOTUNE).batch(batch).prefetch(READ_AHEAD)
    return iter(dataset)


if __name__ == "__main__":
    serve(batches(sys.argv[2], int(sys.argv[3])))
