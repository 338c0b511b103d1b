"""Towers of models written in Flax (nnx and linen), Equinox and Haiku.

Each function takes an initialized model and returns a :class:`JaxTower`, to which it passes options. The libraries are
imported on first use.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax

from recis_hybrid.bridge.tower.orbax import linen_variables, merged
from recis_hybrid.bridge.tower.tower import JaxTower

_MODES = {
    **dict.fromkeys(("train", "training", "is_training"), True),
    **dict.fromkeys(("deterministic", "inference"), False),
}
"""Names of mode parameters, with their values in train mode."""


class _Call:
    """The signature of a model's ``__call__``.

    Args:
        adapter: The name of the function, for error messages.
        model: The model.
    """

    def __init__(self, adapter: str, model: Any) -> None:
        self._signature = inspect.signature(type(model).__call__)
        self._where = f"{adapter}: {type(model).__qualname__}"
        self._modes = {name: value for name, value in _MODES.items() if name in self._signature.parameters}

    def keywords(self, inputs: tuple[Any, ...], keywords: dict[str, Any], train: bool) -> dict[str, Any]:
        """Return the keywords, including those of the mode.

        Args:
            inputs: The positional arguments of the call.
            keywords: The keyword arguments of the call, which override the mode.
            train: The mode.

        Raises:
            TypeError: if the model does not accept these arguments.
        """
        keywords = {name: train is value for name, value in self._modes.items()} | keywords
        try:
            self._signature.bind(None, *inputs, **keywords)
        except TypeError as error:
            modes = list(self._modes) or f"none of {list(_MODES)}, which __call__ does not have"
            raise TypeError(
                f"{self._where}.__call__{self._signature}: {error}. The tower sets {modes} from its mode; pass other "
                "arguments by keyword, as in tower(x, name=value), and only arrays by position"
            ) from None
        return keywords

    def note(self, error: Exception) -> None:
        """Add the remedy to a layer's error about a missing mode."""
        if any(name in str(error) for name in ("deterministic", "use_running_average")) and not self._modes:
            error.add_note(
                f"{self._where}: __call__ has none of the parameters {list(_MODES)} through which the tower passes its "
                "mode; add a parameter `train`, and pass it to the layers: Dropout(..., deterministic=not train), "
                "BatchNorm(use_running_average=not train)"
            )


def from_nnx(model: Any, **options: Any) -> JaxTower:
    """Return a tower of a Flax nnx module.

    ``Param`` variables become parameters, and all others (batch statistics, random counters) mutable state. The
    module follows the tower's mode through ``train()`` and ``eval()``, and through a parameter ``train``, ``training``,
    ``is_training``, ``deterministic`` or ``inference`` of its ``__call__``. Dropout uses the tower's key.

    Args:
        model: An ``nnx.Module``; its arrays are copied.
        **options: Options of :class:`JaxTower`.

    Returns:
        The tower, with the arguments of the model.

    Raises:
        TypeError: if ``model`` is not an ``nnx.Module``.

    References:
        https://flax.readthedocs.io/en/latest/guides/filters_guide.html
    """
    from flax import nnx as flax_nnx

    nnx: Any = flax_nnx  # its type hints reject positional filters and streams as keywords
    if not isinstance(model, nnx.Module):
        raise TypeError(f"from_nnx: model must be a flax.nnx.Module, got {type(model).__qualname__}")
    definition, params, streams, rest = nnx.split(model, nnx.Param, nnx.RngState, ...)
    call = _Call("from_nnx", model)
    tags = sorted({variable.tag for _, variable in nnx.to_flat_state(streams)})
    has_state = bool(jax.tree.leaves(rest))

    def rebuild(values: Any, state: Any, key: Any, train: bool) -> Any:
        nnx.replace_by_pure_dict(here := jax.tree.map(lambda leaf: leaf, params), values)
        nnx.replace_by_pure_dict(there := jax.tree.map(lambda leaf: leaf, rest), state)
        # Copied, because variables may be modified only under the trace that created them.
        rebuilt = nnx.merge(definition, here, jax.tree.map(lambda leaf: leaf, streams), there)
        (rebuilt.train if train else rebuilt.eval)()
        if key is not None and jax.tree.leaves(streams):
            nnx.reseed(rebuilt, **{tag: jax.random.fold_in(key, number) for number, tag in enumerate(tags)})
        return rebuilt

    def plain(values: Any, *inputs: Any, key: Any, train: bool, **keywords: Any) -> Any:
        return rebuild(values, {}, key, train)(*inputs, **call.keywords(inputs, keywords, train))

    def with_state(values: Any, *inputs: Any, state: Any, key: Any, train: bool, **keywords: Any) -> Any:
        rebuilt = rebuild(values, state, key, train)
        outputs = rebuilt(*inputs, **call.keywords(inputs, keywords, train))
        return outputs, nnx.to_pure_dict(nnx.split(rebuilt, nnx.Param, nnx.RngState, ...)[3])

    options.setdefault("name", type(model).__name__)
    if has_state:
        options["state"] = nnx.to_pure_dict(rest)
    tower = JaxTower(with_state if has_state else plain, nnx.to_pure_dict(params), **options)
    tower.to_checkpoint = merged
    return tower


