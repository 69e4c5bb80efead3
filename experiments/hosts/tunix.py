"""Tunix's ``PeftTrainer``, with and without LoRA by qwix, and its ``Sampler``."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import memcache_jax as mc
from experiments.hosts import _host

CHANGES = [("", "model = mc.nn.adapters.TunixModel(model)")]
LORA = dict(module_path=".*(query|key|value|out|up|down)$", rank=4, alpha=8.0)
PADDING = (0, 3, 11, 5)  # on the left of each row


def run(devices: int) -> list[_host.Row]:
    """Trains a model, draws from it, and trains parameters of LoRA in a new one."""
    qwix, utils = _host.load("qwix"), _host.load("tunix.sft.utils")

    trained, losses = train(build(devices), devices)
    rows = [("Tunix PeftTrainer", f"loss {_host.fell(losses)}")]
    rows += [("Tunix Sampler", f"logits are those of rows without padding, {sample(trained):.0e}")]

    model = build(devices)
    inputs = model.get_model_input()
    adapted = qwix.apply_lora_to_model(model, qwix.LoraProvider(**LORA), rngs=nnx.Rngs(1), **inputs)
    frozen = jnp.asarray(adapted.model.outer.embedding.embedding[...])
    adapted, losses = train(adapted, devices)
    assert utils.is_lora_enabled(adapted), "qwix added no parameters"
    count = sum(x.size for x in jax.tree.leaves(nnx.state(adapted, nnx.LoRAParam)))
    assert (adapted.model.outer.embedding.embedding[...] == frozen).all(), "the model was trained"
    rows += [("Tunix PeftTrainer, LoRA", f"loss {_host.fell(losses)}, {count:,} parameters")]
    rows += [("Tunix Sampler, LoRA", f"the same, {sample(adapted):.0e}")]

    version = f"{_host.version('google-tunix')}, {_host.version('qwix')}"
    return [_host.Row(host, version, _host.count_lines(CHANGES), text) for host, text in rows]


def build(devices: int) -> mc.nn.adapters.TunixModel:
    """A tiny language model in Tunix's form."""
    config = mc.nn.LanguageModelConfig(_host.VOCAB, 2, 32, 2, mixers=(_host.MIXER,))
    names = None if devices == 1 else dict(embed="fsdp", heads="tp", mlp="tp", vocab="tp")
    model = mc.nn.LanguageModel(config, axis_names=names, rngs=nnx.Rngs(0))
    return mc.nn.adapters.TunixModel(model)


def train(model: Any, devices: int, steps: int = 20) -> tuple[Any, list[float]]:
    """Losses of the trainer, with its default loss."""
    peft_trainer, utils = _host.load("tunix.sft.peft_trainer"), _host.load("tunix.sft.utils")

    def model_input(batch: Any) -> dict:
        real = batch.input_tokens != _host.PAD
        return dict(
            input_tokens=batch.input_tokens,
            input_mask=batch.input_mask,
            positions=utils.build_positions_from_mask(real),
            attention_mask=utils.make_causal_attn_mask(real),
        )

    config = peft_trainer.TrainingConfig(eval_every_n_steps=steps, max_steps=steps)
    with _host.mesh(devices, ("fsdp", "tp"), legacy=True):
        trainer = peft_trainer.PeftTrainer(model, optax.adamw(1e-2), config)
        trainer.with_gen_model_input_fn(model_input).train(_batches(steps))
    history = trainer.metrics_logger.get_metric_history("", "loss", "train")
    return model, [float(x) for x in history]


def _batches(steps: int) -> Iterator[Any]:
    peft_trainer = _host.load("tunix.sft.peft_trainer")

    tokens = np.array(_host.repeated(40))
    for row, padding in zip(tokens, PADDING, strict=True):
        row[:] = np.roll(row, padding)
        row[:padding] = _host.PAD
    batch = peft_trainer.TrainingInput(input_tokens=tokens, input_mask=tokens != _host.PAD)
    yield from [batch] * steps


def sample(model: Any) -> float:
    """Prompts of two lengths: how far the logits are from those of whole rows without padding."""
    sampler = _host.load("tunix.generate.sampler")

    config = sampler.CacheConfig(cache_size=64, num_layers=2, num_kv_heads=2, head_dim=16)
    draw = sampler.Sampler(model, _host.Numbers(), config)
    drawn = draw(_host.prompts(), max_generation_steps=9, return_logits=True, echo=True)
    error, whole = 0.0, nnx.jit(lambda model, tokens: model(tokens)[0])
    for tokens, logits in zip(drawn.tokens, drawn.logits, strict=True):
        expected = whole(model, jnp.asarray(tokens)[None])[0, :-1]
        error = max(error, float(np.abs(np.asarray(logits)[1:] - expected).max()))
    assert error < 1e-3, f"the sampler's logits differ from those of whole rows by {error}"
    return error
