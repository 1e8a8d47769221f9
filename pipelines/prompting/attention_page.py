"""Attention maps as one HTML file that needs nothing else: every layer and head, by token, under the mouse."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence

import numpy as np

from pipelines.prompting.attention_maps import AttentionMaps
from pipelines.prompting.token_cuts import visible

_NAMES = {
    "decoder": "each token to those before it",
    "encoder": "each token to all tokens",
    "cross": "the target's tokens to the source's",
}

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Attention of __TITLE__</title>
<style>
:root { --ink: #222; --dim: #667; --line: #d5d9e0; --blue: 42, 111, 187; }
body { font: 14px/1.5 system-ui, sans-serif; color: var(--ink); margin: 1.5rem auto; max-width: 76rem;
  padding: 0 1rem; }
h1 { font-size: 1.15rem; margin: 0 0 .2rem; }
p { color: var(--dim); margin: .2rem 0 1rem; }
nav button { font: inherit; padding: .25rem .7rem; margin-right: .3rem; border: 1px solid var(--line); background: #fff;
  border-radius: 4px; cursor: pointer; }
nav button[aria-pressed=true] { background: rgb(var(--blue)); color: #fff; }
main { display: grid; grid-template-columns: minmax(14rem, 26rem) 1fr; gap: 1.5rem; align-items: start; }
#heads { display: grid; gap: 3px; margin-top: .8rem; }
#heads canvas { width: 100%; aspect-ratio: 1; border: 1px solid var(--line); image-rendering: pixelated;
  cursor: pointer; }
#heads canvas.on { outline: 2px solid #d1495b; }
#map { width: 100%; max-width: 36rem; border: 1px solid var(--line); image-rendering: pixelated; }
.tokens span { font-family: ui-monospace, monospace; padding: .1rem .2rem; border-radius: 3px; display: inline-block;
  white-space: pre; cursor: default; }
.tokens span.at { outline: 2px solid #d1495b; }
h2 { font-size: .85rem; margin: .9rem 0 .2rem; color: var(--dim); font-weight: 600; }
#says { min-height: 1.5em; font-variant-numeric: tabular-nums; }
</style>
</head>
<body>
<h1>Attention of __TITLE__</h1>
<p>Pick a head on the left (rows are layers). Point at a token to see what it is made of there; darker is more.</p>
<nav id="kinds"></nav>
<main>
<div id="heads"></div>
<div>
<h2 id="which"></h2>
<div id="queries" class="tokens"></div>
<h2>looks at</h2>
<div id="keys" class="tokens"></div>
<p id="says"></p>
<canvas id="map"></canvas>
</div>
</main>
<script id="data" type="application/json">__DATA__</script>
<script>
"use strict";
const maps = JSON.parse(document.getElementById("data").textContent);
for (const m of maps) m.bytes = Uint8Array.from(atob(m.weights), c => c.charCodeAt(0));
const state = {map: 0, layer: 0, head: 0, query: 0};
const $ = id => document.getElementById(id);
const weight = (m, layer, head, q, k) =>
  m.bytes[((layer * m.heads + head) * m.queries.length + q) * m.keys.length + k] / 255;
function paint(canvas, m, layer, head) {
  canvas.width = m.keys.length; canvas.height = m.queries.length;
  const context = canvas.getContext("2d"), image = context.createImageData(canvas.width, canvas.height);
  for (let q = 0, at = 0; q < m.queries.length; q++)
    for (let k = 0; k < m.keys.length; k++, at += 4) {
      const w = weight(m, layer, head, q, k);
      image.data.set([255 - 213 * w, 255 - 144 * w, 255 - 68 * w, 255], at);
    }
  context.putImageData(image, 0, 0);
}
function row(box, tokens, mark) {
  box.replaceChildren(...tokens.map((token, index) => {
    const span = document.createElement("span");
    span.textContent = token;
    if (mark) { span.onmouseenter = () => { state.query = index; look(); }; }
    return span;
  }));
}
function look() {
  const m = maps[state.map], q = state.query;
  [...$("queries").children].forEach((span, index) => span.classList.toggle("at", index === q));
  const shares = m.keys.map((_, k) => weight(m, state.layer, state.head, q, k));
  [...$("keys").children].forEach((span, k) => {
    span.style.background = `rgba(var(--blue), ${shares[k]})`;
    span.style.color = shares[k] > .55 ? "#fff" : "";
    span.title = shares[k].toFixed(3);
  });
  const best = shares.map((s, k) => [s, k]).sort((a, b) => b[0] - a[0]).slice(0, 5).filter(b => b[0] > .005);
  const parts = best.map(([s, k]) => `${m.keys[k]} ${(100 * s).toFixed(0)}%`);
  $("says").textContent = m.queries[q] + "  →  " + parts.join(",  ");
}
function show() {
  const m = maps[state.map];
  state.query = Math.min(state.query, m.queries.length - 1);
  [...$("kinds").children].forEach((b, index) => b.setAttribute("aria-pressed", index === state.map));
  $("heads").style.gridTemplateColumns = `repeat(${m.heads}, 1fr)`;
  $("heads").replaceChildren(...Array.from({length: m.layers * m.heads}, (_, n) => {
    const canvas = document.createElement("canvas"), layer = Math.floor(n / m.heads), head = n % m.heads;
    paint(canvas, m, layer, head);
    canvas.title = `layer ${layer}, head ${head}`;
    canvas.className = layer === state.layer && head === state.head ? "on" : "";
    canvas.onclick = () => { state.layer = layer; state.head = head; show(); };
    return canvas;
  }));
  $("which").textContent = `${m.name}: layer ${state.layer}, head ${state.head}`;
  row($("queries"), m.queries, true);
  row($("keys"), m.keys, false);
  paint($("map"), m, state.layer, state.head);
  $("map").onmousemove = e => {
    state.query = Math.min(m.queries.length - 1, Math.floor(e.offsetY / $("map").clientHeight * m.queries.length));
    look();
  };
  look();
}
maps.forEach((m, index) => {
  const button = document.createElement("button");
  button.textContent = m.kind;
  button.onclick = () => { state.map = index; show(); };
  $("kinds").append(button);
});
state.query = maps[0].queries.length - 1;
show();
</script>
</body>
</html>
"""


def attention_page(maps: Sequence[AttentionMaps], title: str) -> str:
    """The page. Weights are rounded to 256 steps; `title` and tokens are shown as text, whatever they hold."""
    data = [
        {
            "kind": one.kind,
            "name": _NAMES[one.kind],
            "layers": one.weights_LHQK.shape[0],
            "heads": one.weights_LHQK.shape[1],
            "queries": [visible(token) for token in one.queries],
            "keys": [visible(token) for token in one.keys],
            "weights": base64.b64encode(np.rint(one.weights_LHQK * 255).astype(np.uint8).tobytes()).decode(),
        }
        for one in maps
    ]
    # `</script>` in a token would end the element that holds the data.
    safe = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    return _PAGE.replace("__TITLE__", html.escape(title)).replace("__DATA__", safe)
