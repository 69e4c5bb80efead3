"""Deep memories: a small network per head whose weights are written by gradient descent.

Within a chunk every gradient is taken at the state the chunk began with. Such a gradient is rank
one per token, delta_j x_j^T for a layer with input x_j, so the weights at every token of the chunk
are a known combination of the start state and the rank-one terms, and a whole chunk is a few
matrix products.
"""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from memcache_jax._checks import check_integer, check_number, set_fields
from memcache_jax._typing import Apply, Array, Bool, Controls, Float, Int, Matrices
from memcache_jax.kernels.bands import gated, gelu
from memcache_jax.kernels.decay import decay_matrix, start_decay
from memcache_jax.kernels.deep_update import DescentChunk
from memcache_jax.memories.base import Form, Memory
from memcache_jax.memories.deep_chunk import DeepChunk, DeepState, DocumentsChunk
from memcache_jax.memories.muon import length_of, orthogonalized
from memcache_jax.memories.polynomial import num_features, polynomial


class _Coefficients(NamedTuple):
    """The weights, or the momentum, after each token, as ``DeepChunk`` has them."""

    weight_decay: Float[Array, "m"]
    momentum_decay: Float[Array, "m"] | None
    mixing: Float[Array, "m m"]


@dataclasses.dataclass(frozen=True)
class DeepMemory(Memory):
    """A network per head, written by descent on an inner loss, with weight decay.

    ``depth=2`` is M(x) = x + W1 gelu(W2 x), with weights ``W2`` (f, k), ``W1`` (v, f),
    f = ``expansion`` * k and k = v; ``depth=1`` is M(x) = W x, with weight ``W`` (v, k). A rule
    gives ``loss`` and the controls ``eta`` and ``log_alpha``, and ``log_beta`` for momentum.

    With ``max_step_norm`` r, a token's step -eta_t grad l_t that is longer than r (1 - beta_t) is
    shortened to that, beta_t = 0 without momentum; lengths are over the weights of all layers.
    Then, whatever the tokens and coefficients, the momentum is never longer than r, and the weights
    are never longer than |W_0| + r min(t, 1 / (1 - alpha)), alpha the largest decay. Without a
    bound two layers whose gradients grow with each other may diverge.

    With ``ns_steps`` n, each chunk ends with a Muon step
    (https://kellerjordan.github.io/posts/muon). Let D = sum_t alpha_{t+1} ... alpha_m S_t be the
    update that the chunk's m tokens make to a layer's weights W, where S_t is the momentum, or
    -eta_t grad l_t without it, and let O(D) be D / ||D|| after n Newton-Schulz iterations (norms
    are Frobenius). The chunk then ends with::

        alpha_1 ... alpha_m W + ||D|| O(D) / ||O(D)||

    in place of alpha_1 ... alpha_m W + D. The next chunk starts from these weights, and they are
    cached at a segment's end. The chunk's own tokens read W_t as without ``ns_steps``, and the
    momentum does not change. Atlas (arXiv:2505.23735) orthogonalizes at every token,
    W_t = alpha_t W_{t-1} + eta_t O(S_t), which needs a full matrix per token; here tokens read a
    chunk through rank-one factors. The update keeps its norm, so eta and alpha keep their meaning,
    and the bounds of ``max_step_norm`` hold.

    With ``degree=2`` the first layer reads polynomial features phi(x) (``memories.polynomial``) of
    length k' = k (k + 3) / 2 instead of x: M(x) = W phi(x), or x + W1 gelu(W2 phi(x)), W2 of shape
    (f, k'). As <phi(x), phi(y)> = <x, y> + <x, y>^2, keys that are not orthogonal interfere less;
    the state is k' / k times as large. Atlas (arXiv:2505.23735) raises the capacity of its memories
    with such features, with learned coefficients; here they are fixed.

    Attributes:
      chunk_size: tokens that share the point at which gradients are taken.
      expansion: hidden width over key dimension.
      depth: number of layers, 1 or 2.
      max_step_norm: the length that momentum, or without it a token's step, never exceeds; None for
        the bare equation. Layers set 1 where it is None, unless they are told not to.
      ns_steps: Newton-Schulz iterations at the end of each chunk: 0 for none, 5 as in Muon. Kernels
        support only 0, and so do rules with another ``form`` than ``"descent"``.
      degree: 1, or 2 to read the monomials of degree 1 and 2 of keys and queries. Kernels support
        only 1.

    Raises:
      ValueError: for a depth or degree other than 1 or 2, other sizes below 1, a ``max_step_norm``
        that is not positive, negative ``ns_steps``, or ``ns_steps`` with another ``form``.

    Example:
      >>> import memcache_jax as mc
      >>> mc.memories.Titans(chunk_size=32, ns_steps=5).ns_steps
      5
    """

    form: ClassVar[Form] = "descent"
    fixed: ClassVar[tuple[str, ...]] = (
        *("init", "write", "write_documents", "matrices", "forward", "read", "read_online"),
        *("inner_gradient", "rates", "closed", "features"),
    )

    chunk_size: int = 64
    expansion: int = 4
    depth: int = 2
    max_step_norm: float | None = None
    ns_steps: int = dataclasses.field(default=0, kw_only=True)
    degree: int = dataclasses.field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        name = type(self).__name__
        sizes = {
            size: check_integer(f"{size} of {name}", getattr(self, size))
            for size in ("chunk_size", "expansion", "depth", "degree")
        }
        for size in ("depth", "degree"):
            if sizes[size] > 2:
                raise ValueError(f"{name} has {size} 1 or 2, got {size}={sizes[size]}")
        steps = check_integer(f"ns_steps of {name}", self.ns_steps, 0)
        if steps and self.form != "descent":
            raise ValueError(
                f"{name} has form={self.form!r}, whose chunks may be written in parts: ns_steps "
                f"needs form='descent', got {steps}"
            )
        set_fields(self, **sizes, ns_steps=steps)
        if self.max_step_norm is not None:
            name = f"max_step_norm of {name}"
            bound = check_number(name, self.max_step_norm, "positive, or None", lambda x: x > 0)
            set_fields(self, max_step_norm=bound)

    def bounded(self) -> "DeepMemory":
        """The rule with a bound on its steps, 1 if it has none yet."""
        if self.max_step_norm is not None:
            return self
        return dataclasses.replace(self, max_step_norm=1.0)

    @abc.abstractmethod
    def loss(self, prediction: Float[Array, "rows v"], value: Float[Array, "rows v"]) -> Array:
        """The inner loss, summed over rows."""

    @property
    def gradient_chunk(self) -> int:
        """The chunk size."""
        return self.chunk_size

    def weight_shapes(self, key_dim: int, value_dim: int) -> dict[str, tuple[int, int]]:
        """W2 and W1, or W for depth 1."""
        inputs = key_dim if self.degree == 1 else num_features(key_dim)
        if self.depth == 1:
            return {"W": (value_dim, inputs)}
        if key_dim != value_dim:
            raise ValueError(
                "a memory of depth 2 adds its input to its output and needs k = v, "
                f"got k={key_dim}, v={value_dim}"
            )
        hidden = self.expansion * key_dim
        return {"W2": (hidden, inputs), "W1": (value_dim, hidden)}

    def init(
        self, weights: Mapping[str, Array], key_dim: int, value_dim: int, dtype: Any
    ) -> DeepState:
        """Returns the learned initial weights, and no momentum."""
        start = tuple(weights[name] for name in self.weight_shapes(key_dim, value_dim))
        start = tuple(weight.astype(dtype).T for weight in start)
        momentum = start if "log_beta" in self.controls else ()
        return DeepState(start, tuple(jnp.zeros_like(weight) for weight in momentum))

    def forward(
        self, apply: Apply, query: Float[Array, "*rows k"], gate: Float[Array, "rows"] | None = None
    ) -> Array:
        """W phi(q), or q + W1 gelu(W2 phi(q)); phi(q) = q for ``degree=1``."""
        if self.depth == 1:
            return apply(0, gated(gate, self.features(query)))
        return gated(gate, query) + apply(1, gated(gate, gelu(apply(0, self.features(query)))))

    def features(self, query: Float[Array, "*rows k"]) -> Float[Array, "*rows in"]:
        """phi(q)."""
        return query if self.degree == 1 else polynomial(query)

    def step(
        self,
        state: DeepState,
        anchor: DeepState,
        key: Float[Array, "k"],
        value: Float[Array, "v"],
        controls: Controls,
    ) -> DeepState:
        """One step of descent, the gradient taken at the anchor."""

        def loss(weights: Matrices) -> Array:
            return self.loss(self.read(weights, key[None]), value[None])

        gradient = jax.grad(loss)(anchor.weights)
        eta = controls["eta"]
        if self.max_step_norm is not None:
            eta = self._bounded_rate(controls, [length_of(g.reshape(-1)) for g in gradient])
        change = jax.tree.map(lambda g: -eta * g, gradient)
        momentum = state.momentum
        if momentum:
            beta = jnp.exp(controls["log_beta"])
            momentum = change = jax.tree.map(lambda s, c: beta * s + c, momentum, change)
        alpha = jnp.exp(controls["log_alpha"])
        return DeepState(jax.tree.map(lambda w, c: alpha * w + c, state.weights, change), momentum)

    def closed(
        self, state: DeepState, anchor: DeepState, controls: Controls, counts: Bool[Array, "m"]
    ) -> DeepState:
        """The state after a full chunk, with its Muon step if ``ns_steps`` is positive."""
        if not self.ns_steps:
            return state
        alpha = jnp.exp(jnp.sum(controls["log_alpha"], where=counts))

        def of(w: Array, before: Array) -> Array:
            return alpha * before + orthogonalized(w - alpha * before, self.ns_steps)

        return state._replace(weights=jax.tree.map(of, state.weights, anchor.weights))

    def write(
        self,
        state: DeepState,
        anchor: DeepState,
        key: Float[Array, "m k"],
        value: Float[Array, "m v"],
        controls: Controls,
    ) -> tuple[DeepState, DeepChunk]:
        """A chunk of descent steps in matrix products."""
        return self._write(state, anchor, key, value, controls, None)

    def write_documents(
        self,
        state: DeepState,
        initial: DeepState,
        key: Float[Array, "m k"],
        value: Float[Array, "m v"],
        controls: Controls,
        begun: Int[Array, "m"],
    ) -> tuple[DeepState, DocumentsChunk]:
        """The chunk twice: from its start, and from the initial weights with documents apart."""
        same = begun[:, None] == begun[None]
        end, before = self._write(state, state, key, value, controls, None)
        new_end, after = self._write(initial, initial, key, value, controls, same)
        end = jax.tree.map(lambda new, old: jnp.where(begun[-1] > 0, new, old), new_end, end)
        return end, DocumentsChunk((begun > 0).astype(key.dtype), before, after)

    def _write(
        self,
        state: DeepState,
        anchor: DeepState,
        key: Float[Array, "m k"],
        value: Float[Array, "m v"],
        controls: Controls,
        same: Bool[Array, "m m"] | None,
    ) -> tuple[DeepState, DeepChunk]:
        """``write``, where only tokens of the same document see each other."""
        inputs, deltas = self.inner_gradient(anchor.weights, key, value)
        controls = {**controls, "eta": self.rates(controls, inputs, deltas)}
        of_weights, *of_momentum = self.coefficients(controls, same)
        chunk = DeepChunk(start=state, inputs=inputs, deltas=deltas, **of_weights._asdict())
        momentum = (chunk._replace(**changed._asdict()).end() for changed in of_momentum)
        return DeepState(chunk.end(self.ns_steps), *momentum), chunk

    def descent(
        self, key: Float[Array, "m k"], value: Float[Array, "m v"], controls: Controls
    ) -> DescentChunk:
        """A chunk's write as a map of the state that it starts from, for kernels."""
        parts = self.coefficients(controls, None)
        decays = ((part.weight_decay, part.momentum_decay) for part in parts)
        decays = ([x[-1] for x in row if x is not None] for row in decays)
        return DescentChunk(
            key=key,
            value=value,
            decay=jnp.stack([jnp.stack(row) for row in decays]),
            mixing=jnp.stack([part.mixing[-1] for part in parts]),
        )

    def rates(self, controls: Controls, inputs: Matrices, deltas: Matrices) -> Float[Array, "m"]:
        """The ``eta`` of each token, shortened where ``max_step_norm`` asks for it."""
        if self.max_step_norm is None:
            return controls["eta"]
        pairs = zip(inputs, deltas, strict=True)
        return self._bounded_rate(controls, [length_of(x) * length_of(delta) for x, delta in pairs])

    def _bounded_rate(
        self, controls: Controls, lengths: Sequence[Float[Array, "*m"]]
    ) -> Float[Array, "*m"]:
        """eta, or less where steps would be too long, from the lengths of gradients by layer."""
        assert self.max_step_norm is not None
        eta = controls["eta"]
        limit = jnp.full_like(eta, self.max_step_norm)
        if "log_beta" in self.controls:
            limit *= jnp.maximum(1 - jnp.exp(controls["log_beta"]), 0)
        length = length_of(jnp.stack(lengths, axis=-1))
        long = eta * length > limit
        return jnp.where(long, limit / jnp.where(long, length, 1), eta)

    def coefficients(
        self, controls: Controls, same: Bool[Array, "m m"] | None
    ) -> tuple[_Coefficients, ...]:
        """Those of the weights, and of the momentum if there is any."""
        log_alpha, eta = controls["log_alpha"], controls["eta"]
        decay, weight_decay = decay_matrix(log_alpha, same), start_decay(log_alpha, same)
        if "log_beta" not in self.controls:
            return (_Coefficients(weight_decay, None, decay * eta[None]),)
        # S_t = B_t S_0 - sum_j momentum[t, j] eta_j G_j, and W_t sums what alpha leaves of S_t.
        log_beta = controls["log_beta"]
        momentum, momentum_decay = decay_matrix(log_beta, same), start_decay(log_beta, same)
        mixing = jnp.matmul(decay, momentum, precision="highest") * eta[None]
        kept = jnp.sum(decay * momentum_decay[None], axis=1)
        of_momentum = _Coefficients(jnp.zeros_like(eta), momentum_decay, momentum * eta[None])
        return _Coefficients(weight_decay, kept, mixing), of_momentum

    def apply(self, chunk: Any, layer: int, x: Float[Array, "m in"]) -> Array:
        """A layer as it is after each token."""
        return chunk.apply(layer, x)

    def keep_layer(self, chunk: DeepChunk | DocumentsChunk, layer: int) -> Any:
        """The chunk with one layer's matrices."""
        return chunk.keep_layer(layer)

    def matrices(self, state: DeepState) -> Matrices:
        """The weights; momentum is not read."""
        return state.weights

    def inner_gradient(
        self, weights: Matrices, key: Float[Array, "m k"], value: Float[Array, "m v"]
    ) -> tuple[Matrices, Matrices]:
        """Inputs x_j and output gradients delta_j of each layer: its gradient is delta_j x_j^T.

        A zero is added to each layer's output; the loss gradient with respect to it is delta.
        """

        def loss(zeros: Matrices) -> tuple[Array, Matrices]:
            inputs = []

            def apply(layer: int, x: Array) -> Array:
                inputs.append(x)
                return jnp.matmul(x, weights[layer]) + zeros[layer]

            return self.loss(self.forward(apply, key), value), tuple(inputs)

        zeros = tuple(jnp.zeros_like(key, shape=(key.shape[0], w.shape[1])) for w in weights)
        deltas, inputs = jax.grad(loss, has_aux=True)(zeros)
        return inputs, deltas
