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

function drawLegend(shown, hasFront) {
  const item = (mark, text) => el("span", {}, svg("svg", { viewBox: "-9 -9 18 18", "aria-hidden": "true" }, mark), text);
  const present = new Set(shown.map((trial) => trial.family));
  const families = data.families.filter((family) => present.has(family));
  const items = families.slice(0, NUM_COLOURS - 1).map((family) => item(glyph(familyIndex.get(family), 5.6), family));
  const others = families.slice(NUM_COLOURS - 1);
  if (others.length) items.push(item(glyph(NUM_COLOURS - 1, 5.6), others.length === 1 ? others[0] : `${others.length} other families`));
  const circle = SHAPES[0];
  const has = (test) => shown.some(test);
  if (hasFront) items.push(item(svg("path", { class: "front-line", d: "M-9,5H-2V-4H9" }), "front of these two axes"));
  if (has((trial) => trial.knee)) items.push(item(svg("circle", { class: "ring", r: 6.5 }), "knee"));
  if (has((trial) => trial.baseline)) items.push(item(svg("g", { class: "point baseline" }, glyph(7, 5.6, { d: circle(5.6) })), "baseline"));
  if (has((trial) => trial.state === "trained" && !trial.front)) {
    items.push(item(svg("g", { class: "point behind" }, glyph(7, 5.6, { d: circle(5.6) })), "trained, behind the front"));
  }
  if (has((trial) => trial.state !== "trained")) {
    items.push(item(svg("g", { class: "point untrained" }, glyph(7, 4, { d: circle(4), stroke: colourOf(7) })), "not trained"));
  }
  document.getElementById("legend").replaceChildren(...items);
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
  const kept = ["fill", "stroke", "stroke-width", "stroke-linejoin", "paint-order", "opacity", "font-size", "font-weight", "font-family"];
  const originals = source.querySelectorAll("*"), copies = copy.querySelectorAll("*");
  originals.forEach((original, index) => {
    const style = getComputedStyle(original);
    for (const property of kept) copies[index].setAttribute(property, style.getPropertyValue(property));
    for (const name of ["class", "tabindex", "role", "data-trial"]) copies[index].removeAttribute(name);
  });
  copy.querySelectorAll('[r][stroke-width="0px"]').forEach((node) => node.remove());
  const [, , width, height] = copy.getAttribute("viewBox").split(" ");
  copy.setAttribute("width", width);
  copy.setAttribute("height", height);
  copy.prepend(svg("rect", { width, height, fill: getComputedStyle(document.getElementById("plot-card")).backgroundColor }));
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
    el("div", { class: "legend", id: "legend" }),
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
