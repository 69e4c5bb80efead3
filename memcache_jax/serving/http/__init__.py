"""OpenAI's HTTP API over a batcher. ``pip install '.[serve]'``."""

from memcache_jax.serving.http.chat import PLAIN, ChatTemplate
from memcache_jax.serving.http.listen import listening, serve
from memcache_jax.serving.http.protocol import Limits
from memcache_jax.serving.http.server import Server

__all__ = ["PLAIN", "ChatTemplate", "Limits", "Server", "listening", "serve"]
