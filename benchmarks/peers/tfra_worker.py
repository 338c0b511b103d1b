"""TensorFlow Recommenders Addons on the CPU: a growing cuckoo table per feature, Adam, one ``tf.function`` per step."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
from protocol import Task


def main() -> None:
    task = Task()
    tf.get_logger().setLevel("ERROR")  # the next import warns about missing libraries
    import tensorflow_recommenders_addons.dynamic_embedding as de

    tf.config.threading.set_intra_op_parallelism_threads(task.threads)
    tf.config.threading.set_inter_op_parallelism_threads(task.threads)
    features, size = task.ids.shape
    dim = task.gradients.shape[2]
    tables = [de.get_variable(f"table{f}", dim=dim) for f in range(features)]
    shadows = [de.shadow_ops.ShadowVariable(table, name=f"shadow{f}") for f, table in enumerate(tables)]
    optimizer = de.DynamicEmbeddingOptimizer(tf.keras.optimizers.legacy.Adam(task.lr))
    ids_spec = [tf.TensorSpec([None], tf.int64)] * features

    @tf.function(input_signature=[ids_spec, [tf.TensorSpec([None, dim])] * features])
    def train(ids: list[tf.Tensor], gradients: list[tf.Tensor]) -> None:
        with tf.GradientTape() as tape:
            outputs = [
                de.shadow_ops.embedding_lookup_unique(shadow, one, dim)
                for shadow, one in zip(shadows, ids, strict=True)
            ]
        shadow_gradients = tape.gradient(outputs, shadows, output_gradients=gradients)
        # Summing by row and applying the dense rule is 7 % faster than the optimizer's sparse rule.
        optimizer.apply_gradients(zip([tf.convert_to_tensor(one) for one in shadow_gradients], shadows, strict=True))

    @tf.function(input_signature=[ids_spec])
    def lookup(ids: list[tf.Tensor]) -> list[tf.Tensor]:
        return [table.lookup(one) for table, one in zip(tables, ids, strict=True)]

    states: list[list[de.Variable]] = [[] for _ in tables]
    if task.rule == "adam":
        optimizer._create_all_weights(shadows)  # before tracing: a function that creates variables is traced twice
        states = [shadow._optimizer_vars.value for shadow in shadows]
    for table, state, ids in zip(tables, states, task.ids, strict=True):
        table.upsert(tf.constant(ids), tf.random.uniform([size, dim], -0.01, 0.01))
        for moment in state:
            moment.upsert(tf.constant(ids), tf.zeros([size, dim]))
    places = np.arange(features)[:, None]
    batches = [[tf.constant(ids) for ids in task.ids[places, rows]] for rows in task.rows]
    gradients = [tf.constant(gradient) for gradient in task.gradients]
    if task.rule == "lookup":
        lookup.get_concrete_function()
        task.serve(lambda batch: lookup(batches[batch]))
    else:
        train.get_concrete_function()
        task.serve(lambda batch: train(batches[batch], gradients))


if __name__ == "__main__":
    main()
