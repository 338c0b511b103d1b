"""Growth of a cuckoo table of TensorFlow Recommenders Addons with Adagrad; see ``benchmarks/growth.py``.

Runs in TFRA's environment, so it imports neither torch nor anything of the repository.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf

STEP = 65_536
DIM = 16
LR = 0.01


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--device", choices=["cpu"], required=True)
    args = parser.parse_args()
    tf.get_logger().setLevel("ERROR")  # the next import warns about missing libraries
    import tensorflow_recommenders_addons.dynamic_embedding as de

    tf.config.threading.set_intra_op_parallelism_threads(args.threads)
    tf.config.threading.set_inter_op_parallelism_threads(args.threads)
    shadow = de.shadow_ops.ShadowVariable(de.get_variable("table", dim=DIM), name="shadow")
    optimizer = de.DynamicEmbeddingOptimizer(tf.keras.optimizers.legacy.Adagrad(LR))
    optimizer._create_all_weights([shadow])  # before tracing: a function that creates variables is traced twice
    gradient = tf.fill([STEP, DIM], 0.1)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.int64)])
    def train(ids: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            output = de.shadow_ops.embedding_lookup_unique(shadow, ids, DIM)
        shadow_gradient = tape.gradient([output], [shadow], output_gradients=[gradient])[0]
        optimizer.apply_gradients([(tf.convert_to_tensor(shadow_gradient), shadow)])

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    train(tf.constant(-np.arange(1, STEP + 1)))
    before = resident()
    times, sizes = [], []
    for first in range(0, args.rows, STEP):
        with np.errstate(over="ignore"):
            ids = tf.constant(np.arange(first, first + STEP) * np.int64(0x9E3779B97F4A7C1))
        begin = time.process_time()
        train(ids)
        times.append(time.process_time() - begin)
        sizes.append(resident() - before)
    print(json.dumps({"times": times, "bytes": sizes}))


if __name__ == "__main__":
    main()
