"""Runs that begin with a public model: its shape, what of it is trained, and its parameters."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from memcache_jax._checks import check_choice
from memcache_jax.nn import LanguageModel, LanguageModelConfig, LoRA, Mixer, merge_lora
from memcache_jax.nn.language_model import abstract_model
from memcache_jax.nn.recurrent import RecurrentMixer
from memcache_jax.nn.tuning import merge_in_place
from memcache_jax.pretrained import load
from memcache_jax.pretrained.forms import read_text_model
from memcache_jax.pretrained.given import Given
from memcache_jax.pretrained.read import described
from memcache_jax.training.config import Config, default_config, to_json
from memcache_jax.training.corpus import digest_of
from memcache_jax.training.durable import digest_of_all, read_json
from memcache_jax.training.models import caches, model_config
from memcache_jax.training.step import Params, TrainState, joined, pure
from memcache_jax.training.tokenizers import end_token_of

FILE = "pretrained.json"
# Keys of ``config.model`` that are then the public model's, and those that say nothing of it.
_WEIGHTS = "*.safetensors"
_ITS_OWN = ("vocab_size", "num_layers", "features", "num_heads", "tie_embeddings")
_NOT_ITS = ("head_dim", "mlp_features", "mixers", "memory", "connector", "distances")
_NOT_ITS += ("window", "rope_base")


class PublicModel(NamedTuple):
    """The public model that a run begins with.

    Attributes:
      folder: where it is.
      values: its ``config.json``, of the text model alone.
      files: a digest of its files of weights, names and all bytes; empty where it was not asked
        for.
    """

    folder: str
    values: dict[str, Any]
    files: str

    @classmethod
    def of(cls, config: Config, *, digest: bool = True) -> "PublicModel | None":
        """The model that a configuration names, if it names one.

        Args:
          config: of a run.
          digest: whether to read all of its files, for ``files``.

        Raises:
          ValueError: if the folder is none.
        """
        if config.pretrained is None:
            return None
        folder = Path(config.pretrained).absolute()
        values = dict(read_text_model(folder).values)
        return cls(str(folder), values, digest_of_weights(folder) if digest else "")

    @classmethod
    def of_run(cls, workdir: Path) -> "PublicModel | None":
        """The model that a run began with, as its workdir has it."""
        path = workdir / FILE
        if not path.exists():
            return None
        found = read_json(path)
        if not isinstance(found, dict) or set(found) != set(cls._fields):
            raise ValueError(f"{path} must have {', '.join(cls._fields)}, got {found!r:.100}")
        return cls(**found)

    def described(self, config: Config) -> LanguageModelConfig:
        """The public model, without caches. What is not trained has the dtype of its files."""
        check_choice("model.dtype", config.model.dtype, ("float32", "bfloat16"))
        given = Given(self.values, f"{self.folder}/config.json")
        kept = given.dtype()
        param_dtype = jnp.float32 if config.tune == "all" else jnp.dtype(kept)
        return described(given, dtype=jnp.dtype(config.model.dtype), param_dtype=param_dtype)

    def model(self, config: Config) -> LanguageModelConfig:
        """The run's model: with caches, and with adapters if those are trained."""
        parts = caches(config.model)

        def cached(mixer: Mixer) -> Mixer:
            has_some = isinstance(mixer, RecurrentMixer)
            return dataclasses.replace(mixer, **parts) if has_some else mixer

        model = self.described(config).with_mixers(cached)
        lora = LoRA(config.lora.rank, config.lora.alpha) if config.tune == "lora" else None
        remat = ("remat", "keep_states", "offload_states")
        options = {name: config.model.get(name, False) for name in remat}  # of earlier runs
        return dataclasses.replace(model, lora=lora, **options)

    def frozen(self, config: Config) -> frozenset[tuple]:
        """Paths of the parameters that are not trained.

        Raises:
          ValueError: if there are no others.
        """
        if config.tune == "all":
            return frozenset()
        its_own, every = (
            frozenset(_flat(pure(abstract_model(model)[1])))
            for model in (self.described(config), self.model(config))
        )
        if every == its_own:
            raise ValueError(
                f"config.tune={config.tune!r} trains connectors and temperatures, which "
                f"model.aggregation={dict(config.model.aggregation)} does not have: give it "
                'gate="content", or train something else'
            )
        return its_own

    def resolved(self, config: Config) -> Config:
        """The configuration with the model's sizes and tokenizer.

        Raises:
          ValueError: for keys of ``config.model`` that say something else of the model.
        """
        config = config.copy_and_resolve_references()
        said, default = (to_json(x)["model"] for x in (config, default_config()))
        model = self.described(config)
        found = {name: getattr(model, name) for name in _ITS_OWN}
        allowed = {name: (default[name], found[name]) for name in _ITS_OWN}
        allowed |= {name: (default[name],) for name in _NOT_ITS}
        for name, values in allowed.items():
            if said[name] not in values:
                raise ValueError(
                    f"model.{name} is the public model's own: leave it at {values[0]!r}, got "
                    f"{said[name]!r}"
                )
        if config.data.tokenizer == "bytes" and model.vocab_size != 257:
            raise ValueError(
                f"data.tokenizer='bytes' has 257 ids, the public model {model.vocab_size}: give "
                "'pretrained', for the folder's own"
            )
        config.model.update(found)
        if config.data.tokenizer == "pretrained":
            folder = Path(self.folder)
            config.data.tokenizer = str(folder / "tokenizer.json")
            if config.data.eos_token is None:
                config.data.eos_token = end_token_of(folder)
        return config

    def parameters(self, config: Config) -> Params:
        """Its parameters, read now; on the mesh of ``jax.set_mesh``, if there is one."""
        described = self.described(config)
        model = load(self.folder, dtype=described.dtype, param_dtype=described.param_dtype)
        return pure(nnx.state(model, nnx.Param))

    def check_same(self, other: "PublicModel | None", workdir: Path) -> None:
        """Raises ValueError unless the run in a workdir began with this model, its ``of_run``."""
        if other is None:
            raise ValueError(
                f"{FILE} is missing from {workdir}; it records the model that the run began with: "
                "bring it back, or give another --workdir"
            )
        changed = "config.json" if self.values != other.values else "files of weights"
        files = self.files
        if len(other.files) != len(files):  # of an earlier version: of the ends of its files
            files = digest_of({x.name: x for x in sorted(Path(self.folder).glob(_WEIGHTS))})
        if (self.values, files) != (other.values, other.files):
            raise ValueError(
                f"{self.folder} is not the model that the run began with, from {other.folder}: its "
                f"{changed} changed. Bring that one back, or give another --workdir"
            )


