// What moves on the page. Everything that comes from the run arrives as JSON and is set as text, never as markup.
const run = JSON.parse(document.getElementById("run").textContent);
const narrow = () => window.innerWidth < 640;

const make = (name, text, attributes = {}) => {
  const element = document.createElement(name);
  if (text !== null && text !== undefined) element.textContent = text;
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
};
const percent = (share) => (share >= 0.1 ? (100 * share).toFixed(0) : (100 * share).toPrecision(2)) + " %";
const lines = (text) => text.replaceAll("\n", " ⏎ ");
const visible = (piece) => piece.replaceAll(" ", "·").replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll("\r", "␍");

// -- charts ---------------------------------------------------------------------------------------------------------
const axes = { domainColor: "var(--rule)", tickColor: "var(--rule)", gridColor: "var(--rule)", gridOpacity: 0.6,
  labelColor: "var(--soft)", titleColor: "var(--soft)", titleFontWeight: "normal", labelLimit: 120 };
const look = { background: "transparent", font: "system-ui, sans-serif", axis: axes, view: { stroke: null },
  legend: { symbolOpacity: 1, labelColor: "var(--ink)", titleColor: "var(--soft)", titleFontWeight: "normal", labelLimit: 260 } };

const filled = (spec, chosen) => !chosen.x ? structuredClone(spec) : JSON.parse(JSON.stringify(spec), (_, value) =>
  typeof value === "string" ? value.replace("@xtitle", chosen.xtitle).replace("@ytitle", chosen.ytitle)
    .replace("@x", chosen.x).replace("@y", chosen.y) : value);

const unpacked = ({ names, rows }) =>
  ({ values: rows.map((row) => Object.fromEntries(names.map((name, place) => [name, row[place]]))) });

async function draw(place, chart, chosen = {}) {
  const spec = filled(chart.spec, chosen);
  for (const part of spec.layer ?? [spec]) part.data = unpacked(part.data);
  if (chosen.x) { // a reference run has no seconds: they are those of another machine
    spec.layer = spec.layer.filter((layer) => layer.data.values.some((row) => row[chosen.x] !== null));
    const drawn = new Set(spec.layer.flatMap((layer) => layer.data.values.map((row) => row.of)));
    for (const { encoding: { color: { scale } } } of spec.layer) {
      scale.range = scale.range.filter((_, place) => drawn.has(scale.domain[place]));
      scale.domain = scale.domain.filter((name) => drawn.has(name));
    }
  }
  if (narrow() && chart.choices) spec.height = 240;
  const config = narrow() ? { ...look, legend: { ...look.legend, columns: 2 }, axis: { ...axes, tickCount: 5 } } : look;
  await window.vegaEmbed(place, spec, { mode: "vega-lite", renderer: "svg", actions: false, config });
  place.dataset.drawn = "yes";
}

function choices(place, chart) {
  const chosen = {};
  const redraw = () => draw(place, chart, chosen);
  for (const [axis, names] of Object.entries(chart.choices)) {
    const box = make("fieldset");
    box.append(make("legend", axis === "x" ? "over" : "in"));
    Object.entries(names).forEach(([field, title], number) => {
      const label = make("label"), button = make("input", null, { type: "radio", name: `${place.id}-${axis}`, value: field });
      const choose = () => { chosen[axis] = field; chosen[`${axis}title`] = title; };
      if (number === 0) { button.checked = true; choose(); }
      button.addEventListener("change", () => { choose(); redraw(); });
      label.append(button, ` ${title}`);
      box.append(label);
    });
    place.before(box);
  }
  return redraw();
}

const drawings = Object.entries(run.charts).map(([name, chart]) => {
  const place = document.getElementById(`chart-${name}`);
  return chart.choices ? choices(place, chart) : draw(place, chart);
});

// -- colours of experts -----------------------------------------------------------------------------------------------
const colour = (element, expert, experts) => {
  const turn = experts <= 12 ? (360 * expert) / experts : 137.508 * expert;
  element.style.setProperty("--hue", (turn + 20) % 360);
  element.style.setProperty("--shift", experts <= 12 ? "0%" : `${4 * ((expert % 3) - 1)}%`);
};

// -- the atlas ----------------------------------------------------------------------------------------------------------
function page(entry) {
  const cards = document.getElementById("experts");
  cards.replaceChildren(...entry.experts.map((expert) => {
    const card = make("article"), title = make("h4"), bar = make("div", null, { class: "bar", "aria-hidden": "true" });
    title.append(make("span", `expert ${expert.expert}`), make("span", `${percent(expert.share)} of the work`, { class: "soft" }));
    const fill = make("i");
    fill.style.width = `${Math.min(50 * expert.share * entry.experts.length, 100)}%`;
    bar.append(fill);
    card.append(title, bar);
    const pieces = make("div");
    for (const token of expert.tokens) {
      const piece = make("span", visible(token.text), { class: "piece" });
      piece.append(make("small", ` ×${token.lift.toFixed(1)}`));
      piece.title = `${token.count} times, ${percent(token.share)} of all it was read`;
      pieces.append(piece);
    }
    if (!expert.tokens.length) pieces.append(make("span", "no token comes here more often than others", { class: "soft" }));
    card.append(pieces);
    for (const example of expert.examples) {
      const line = make("p", null, { class: "example" });
      line.append(`…${lines(example.before)}`, make("mark", visible(example.token)), `${lines(example.after)}…`);
      card.append(line);
    }
    return card;
  }));
  const place = document.getElementById("similarity");
  place.hidden = !entry.chart;
  return entry.chart ? draw(document.getElementById("chart-similarity"), entry.chart) : Promise.resolve();
}

