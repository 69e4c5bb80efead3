"""Flax modules: the layer, attention, and a language model of both."""

from memcache_jax.nn import adapters, linen, recurrent
from memcache_jax.nn.attention import Attention
from memcache_jax.nn.cache_table import cache_bytes, cache_table
from memcache_jax.nn.config import (
    AttentionMixer,
    BlockConfig,
    LanguageModelConfig,
    MemoryCachingMixer,
    Mixer,
)
from memcache_jax.nn.experts import Experts
from memcache_jax.nn.feed_forward import ChannelMix, FeedForward, GatedMLP, SquaredMLP
from memcache_jax.nn.grouped_attention import GroupedAttention, GroupedAttentionMixer
from memcache_jax.nn.language_model import LanguageModel
from memcache_jax.nn.latent_attention import LatentAttention, LatentAttentionMixer
from memcache_jax.nn.lora import LoRA
from memcache_jax.nn.loss import CrossEntropy, TokenScores, cross_entropy, token_scores
from memcache_jax.nn.memory_as_context import MemoryAsContext, MemoryAsContextMixer
from memcache_jax.nn.memory_caching import MemoryCaching
from memcache_jax.nn.norms import Norm
from memcache_jax.nn.parallel import Parallel, ParallelMixer
from memcache_jax.nn.post_training import with_memory_caching
from memcache_jax.nn.routers import RouterLoss, RouterNoise, with_router_noise
from memcache_jax.nn.tuning import merge_lora, with_lora
from memcache_jax.nn.upgrade import upgrade_params
from memcache_jax.streaming.protocol import MixerCache

__all__ = [
    "Attention",
    "AttentionMixer",
    "BlockConfig",
    "ChannelMix",
    "CrossEntropy",
    "Experts",
    "FeedForward",
    "GatedMLP",
    "GroupedAttention",
    "GroupedAttentionMixer",
    "LanguageModel",
    "LanguageModelConfig",
    "LatentAttention",
    "LatentAttentionMixer",
    "LoRA",
    "MemoryAsContext",
    "MemoryAsContextMixer",
    "MemoryCaching",
    "MemoryCachingMixer",
    "Mixer",
    "MixerCache",
    "Norm",
    "Parallel",
    "ParallelMixer",
    "RouterLoss",
    "RouterNoise",
    "SquaredMLP",
    "TokenScores",
    "adapters",
    "cache_bytes",
    "cache_table",
    "cross_entropy",
    "linen",
    "merge_lora",
    "recurrent",
    "token_scores",
    "upgrade_params",
    "with_lora",
    "with_memory_caching",
    "with_router_noise",
]
