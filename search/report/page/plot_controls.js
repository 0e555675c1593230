// What surrounds the plot: tooltip, legend, choice of axes, and saving the figure.
const tooltip = el("div", { class: "tooltip", hidden: true });

function showTooltip({ trial, x, y }) {
  const keys = [...new Set([plot.x, plot.y, ...data.objectives.map((objective) => objective.key)])];
  const rows = keys.filter((key) => columns.has(key) && trial.values[key]).flatMap((key) => {
    const column = columns.get(key);
    return [el("dt", {}, column.label), el("dd", {}, measured(trial.values[key], column.unit))];
  });
  const marks = [trial.baseline && "baseline", trial.front && "front", trial.knee && "knee", trial.state !== "trained" && "not trained"];
  tooltip.replaceChildren(el("b", {}, trial.name), [`#${trial.number}`, trial.family, ...marks.filter(Boolean)].join(" \u00b7 "), el("dl", {}, rows));
  tooltip.hidden = false;
  const holder = document.getElementById("plot");
  const scale = holder.clientWidth / plot.width;
  const left = x * scale + 14 + tooltip.offsetWidth > holder.clientWidth ? x * scale - tooltip.offsetWidth - 14 : x * scale + 14;
  tooltip.style.left = `${Math.max(0, left)}px`;
  tooltip.style.top = `${Math.max(0, y * scale - tooltip.offsetHeight / 2)}px`;
}
function hideTooltip() { tooltip.hidden = true; }

// The legend is part of the figure, so that a saved figure explains itself. Returns it with the height it takes.
function makeLegend(shown, hasFront, width) {
  const present = new Set(shown.map((trial) => trial.family));
  const families = data.families.filter((family) => present.has(family));
  const others = families.splice(NUM_COLOURS - 1);
  const items = families.map((family) => [glyph(familyIndex.get(family), 5.6), family]);
  if (others.length) items.push([glyph(NUM_COLOURS - 1, 5.6), others.length === 1 ? others[0] : `${others.length} other families`]);
  const plain = (size, kind) => svg("g", { class: kind }, glyph(7, size, { d: SHAPES[0](size) }));
  const has = (test) => shown.some(test);
  if (hasFront) items.push([svg("path", { class: "front-line", d: "M-8,5H-1V-4H8" }), "front of these two axes"]);
  if (has((trial) => trial.knee)) items.push([svg("circle", { class: "ring", r: 6.5 }), "knee"]);
  if (has((trial) => trial.baseline)) items.push([plain(5.6, "baseline"), "baseline"]);
  if (has((trial) => trial.state === "trained" && !trial.front)) items.push([plain(5.6, "behind"), "trained, behind the front"]);
  if (has((trial) => trial.state !== "trained")) items.push([plain(4, "untrained"), "not trained"]);
  const layer = svg("g", { class: "legend", transform: "translate(0,0)" });
  let [x, y] = [10, 10];
  for (const [mark, text] of items) {
    const size = 15 + textWidth(text, 12.5) + 20;
    if (x > 10 && x + size > width) [x, y] = [10, y + 23];
    layer.append(svg("g", { transform: `translate(${x},${y})` }, mark, svg("text", { x: 15, y: 4.5 }, text)));
    x += size;
  }
  return { layer, height: y + 12 };
}

function axisSelect(axis) {
  const groups = new Map();
  for (const column of axisColumns()) {
    if (!groups.has(column.group)) groups.set(column.group, el("optgroup", { label: column.group }));
    groups.get(column.group).append(el("option", { value: column.key, selected: plot[axis] === column.key }, column.label));
  }
  const select = el("select", { id: `axis-${axis}` }, [...groups.values()]);
  select.addEventListener("change", () => { plot[axis] = select.value; drawPlot(); syncLog(); });
  return el("label", {}, axis === "x" ? "Across" : "Up", select);
}
function logBox(axis) {
  const box = el("input", { type: "checkbox", id: `log-${axis}` });
  box.addEventListener("change", () => { plot.log[plot[axis]] = box.checked; drawPlot(); });
  return el("label", {}, el("span", {}, box, axis === "x" ? "log across" : "log up"));
}
function syncLog() {
  for (const axis of ["x", "y"]) {
    const box = document.getElementById(`log-${axis}`);
    const values = shownTrials().map((trial) => meanOf(trial, plot[axis]));
    box.disabled = !allowsLog(values);
    box.checked = Boolean(plot.log[plot[axis]]) && !box.disabled;
  }
}
function toggle(key, text) {
  const box = el("input", { type: "checkbox", checked: plot[key] });
  box.addEventListener("change", () => { plot[key] = box.checked; drawPlot(); syncLog(); });
  return el("label", {}, el("span", {}, box, text));
}

// The figure as a file of its own: computed styles become attributes, because the page's rules stay behind.
function figureText() {
  const source = document.querySelector("#plot svg");
  const copy = source.cloneNode(true);
  const kept = ["color", "fill", "stroke", "stroke-width", "stroke-linejoin", "paint-order", "opacity", "font-size", "font-weight", "font-family"];
  const originals = source.querySelectorAll("*"), copies = copy.querySelectorAll("*");
  originals.forEach((original, index) => {
    const style = getComputedStyle(original);
    for (const property of kept) copies[index].setAttribute(property, style.getPropertyValue(property));
    if (original.matches(".halo, .hit")) copies[index].setAttribute("display", "none");
    for (const name of ["class", "tabindex", "role", "data-trial", "aria-pressed"]) copies[index].removeAttribute(name);
  });
  copy.querySelectorAll('[display="none"]').forEach((node) => node.remove());
  const edge = 16;
  const [width, height] = copy.getAttribute("viewBox").split(" ").slice(2).map((size) => Number(size) + 2 * edge);
  for (const [name, value] of Object.entries({ width, height, viewBox: `${-edge} ${-edge} ${width} ${height}` })) copy.setAttribute(name, value);
  copy.prepend(svg("rect", { x: -edge, y: -edge, width, height, fill: getComputedStyle(document.getElementById("plot-card")).backgroundColor }));
  return new XMLSerializer().serializeToString(copy);
}
function saveFigure() {
  const address = URL.createObjectURL(new Blob([figureText()], { type: "image/svg+xml" }));
  el("a", { href: address, download: `${data.file_stem}-pareto.svg` }).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}

function buildPlotCard() {
  chooseAxes();
  const card = document.getElementById("plot-card");
  const save = el("button", { type: "button", class: "push", onclick: saveFigure }, "Save figure (SVG)");
  card.append(
    el("h2", {}, "Trade-offs"),
    el("div", { class: "controls" }, axisSelect("x"), axisSelect("y"), save),
    el("div", { class: "controls" }, logBox("x"), logBox("y"), toggle("labels", "names"),
      trials.some((trial) => trial.state !== "trained") ? toggle("untrained", "untrained trials") : null),
    el("div", { class: "plot", id: "plot" }),
    el("p", { class: "note" }, data.plot_note),
  );
  if (!plot.x || !plot.y) {
    for (const row of card.querySelectorAll(".controls")) row.remove();
    document.getElementById("plot").append(el("p", { class: "note" }, "No trial has been evaluated yet."));
    return;
  }
  drawPlot();
  syncLog();
  let last = plot.width;
  new ResizeObserver(() => {
    const width = document.getElementById("plot").clientWidth;
    if (Math.abs(width - last) > 4) { last = width; drawPlot(); }
  }).observe(document.getElementById("plot"));
}
