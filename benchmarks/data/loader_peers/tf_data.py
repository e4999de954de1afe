"""tf.data over TFRecord files, with TensorFlow's own decode and resize, accurate or fast."""

import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
import tensorflow as tf

from benchmarks.data.loader_peers.given import BATCH, BUFFER, PREFETCH, SEED, SIZE, Given, LoaderPath, Shown

PER_FILE = 200
FIELDS = {
    "image": tf.io.FixedLenFeature([], tf.string),
    "box": tf.io.FixedLenFeature([4], tf.int64),
    "flip": tf.io.FixedLenFeature([], tf.int64),
    "number": tf.io.FixedLenFeature([], tf.int64),
}


def example(given: Given, number: int) -> bytes:
    """An image with its view."""

    def integers(*values: int) -> tf.train.Feature:
        return tf.train.Feature(int64_list=tf.train.Int64List(value=values))

    fields = {
        "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[given.data(number)])),
        "box": integers(*given.boxes[number].tolist()),
        "flip": integers(int(given.flips[number])),
        "number": integers(number),
    }
    return tf.train.Example(features=tf.train.Features(feature=fields)).SerializeToString()


def view(record: tf.Tensor, fast: bool) -> tuple[tf.Tensor, tf.Tensor]:
    """u8 [3, SIZE, SIZE] and the image's number. fast: fast DCT, chroma by repetition, bilinear without antialias."""
    found = tf.io.parse_single_example(record, FIELDS)
    box = tf.cast(found["box"], tf.int32)
    window = tf.stack([box[1], box[0], box[3], box[2]])
    method = "INTEGER_FAST" if fast else "INTEGER_ACCURATE"
    pixels = tf.image.decode_and_crop_jpeg(found["image"], window, 3, fancy_upscaling=not fast, dct_method=method)
    how, antialias = ("bilinear", False) if fast else ("bicubic", True)
    resized = tf.image.resize(pixels, [SIZE, SIZE], how, antialias=antialias)
    resized = tf.cond(found["flip"] > 0, lambda: tf.reverse(resized, [1]), lambda: resized)
    return tf.transpose(tf.cast(tf.clip_by_value(tf.round(resized), 0, 255), tf.uint8), [2, 0, 1]), found["number"]


def open_path(given: Given, variant: str) -> LoaderPath:
    """accurate or fast."""

    def make(folder: Path) -> None:
        for first in range(0, len(given), PER_FILE):
            with tf.io.TFRecordWriter(str(folder / f"{first:06d}.tfrecord")) as writer:
                for number in range(first, min(first + PER_FILE, len(given))):
                    writer.write(example(given, number))

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    files = tf.data.Dataset.list_files(str(given.copy("tf_data", make) / "*"), shuffle=True, seed=SEED)
    records = tf.data.TFRecordDataset(files).shuffle(BUFFER, seed=SEED).repeat()
    images = records.map(lambda record: view(record, variant == "fast"), num_parallel_calls=1)
    batches = images.batch(BATCH, drop_remainder=True).prefetch(PREFETCH)
    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    return LoaderPath(iter(batches.with_options(options)), shown)


def shown(batch: tuple[tf.Tensor, tf.Tensor]) -> Shown:
    return batch[0].numpy(), batch[1].numpy()
