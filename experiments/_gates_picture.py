"""The picture of ``experiments.inspect``: what tokens read, and from how many states."""

from typing import Any

import numpy as np

from memcache_jax.training.pictures import MAP, new_figure

_SHOWN = 3  # layers, evenly spread


def picture(found: dict[str, Any]) -> Any:
    """Draws the gates of some layers over the text, and the states that tokens of all layers read.

    Args:
      found: the result of ``inspect``.

    Returns:
      A figure. In the image of a layer a row is a token and a column a place in the text: its color
      is the gate of the state that holds the place, as a mean over heads. The last axes have, by
      token, the largest number of states with a gate above 0 in any of these layers, and the
      effective number in each.
    """
    layers = [found["layers"][i] for i in _spread(len(found["layers"]))]
    figure, (axes,) = new_figure(len(layers) + 1, size=(3.9, 3.7))
    image = None
    for axis, layer in zip(axes, layers, strict=False):
        image = axis.imshow(over_text(layer), cmap=MAP, vmin=0, vmax=1, interpolation="nearest")
        axis.set(title=_title(layer), xlabel="place in the text", ylabel="token that reads")
        axis.grid(visible=False)
    figure.colorbar(image, ax=list(axes[:-1]), label="gate", shrink=0.8)
    read = np.max([_read(layer) for layer in layers], axis=0)
    axes[-1].plot(read, color="#8a94a6", linestyle="-", marker="", label="gate above 0")
    for layer in layers:
        axes[-1].plot(effective(layer["gates"]), marker="", label=_title(layer))
    axes[-1].set(xlabel="token", title="states read", ylim=(0, None))
    axes[-1].legend(fontsize="small")
    return figure


def over_text(layer: dict[str, Any]) -> np.ndarray:
    """Returns the gate of each token for each place in the text, (t, t); nan where it is unseen."""
    gates = layer["gates"].mean(axis=1)
    tokens = len(gates)
    image = np.full((tokens, tokens), np.nan)
    begin = np.array([0, *layer["begin"]])
    for t, (*cached, live) in enumerate(gates):
        for (first, end), gate in zip(layer["states"], cached, strict=True):
            if end <= t and gate > 0:
                image[t, first:end] = gate
        image[t, begin[begin <= t].max() : t + 1] = live
    return image


def effective(gates: np.ndarray) -> np.ndarray:
    """Returns the effective number of states that each token reads, as a mean over heads.

    It is the exponential of the entropy of the token's gates: 1 for a token that reads one state,
    n for one that reads n alike.
    """
    logs = np.log(gates, where=gates > 0, out=np.zeros_like(gates))
    return np.exp(-(gates * logs).sum(axis=-1)).mean(axis=-1)


def _read(layer: dict[str, Any]) -> np.ndarray:
    """The states of a layer to which any head of a token gives a gate, the live one among them."""
    return (layer["gates"] > 0).any(axis=1).sum(axis=-1)


def _spread(count: int) -> list[int]:
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, _SHOWN))})


def _title(layer: dict[str, Any]) -> str:
    return layer["name"].split(":")[0]
