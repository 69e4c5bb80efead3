"""A language model as a folder that its family's own library loads."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from memcache_jax._checks import check_path
from memcache_jax.nn import LanguageModel
from memcache_jax.pretrained.families import family_of
from memcache_jax.pretrained.given import Given
from memcache_jax.pretrained.places import Places
from memcache_jax.pretrained.weights import safetensors


def save(model: LanguageModel, folder: str | Path) -> None:
    """Writes a model of ``load`` as its own library does: ``config.json``, ``model.safetensors``.

    Of a model of text and images, of which ``load`` reads the text model, that is written, as the
    library saves it alone. Caches have no place in these files, nor have the parameters of their
    gates.

    Args:
      model: from ``load``, trained further or not.
      folder: a new or an empty folder.

    Raises:
      ImportError: without the package ``safetensors``.
      ValueError: for a model that is not from ``load``, or has adapters, or a folder with files.
    """
    published = getattr(model, "published", None)
    if published is None:
        raise ValueError("only models of mc.pretrained.load can be saved as published ones")
    if model.config.lora is not None:
        raise ValueError("published files have no place for adapters: save mc.nn.merge_lora(model)")
    folder = check_path("folder", folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} must be a new or an empty folder")
    safetensors()
    from safetensors.numpy import save_file

    given = Given(json.loads(published))
    dtype = jnp.dtype(given.dtype())
    places, tensors = Places(model), {}
    params = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    for tensor in family_of(given).tensors(given):
        own = [places.of(tensor, part) for part in tensor.parts]
        values = [np.asarray(params[place.path][...][place.index]) for place in own]
        for name, value in tensor.join(values).items():
            narrow = value.astype(dtype)
            exact = narrow.astype(value.dtype) == value
            tensors[name] = np.ascontiguousarray(narrow if exact.all() else value)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(given.values, indent=2) + "\n")