if (run.atlas.length) {
  const picker = document.getElementById("atlas-layer");
  run.atlas.forEach((entry, number) => picker.append(new Option(`layer ${entry.layer}`, number)));
  picker.addEventListener("change", () => page(run.atlas[picker.value]));
  drawings.push(page(run.atlas[0]));
}

// -- the text -------------------------------------------------------------------------------------------------------------
const box = document.getElementById("reading");
if (box) {
  const texts = document.getElementById("text"), layers = document.getElementById("layer");
  const keys = document.getElementById("keys"), detail = document.getElementById("detail");
  let text, layer, selected = -1, lit = null;

  const label = (place) => {
    const parts = [visible(text.pieces[place])];
    if (text.layers.length) parts.push(`expert ${text.experts[layer][place].join(", ")}`);
    if (text.logprobs[place] !== null) parts.push(`probability ${percent(Math.exp(text.logprobs[place]))}`);
    return parts.join(", ");
  };
  const paint = () => {
    [...box.children].forEach((token, place) => {
      token.setAttribute("aria-label", label(place));
      if (!text.layers.length) return;
      const expert = text.experts[layer][place][0];
      colour(token, expert, run.experts);
      token.dataset.expert = expert;
      token.classList.toggle("lit", lit !== null && text.experts[layer][place].includes(lit));
    });
    box.classList.toggle("faded", lit !== null);
    [...keys.children].forEach((key) => key.setAttribute("aria-pressed", String(lit === Number(key.dataset.expert))));
    tell();
  };
  const turn = () => { // to another text or layer, whose experts get their keys
    const used = text.layers.length ? [...new Set(text.experts[layer].map((chosen) => chosen[0]))].sort((a, b) => a - b) : [];
    keys.replaceChildren(...used.map((expert) => {
      const key = make("button", `expert ${expert}`, { type: "button", "data-expert": expert });
      colour(key, expert, run.experts);
      key.addEventListener("click", () => { lit = lit === expert ? null : expert; paint(); });
      return key;
    }));
    paint();
  };
  const table = (caption, head, rows) => {
    const made = make("table"), top = make("tr");
    made.append(make("caption", caption, { class: "soft" }));
    head.forEach((name) => top.append(make("th", name, { scope: "col" })));
    made.append(top);
    for (const row of rows) {
      const line = make("tr");
      row.forEach((cell) => line.append(make("td", cell)));
      made.append(line);
    }
    return made;
  };
  const tell = () => {
    if (selected < 0) return detail.replaceChildren(make("p", "Point at a token, or go to the text with Tab and use the arrow keys.", { class: "soft" }));
    const side = make("div", null, { class: "side" }), title = make("p");
    title.append("token ", make("span", visible(text.pieces[selected]), { class: "piece" }));
    const logprob = text.logprobs[selected];
    title.append(logprob === null ? "begins the text" : `had a probability of ${percent(Math.exp(logprob))}: ${(-logprob).toFixed(2)} nats`);
    if (text.layers.length) {
      const rows = text.experts[layer][selected].map((expert, place) =>
        [expert, text.gates[layer][selected][place].toFixed(3), text.scores[layer][selected][place].toFixed(3)]);
      side.append(table(`its experts in layer ${text.layers[layer]}`, ["expert", "gate", "score"], rows));
    }
    if (text.alternatives[selected].length)
      side.append(table("what was expected here", ["token", "probability"],
        text.alternatives[selected].map(([piece, share]) => [visible(piece), percent(share)])));
    detail.replaceChildren(title, side);
  };
  const select = (place, scroll = false) => {
    if (place < 0 || place >= box.children.length) return;
    if (selected >= 0) box.children[selected].setAttribute("aria-selected", "false");
    selected = place;
    const token = box.children[place];
    token.setAttribute("aria-selected", "true");
    box.setAttribute("aria-activedescendant", token.id);
    detail.setAttribute("aria-live", scroll ? "polite" : "off"); // a pointer passes over many tokens
    if (scroll) token.scrollIntoView({ block: "nearest" });
    tell();
  };
  const show = () => {
    text = run.texts[texts.value];
    selected = -1;
    lit = null;
    const before = layers.selectedIndex < 0 ? text.layers.length - 1 : Math.min(layers.selectedIndex, text.layers.length - 1);
    layers.replaceChildren(...text.layers.map((number, index) => new Option(`layer ${number}`, index)));
    layers.selectedIndex = layer = before;
    box.replaceChildren(...text.pieces.map((piece, place) => {
      const mark = piece.includes("\n") ? piece.replaceAll("\n", "⏎\n") : piece;
      const written = place >= text.pieces.length - text.made;
      return make("span", mark, { role: "option", id: `token-${place}`, class: written ? "token written" : "token", "aria-selected": "false" });
    }));
    box.removeAttribute("aria-activedescendant");
    document.getElementById("cut").textContent = text.cut ? "The rest of this text is left out." : "";
    turn();
  };
  const place = (event) => [...box.children].indexOf(event.target.closest(".token"));
  box.addEventListener("pointerover", (event) => select(place(event)));
  box.addEventListener("click", (event) => select(place(event)));
  box.addEventListener("keydown", (event) => {
    const moves = { ArrowRight: selected + 1, ArrowLeft: selected - 1, ArrowDown: selected + 10, ArrowUp: selected - 10,
      Home: 0, End: box.children.length - 1 };
    if (!(event.key in moves)) return;
    event.preventDefault();
    select(Math.min(Math.max(moves[event.key], 0), box.children.length - 1), true);
  });
  run.texts.forEach((entry, number) => texts.append(new Option(entry.name, number)));
  texts.addEventListener("change", show);
  layers.addEventListener("change", () => { layer = layers.selectedIndex; turn(); });
  show();
}

Promise.all(drawings).then(() => { document.body.dataset.ready = "yes"; });