def digest_of_weights(folder: Path) -> str:
    """A digest of a public model's files of weights and their index: names, and all bytes."""
    return digest_of_all(sorted([*folder.glob(_WEIGHTS), *folder.glob(f"{_WEIGHTS}.index.json")]))


def run_model(config: Config, public: PublicModel | None) -> LanguageModelConfig:
    """The model of a run."""
    return model_config(config.model) if public is None else public.model(config)


def begin(
    public: PublicModel,
    config: Config,
    optimizer: optax.GradientTransformation,
    target: TrainState,
    mesh: Mesh | None,
) -> TrainState:
    """The initial state: the public model's parameters, and new ones as its caches begin."""
    model, given = public.model(config), _flat(public.parameters(config))
    wanted = _flat(target.params)
    new = {path: x for path, x in wanted.items() if path not in given}

    def fresh(key: jax.Array) -> dict:
        made = _flat(pure(nnx.state(LanguageModel(model, rngs=nnx.Rngs(key)), nnx.Param)))
        return {path: made[path].astype(x.dtype) for path, x in new.items()}

    def shardings(tree: Any) -> Any:
        return None if mesh is None else jax.tree.map(lambda x: x.sharding, tree)

    made = jax.jit(fresh, out_shardings=shardings(new))(jax.random.key(config.seed))
    every = given | made
    params = unflatten_dict({path: every[path] for path in wanted})
    start = jax.jit(optimizer.init, out_shardings=shardings(target.opt_state))
    frozen = unflatten_dict({path: every[path] for path in _flat(target.frozen)})
    return TrainState(params, start(params), frozen)


def _flat(params: Params) -> dict[tuple, Any]:
    return dict(flatten_dict(params))


def merged(
    graph: nnx.GraphDef, params: Params, *, delete: bool = False
) -> tuple[nnx.GraphDef, Params]:
    """A model without its adapters, which become parts of its projections.

    With ``delete`` the arrays that are summed are deleted one after the other.
    """
    model = nnx.merge(graph, params)
    if model.config.lora is None:
        return graph, params
    params = pure(nnx.state(merge_in_place(model, delete=delete), nnx.Param))
    return abstract_model(model.config)[0], params


class Exported(NamedTuple):
    """The model that a run of a public model leaves, and how its checkpoints become that.

    Attributes:
      public: the public model.
      config: of the run.
      run: the run's model without its arrays.
      graph: the model that it leaves, whose adapters are merged.
      target: the shapes of that one's parameters.
    """

    public: PublicModel
    config: Config
    run: nnx.GraphDef
    graph: nnx.GraphDef
    target: Params

    @classmethod
    def of(
        cls, public: PublicModel, config: Config, run: nnx.GraphDef, whole: Params
    ) -> "Exported":
        """Of the run's model, and the shapes of its parameters."""
        graph = abstract_model(dataclasses.replace(public.model(config), lora=None))[0]

        def merge(params: Params) -> Params:
            return pure(nnx.state(merge_lora(nnx.merge(run, params)), nnx.Param))

        target = jax.eval_shape(merge, whole)
        return cls(public, config, run, graph, target)

    def frozen(self, workdir: Path) -> Params:
        """What the run in a workdir has not trained, read from the public model's folder now.

        Raises:
          ValueError: if the folder is not there, or holds another model.
        """
        if self.config.tune == "all":
            return {}
        found = PublicModel.of(self.config)
        assert found is not None, "a run of a public model"
        found.check_same(self.public, workdir)
        return found.parameters(self.config)

    def complete(self, trained: Params, frozen: Params) -> Params:
        """The whole model's parameters, of those that a checkpoint has and those of ``frozen``.

        Adapters are merged, as ``merged`` does.
        """
        if not frozen:
            return trained
        return merged(self.run, joined(trained, frozen), delete=True)[1]

    def model(self, params: Params) -> LanguageModel:
        """The model, which ``mc.pretrained.save`` takes."""
        model = nnx.merge(self.graph, params)
        model.published = json.dumps(self.public.values)
        return model