def from_linen(module: Any, variables: Any, **options: Any) -> JaxTower:
    """Return a tower of a Flax linen module.

    ``variables["params"]`` become parameters, other collections mutable state. A parameter ``train``, ``training``,
    ``is_training``, ``deterministic`` or ``inference`` of the module's ``__call__`` follows the tower's mode. Pass
    other arguments to the tower by keyword. Dropout uses the tower's key.

    Args:
        module: A ``linen.Module``.
        variables: The result of ``module.init``; its arrays are copied.
        **options: Options of :class:`JaxTower`.

    Returns:
        The tower, with the arguments of the module.

    Raises:
        TypeError: if ``module`` is not a ``linen.Module``.
        ValueError: if the variables have no collection ``params``.

    References:
        https://flax-linen.readthedocs.io/en/latest/guides/training_techniques/batch_norm.html
    """
    from flax import linen

    if not isinstance(module, linen.Module):
        raise TypeError(f"from_linen: module must be a flax.linen.Module, got {type(module).__qualname__}")
    if "params" not in variables:
        raise ValueError(
            f"from_linen: variables must have a collection 'params', got {sorted(variables)}; pass the result of "
            "module.init"
        )
    call = _Call("from_linen", module)
    state = {name: value for name, value in variables.items() if name != "params"}

    def apply(params: Any, inputs: Any, state: Any, key: Any, train: bool, keywords: Any) -> Any:
        keywords = call.keywords(inputs, keywords, train)
        rngs = None if key is None else {"dropout": key}
        mutable = list(state) if train and state else False
        try:
            return module.apply({"params": params, **state}, *inputs, rngs=rngs, mutable=mutable, **keywords)
        except Exception as error:
            call.note(error)
            raise

    def plain(params: Any, *inputs: Any, key: Any, train: bool, **keywords: Any) -> Any:
        return apply(params, inputs, {}, key, train, keywords)

    def with_state(params: Any, *inputs: Any, state: Any, key: Any, train: bool, **keywords: Any) -> Any:
        result = apply(params, inputs, state, key, train, keywords)
        return (result[0], dict(result[1])) if train else (result, state)

    options.setdefault("name", type(module).__name__)
    if state:
        options["state"] = state
    tower = JaxTower(with_state if state else plain, variables["params"], **options)
    tower.to_checkpoint = linen_variables
    return tower


def from_equinox(model: Any, *, batched: bool = True, **options: Any) -> JaxTower:
    """Return a tower of an Equinox module.

    Floating-point arrays become parameters; the rest of the module is constant. Dropout follows the tower's mode, and
    uses its key if the model's ``__call__`` has a parameter ``key``. A parameter ``train``, ``training``,
    ``is_training``, ``deterministic`` or ``inference`` also follows the mode.

    Args:
        model: A callable ``equinox.Module``.
        batched: True to vmap the model over the leading dimension, because it takes one sample, like Equinox's layers.
        **options: Options of :class:`JaxTower`.

    Returns:
        The tower, with the arguments of the model, which have a leading dimension if ``batched``.

    Raises:
        TypeError: if ``model`` is not an ``equinox.Module`` with ``__call__``.

    References:
        https://docs.kidger.site/equinox/all-of-equinox/
    """
    import equinox

    if not isinstance(model, equinox.Module) or not callable(model):
        raise TypeError(f"from_equinox: model must be an equinox.Module with __call__, got {type(model).__qualname__}")
    takes_key = "key" in inspect.signature(type(model).__call__).parameters
    signature = _Call("from_equinox", model)
    params, constant = equinox.partition(model, equinox.is_inexact_array)

    def apply(values: Any, *inputs: Any, key: Any, train: bool, **keywords: Any) -> Any:
        combined = equinox.nn.inference_mode(equinox.combine(values, constant), not train)

        def call(key: Any, *sample: Any) -> Any:
            own = keywords | ({"key": key} if takes_key else {})
            return combined(*sample, **signature.keywords(sample, own, train))

        if not batched:
            return call(key, *inputs)
        size = jax.tree.leaves(inputs)[0].shape[0]
        keys = None if key is None else jax.random.split(key, size)
        return jax.vmap(call, in_axes=(None if key is None else 0, *(0 for _ in inputs)))(keys, *inputs)

    options.setdefault("name", type(model).__name__)
    return JaxTower(apply, params, **options)


def from_haiku(apply: Callable[..., Any], params: Any, **options: Any) -> JaxTower:
    """Return a tower of ``apply(params, key, *inputs)``, the second function of ``haiku.transform``.

    Args:
        apply: The function; its key is None in eval mode.
        params: The result of ``init``; its arrays are copied.
        **options: Options of :class:`JaxTower`.

    Returns:
        The tower, with the inputs of ``apply``.

    References:
        https://dm-haiku.readthedocs.io/en/latest/api.html#transform
    """

    def call(values: Any, *inputs: Any, key: Any, **keywords: Any) -> Any:
        return apply(values, key, *inputs, **keywords)

    options.setdefault("name", str(getattr(apply, "__name__", type(apply).__name__)))
    return JaxTower(call, params, **options)
