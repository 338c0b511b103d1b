"""keras-rs: one ``DistributedEmbedding`` over all features on JAX's CPU backend, row indices, and Keras's Adagrad.

Off TPUs keras-rs keeps dense tables as Keras variables. A step is one jitted call: lookups, their gradients, and the
update of all tables.
"""

from __future__ import annotations

import os

from protocol import Task


def main() -> None:
    task = Task()
    os.environ["KERAS_BACKEND"] = "jax"
    os.environ["NPROC"] = str(task.threads)  # threads of XLA
    import jax
    import keras
    import keras_rs
    import numpy as np

    features, size = task.ids.shape
    samples, dim = task.gradients.shape[1:]
    names = [f"feature{number:02d}" for number in range(features)]
    table = {"vocabulary_size": size, "embedding_dim": dim, "combiner": "sum", "placement": "default_device"}
    configs = {
        name: keras_rs.layers.FeatureConfig(
            name=name,
            table=keras_rs.layers.TableConfig(name=f"table_{name}", **table),
            input_shape=(samples, 1),
            output_shape=(samples, dim),
        )
        for name in names
    }
    layer = keras_rs.layers.DistributedEmbedding(configs)
    batches = [
        {name: jax.numpy.asarray(rows[:, None].astype(np.int32)) for name, rows in zip(names, batch, strict=True)}
        for batch in task.rows
    ]
    layer(batches[0])  # builds the tables
    rules = {"adagrad": keras.optimizers.Adagrad, "adam": keras.optimizers.Adam, "sgd": keras.optimizers.SGD}
    optimizer = rules[task.rule](task.lr)
    optimizer.build(layer.trainable_variables)
    gradients = {name: jax.numpy.asarray(value) for name, value in zip(names, task.gradients, strict=True)}
    frozen = layer.non_trainable_variables

    def loss(tables: object, batch: object) -> object:
        outputs, _ = layer.stateless_call(tables, [variable.value for variable in frozen], batch)
        return sum((outputs[name] * gradients[name]).sum() for name in names)

    def update(tables: object, state: object, batch: object) -> object:
        return optimizer.stateless_apply(state, jax.grad(loss)(tables, batch), tables)

    train = jax.jit(update, donate_argnums=(0, 1))  # donated, so that the update may happen in place
    held = [[variable.value for variable in layer.trainable_variables], [v.value for v in optimizer.variables]]

    def step(batch: int) -> None:
        held[:] = jax.block_until_ready(train(*held, batches[batch]))

    task.serve(step)


if __name__ == "__main__":
    main()
