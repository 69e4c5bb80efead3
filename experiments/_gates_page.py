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
@media (max-width: 900px) {
  header, main { padding: 12px } main { grid-template-columns: minmax(0, 1fr); gap: 12px }
  aside { top: 0; order: -1; max-height: 40vh; background: #fff; border-bottom: 1px solid #d8dde6 }
}
#text { font: 13px/1.7 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }
#text span { cursor: pointer; border-radius: 2px }
#text span.begins { border-left: 2px solid #c2410c }
#text span.here, .head:focus-visible { outline: 2px solid #1c2330 }
#text span.empty::before { content: "\\00b7"; color: #99a }
aside { position: sticky; top: 8px; align-self: start; max-height: 96vh; overflow-y: auto }
h2, #where { overflow-wrap: anywhere }
.head { display: flex; width: calc(100% - 4px); height: 18px; margin: 1px 2px; padding: 0;
  border: 0; background: none; text-align: left; cursor: pointer }
.head.chosen { outline: 2px solid #2563eb }
.head b { width: 56px; font: 12px/18px system-ui; flex: none }
.head i { height: 18px; box-sizing: border-box; border-right: 1px solid #fff; background: #1d4ed8 }
.head i.live { background: repeating-linear-gradient(45deg, #c2410c 0 4px, #f4c3a5 4px 7px) }
"""

_SCRIPT = """
const data = JSON.parse(document.getElementById('data').textContent);
const spans = [...document.querySelectorAll('#text span')];
for (const layer of data) layer.bytes = Uint8Array.from(atob(layer.gates), c => c.charCodeAt(0));
const every = data.flatMap((layer, l) => [...Array(layer.heads).keys()].map(head => [l, head]));
let pinned = null, chosen = null, shown = 0;

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
  shown = token;
  const heat = new Float64Array(spans.length);
  for (const [l, head] of chosen ? [chosen] : every)
    for (const read of reads(data[l], token, head))
      for (let i = read.begin; i < read.end; i++) heat[i] += read.weight;
  const most = Math.max(...heat);
  spans.forEach((span, i) => {
    span.style.background = heat[i] > 0 ? `rgba(37, 99, 235, ${0.75 * heat[i] / most})` : '';
    span.classList.toggle('here', i === token);
    span.ariaSelected = i === token;
    span.classList.toggle('begins', i > 0 && data.some(layer => layer.begin.includes(i)));
  });
  document.getElementById('where').textContent =
    `token ${token}, ${JSON.stringify(spans[token].textContent)}`;
  every.forEach(([l, head]) => {
    const row = document.getElementById(`head-${l}-${head}`);
    const pressed = chosen !== null && chosen[0] === l && chosen[1] === head;
    row.classList.toggle('chosen', pressed);
    row.ariaPressed = pressed;
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
// One stop of the Tab key for all elements; arrow keys, Home and End go from one to another.
function arrows(elements, arrived) {
  const stop = to => elements.forEach((element, i) => element.tabIndex = i === to ? 0 : -1);
  elements.forEach((element, i) => {
    element.addEventListener('focus', () => { stop(i); arrived(i); });
    element.addEventListener('keydown', event => {
      const last = elements.length - 1, top = element.offsetTop;
      const [above, below] = [x => x.offsetTop < top, x => x.offsetTop > top];
      const to = {
        ArrowLeft: Math.max(i - 1, 0),
        ArrowRight: Math.min(i + 1, last),
        ArrowUp: elements.findLastIndex((x, j) => j < i && above(x)),
        ArrowDown: elements.findIndex((x, j) => j > i && below(x)),
        Home: 0,
        End: last,
      }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      if (to >= 0) elements[to].focus();
    });
  });
  stop(elements.length - 1);
}
function keep(token) {
  pinned = pinned === token ? null : token;
  show(token);
}
spans.forEach((span, i) => {
  span.role = 'option';
  span.addEventListener('mouseenter', () => { if (pinned === null) show(i); });
  span.addEventListener('click', () => { span.focus(); keep(i); });
  span.addEventListener('keydown', event => {
    if (event.key !== 'Enter' && event.key !== ' ') return;
    event.preventDefault();
    keep(i);
  });
});
arrows(spans, i => { if (pinned === null) show(i); });
const rows = every.map(([l, head]) => document.getElementById(`head-${l}-${head}`));
rows.forEach((row, i) => row.addEventListener('click', () => {
  chosen = chosen === every[i] ? null : every[i];
  show(shown);
}));
arrows(rows, () => {});
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
            f'<button class="head" id="head-{place}-{head}"><b>head {head}</b></button>'
            for head in range(layer["gates"].shape[1])
        )
        for place, layer in enumerate(found["layers"])
    )
    # Escaped, so that no text can close the script element.
    numbers = json.dumps(data).replace("<", "\\u003c")
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<style>{_STYLE}</style></head><body>
<header><h1>{html.escape(title)}</h1>
<p>Point at a token to see what it read; click to keep it selected. With the keyboard: Tab into the
text, move with the arrow keys, Enter to keep a token. The darker a piece of text, the larger the
gates of the states that hold it, as a mean over layers and heads; click the bar of a head to see
that head alone. Plain bars are cached states, oldest first; the striped bar is the live state.
Lines in the text mark where segments begin.</p></header>
<main><div id="text" role="listbox" aria-label="tokens of the text">{text}</div>
<aside><p id="where"></p>{layers}</aside></main>
<script type="application/json" id="data">{numbers}</script><script>{_SCRIPT}</script>
</body></html>
"""


def _bytes(gates: np.ndarray) -> bytes:
    """Returns gates in units of 1/255; positive ones stay positive."""
    steps = np.round(255 * gates).astype(np.uint8)
    return np.where((gates > 0) & (steps == 0), 1, steps).astype(np.uint8).tobytes()
