"""The page of ``experiments.inspect``: a text, and the gates of each token."""

import base64
import html
import json
from typing import Any

import numpy as np

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 0; color: #1c2330; background: #fff }
header { padding: 12px 24px; border-bottom: 1px solid #d8dde6 }
h1 { font-size: 18px; margin: 0 } h2 { font-size: 13px; margin: 16px 0 4px; font-weight: 600 }
p { margin: 4px 0; color: #556 }
main { display: grid; grid-template-columns: minmax(0, 1fr) 460px; gap: 24px; padding: 16px 24px }
#text { font: 13px/1.7 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }
#text span { cursor: pointer; border-radius: 2px }
#text span.begins { border-left: 2px solid #c2410c }
#text span.here { outline: 2px solid #1c2330 }
#text span.empty::before { content: "\\00b7"; color: #99a }
aside { position: sticky; top: 8px; align-self: start; max-height: 96vh; overflow-y: auto }
.head { display: flex; height: 18px; margin: 1px 0; cursor: pointer }
.head.chosen { outline: 2px solid #2563eb }
.head b { width: 56px; font: 12px/18px system-ui; flex: none }
.head i { height: 18px; box-sizing: border-box; border-right: 1px solid #fff; background: #2563eb }
.head i.live { background: #c2410c }
"""

_SCRIPT = """
const data = JSON.parse(document.getElementById('data').textContent);
const spans = [...document.querySelectorAll('#text span')];
for (const layer of data) layer.bytes = Uint8Array.from(atob(layer.gates), c => c.charCodeAt(0));
const every = data.flatMap((layer, l) => [...Array(layer.heads).keys()].map(head => [l, head]));
let pinned = null, chosen = null;

function gate(layer, token, head, state) {
  const states = layer.states.length + 1;
  return layer.bytes[(token * layer.heads + head) * states + state] / 255;
}
function liveBegin(layer, token) {
  return layer.begin.reduce((found, x) => x <= token ? x : found, 0);
}
function reads(layer, token, head) {
  const found = [];
  layer.states.forEach(([begin, end], state) => {
    const weight = gate(layer, token, head, state);
    if (weight > 0) found.push({begin, end, weight, live: false});
  });
  const weight = gate(layer, token, head, layer.states.length);
  found.push({begin: liveBegin(layer, token), end: token + 1, weight, live: true});
  return found;
}
function show(token) {
  const heat = new Float64Array(spans.length);
  for (const [l, head] of chosen ? [chosen] : every)
    for (const read of reads(data[l], token, head))
      for (let i = read.begin; i < read.end; i++) heat[i] += read.weight;
  const most = Math.max(...heat);
  spans.forEach((span, i) => {
    span.style.background = heat[i] > 0 ? `rgba(37, 99, 235, ${0.75 * heat[i] / most})` : '';
    span.classList.toggle('here', i === token);
    span.classList.toggle('begins', i > 0 && data.some(layer => layer.begin.includes(i)));
  });
  document.getElementById('where').textContent =
    `token ${token}, ${JSON.stringify(spans[token].textContent)}`;
  every.forEach(([l, head]) => {
    const row = document.getElementById(`head-${l}-${head}`);
    row.classList.toggle('chosen', chosen !== null && chosen[0] === l && chosen[1] === head);
    row.replaceChildren(row.firstChild, ...reads(data[l], token, head).map(read => {
      const bar = document.createElement('i');
      bar.style.width = `${(100 * read.weight).toFixed(2)}%`;
      bar.classList.toggle('live', read.live);
      const what = read.live ? 'live state' : 'cached state';
      const percent = (100 * read.weight).toFixed(1);
      bar.title = `${what}, tokens ${read.begin} to ${read.end - 1}: ${percent} %`;
      return bar;
    }));
  });
}
spans.forEach((span, i) => {
  span.addEventListener('mouseenter', () => { if (pinned === null) show(i); });
  span.addEventListener('click', () => { pinned = pinned === i ? null : i; show(i); });
});
every.forEach(([l, head]) => document.getElementById(`head-${l}-${head}`).addEventListener(
  'click', () => {
    const again = chosen && chosen[0] === l && chosen[1] === head;
    chosen = again ? null : [l, head];
    show(pinned === null ? spans.length - 1 : pinned);
  }));
show(spans.length - 1);
"""


def as_json(found: dict[str, Any]) -> str:
    """Returns the result of ``inspect`` as JSON, with gates to four decimals."""
    layers = [
        # Through float64: a rounded float32 prints more digits.
        layer | dict(gates=layer["gates"].astype(np.float64).round(4).tolist())
        for layer in found["layers"]
    ]
    return json.dumps(found | dict(layers=layers))


def page(found: dict[str, Any], title: str) -> str:
    """Returns a page with the result of ``inspect``, in a single file."""
    data = [
        dict(
            states=layer["states"],
            begin=layer["begin"],
            heads=layer["gates"].shape[1],
            gates=base64.b64encode(_bytes(layer["gates"])).decode(),
        )
        for layer in found["layers"]
    ]
    text = "".join(
        f"<span>{html.escape(piece)}</span>" if piece else '<span class="empty"></span>'
        for piece in found["tokens"]
    )
    layers = "".join(
        f"<h2>{html.escape(layer['name'])}</h2>"
        + "".join(
            f'<div class="head" id="head-{place}-{head}"><b>head {head}</b></div>'
            for head in range(layer["gates"].shape[1])
        )
        for place, layer in enumerate(found["layers"])
    )
    # Escaped, so that no text can close the script element.
    numbers = json.dumps(data).replace("<", "\\u003c")
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>{_STYLE}</style></head><body>
<header><h1>{html.escape(title)}</h1>
<p>Point at a token to see what it read; click to keep it selected. The colour of the text shows the
gates of the states that hold it, as a mean over layers and heads; click the bar of a head to see
that head alone. Blue bars are cached states, oldest first; the orange bar is the live state. Orange
lines in the text mark the beginnings of segments.</p></header>
<main><div id="text">{text}</div><aside><p id="where"></p>{layers}</aside></main>
<script type="application/json" id="data">{numbers}</script><script>{_SCRIPT}</script>
</body></html>
"""


def _bytes(gates: np.ndarray) -> bytes:
    """Returns gates in units of 1/255; positive ones stay positive."""
    steps = np.round(255 * gates).astype(np.uint8)
    return np.where((gates > 0) & (steps == 0), 1, steps).astype(np.uint8).tobytes()
