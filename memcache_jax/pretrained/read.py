"""A published folder as a language model."""

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict

from memcache_jax._checks import check_dtype, check_flag, check_path
from memcache_jax.nn import LanguageModel, LanguageModelConfig
from memcache_jax.nn.language_model import abstract_model
from memcache_jax.pretrained.families import family_of
from memcache_jax.pretrained.forms import RENAMED, SKIPPED, read_text_model
from memcache_jax.pretrained.given import Given
from memcache_jax.pretrained.places import Places
from memcache_jax.pretrained.tensors import Tensor
from memcache_jax.pretrained.weights import Weights
from memcache_jax.sharding import param_shardings

_log = logging.getLogger(__name__)
_HEAD = "lm_head.weight"


def load(
    folder: str | Path, *, dtype: Any = None, param_dtype: Any = None, scan_layers: bool = True
) -> LanguageModel:
    """Reads a recurrent model as it is published, or as its own library saves it.

    From a model of text and images, the text model is read. The log says what else the files hold.
    Each parameter is read to where it lives before the next is: what is held at once is the model
    and one parameter. Under ``jax.set_mesh`` parameters are divided as ``sharding.param_shardings``
    says.

    Args:
      folder: with ``config.json`` and ``model.safetensors``, or several files and their index.
      dtype: dtype of the arithmetic; by default that of the parameters.
      param_dtype: dtype of the parameters; by default the one of ``config.json``. Constants of
        decays are always float32.
      scan_layers: as in ``LanguageModelConfig``: False decodes faster on CPUs and compiles longer.

    Returns:
      The model. It has no caches; ``mc.nn.with_memory_caching`` gives it some.

    Raises:
      ImportError: without the package ``safetensors``.
      ValueError: for a folder that is not one, a family or an option of it that is not supported,
        or tensors that are missing, left over or of other shapes.

    Example::

        model = mc.pretrained.load("Qwen3.5-2B")
        model = mc.nn.with_memory_caching(model, segmentation=mc.Constant(4096))
    """
    folder = check_path("folder", folder)
    check_dtype("dtype", dtype, optional=True)
    check_dtype("param_dtype", param_dtype, optional=True)
    given = read_text_model(folder)
    if param_dtype is None:
        param_dtype = jnp.dtype(given.dtype())
    dtype = param_dtype if dtype is None else dtype
    config = described(given, dtype=dtype, param_dtype=param_dtype)
    config = dataclasses.replace(config, scan_layers=check_flag("scan_layers", scan_layers))
    graph, state = abstract_model(config)
    mesh = jax.sharding.get_mesh()
    shardings = None if mesh.empty else flatten_dict(param_shardings(state, mesh))
    model = nnx.merge(graph, state)
    model.published = json.dumps(dict(given.values))
    weights = Weights(folder, RENAMED.get(given["model_type"]))
    tensors = [tensor.named_in(weights.names) for tensor in family_of(given).tensors(given)]
    _check_names(weights, tensors, given)
    _fill(model, tensors, weights, shardings)
    return model


def described(given: Given, *, dtype: Any, param_dtype: Any) -> LanguageModelConfig:
    """The shape of a published model, of its ``config.json`` alone.

    Raises:
      ValueError: that names the file, for values of which there is no model.
    """
    family = family_of(given)
    given.only(quantization_config=None)
    try:
        return family.config(given, dtype=dtype, param_dtype=param_dtype)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if given.where in str(error):
            raise
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(
            f"{given.where} does not describe a supported model: {kind}{error}"
        ) from error


def _check_names(weights: Weights, tensors: list[Tensor], given: Given) -> None:
    """Logs what is beside the text model; ValueError for tensors that the family does not know."""
    left = weights.names - {name for tensor in tensors for name in tensor.names}
    for prefix in SKIPPED.get(given["model_type"], ()):
        if others := {name for name in left if name.startswith(prefix)}:
            left -= others
            text = "%s: %d tensors %s* are not of the text model, and are not read"
            _log.warning(text, weights.folder, len(others), prefix)
    if given.get("tie_word_embeddings", False) and _HEAD in left:
        (embedding,) = (t.names[0] for t in tensors if t.parts[0].path == "embedding/embedding")
        if not np.array_equal(weights.read(_HEAD), weights.read(embedding)):
            raise ValueError(
                f"{weights.folder} has a {_HEAD} unlike {embedding}, but config.json ties them: "
                "say tie_word_embeddings=false there, or leave the tensor out"
            )
        left -= {_HEAD}
    if left:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        raise ValueError(
            f"{weights.folder} has unknown tensors: {', '.join(sorted(left)[:3])}{more}"
        )


def _fill(
    model: LanguageModel,
    tensors: list[Tensor],
    weights: Weights,
    shardings: Mapping[tuple, Any] | None,
) -> None:
    """Reads the parameters of an abstract model."""
    places = Places(model)
    for path, uses in places.uses(tensors).items():
        if not uses:
            raise ValueError(f"the family says nothing of the parameter {'/'.join(map(str, path))}")
        param = places.params[path]
        value = np.empty(param.shape, param.dtype)
        for tensor, number, place in uses:
            shapes = [places.shape(places.of(tensor, part)) for part in tensor.parts]
            value[place.index] = _read(tensor, number, weights, shapes).astype(param.dtype)
        weights.close()
        sharding = None if shardings is None else shardings[path]
        param.set_value(jax.device_put(value, sharding))


def _read(
    tensor: Tensor, number: int, weights: Weights, shapes: list[tuple[int, ...]]
) -> np.ndarray:
    """One of a tensor's parts, of these shapes; if it has rows of its own, those alone are read."""
    given = [weights.shape(name) for name in tensor.names]
    if tensor.row is not None:
        given = [shape[1:] if shape and tensor.row < shape[0] else () for shape in given]
    wanted = tensor.shape_of(shapes)
    if _joined(given) != _joined([wanted]):
        raise ValueError(
            f"{', '.join(tensor.names)} of {weights.folder} must be {wanted} together, "
            f"got {', '.join(map(str, given))}"
        )
    rows = tensor.rows_of(number, shapes)
    if rows is not None:
        return tensor.part_of(number, weights.read(tensor.names[0], rows), shapes[number])
    read = [weights.read(name) for name in tensor.names]
    return tensor.cut(read[0] if len(read) == 1 else np.concatenate(read), shapes)[number]


def _joined(shapes: list[tuple[int, ...]]) -> tuple[int, ...] | None:
    """The shape of tensors joined along axis 0, without axes of one; None if they differ."""
    first, *others = shapes
    if any(shape[1:] != first[1:] for shape in others):
        return None
    rows = sum(shape[0] for shape in shapes if shape)
    return tuple(n for n in (rows, *first[1:]) if n != 1) if first else ()
