// The selected trial: coordinates, scores, curves, cost, kernels and spec.
let selected = null;

function select(number, scroll = true) {
  if (!byNumber.has(number)) return;
  selected = number;
  plot.focus = number;
  drawDetail(byNumber.get(number));
  markSelected();
  history.replaceState(null, "", `#trial-${number}`);
  const panel = document.getElementById("detail");
  panel.scrollTop = 0;
  if (scroll && matchMedia("(max-width: 1020px)").matches) panel.scrollIntoView({ block: "start" });
}
function markSelected() {
  for (const { trial, node } of plot.points) {
    node.classList.toggle("selected", trial.number === selected);
    node.setAttribute("aria-pressed", trial.number === selected);
  }
  for (const row of document.querySelectorAll("#trials tbody tr")) {
    row.classList.toggle("selected", Number(row.dataset.trial) === selected);
  }
}

function drawDetail(trial) {
  const sections = [drawTitle, drawCoordinates, drawScores, drawCurves, drawCost, drawKernels, drawChoices, drawSpec].map((draw) => draw(trial));
  document.getElementById("detail").replaceChildren(...sections.flat().filter(Boolean));
}
function drawTitle(trial) {
  const badge = (text, tone = "") => el("span", { class: `badge ${tone}` }, text);
  const bad = trial.state === "failed" || trial.state === "rejected";
  return [
    el("h2", { class: "name" }, trial.name),
    el("div", { class: "badges" }, badge(`#${trial.number}`), trial.front && badge("on the front", "on"), trial.knee && badge("knee", "on"),
      trial.baseline && badge("baseline", "on"), badge(trial.state, bad ? "bad" : ""), trial.promoted && badge(trial.promoted)),
    trial.reason && el("p", { class: "notice" }, trial.reason),
    trial.note && el("p", { class: "note" }, trial.note),
  ];
}
const rowOf = (cells) => el("tr", {}, cells.map(([text, name]) => el("td", { class: name }, text)));
const headOf = (cells) => el("thead", {}, el("tr", {}, cells.map(([text, name]) => el("th", { class: name, scope: "col" }, text))));

function drawCoordinates(trial) {
  const at = trial.coordinates;
  if (!at.length) return [];
  const heads = at.map((mixer) => [`${mixer.num_layers} ${mixer.num_layers === 1 ? "layer" : "layers"}`]);
  const rows = ["memory", "bias", "retention", "update"].map((axis) => rowOf([[axis, "axis-name"], ...at.map((mixer) => [mixer[axis]])]));
  return [el("h3", {}, "Coordinates"), el("table", { class: "coordinates" }, headOf([[""], ...heads]), el("tbody", {}, rows))];
}
function drawScores(trial) {
  const present = data.columns.filter((column) => trial.values[column.key]);
  const groups = [...new Set(present.map((column) => column.group))];
  const rows = groups.flatMap((group) => [
    el("tr", {}, el("th", { colspan: 2, scope: "rowgroup", class: "group" }, group)),
    ...present.filter((column) => column.group === group).map((column) => scoreRow(column, trial.values[column.key])),
  ]);
  return rows.length ? [el("table", { class: "scores" }, el("tbody", {}, rows))] : [];
}
function scoreRow(column, entry) {
  const runs = entry.n > 1 ? `n = ${entry.n}` : "";
  const extent = [interval(entry, column.unit), runs].filter(Boolean).join(", ");
  const below = extent && el("div", { class: "spread" }, extent);
  return el("tr", {}, el("td", {}, column.label), el("td", { class: "n" }, measured(entry, column.unit), below));
}

function drawCurves(trial) {
  const charts = trial.curves.flatMap((curve) => [
    drawChart(curve.points.map((point) => [point[0], point[2]]), `${curve.task}: ${curve.score}`),
    drawChart(curve.points.map((point) => [point[0], point[1]]), `${curve.task}: training loss, nats`),
  ]).filter(Boolean);
  return charts.length ? [el("h3", {}, "Training"), el("div", { class: "charts" }, charts)] : [];
}
const tokens = (value) => `${format(value, "count")} tokens`;
function drawChart(points, title, along = tokens, up = significant) {
  points = points.filter(([x, y]) => Number.isFinite(x) && Number.isFinite(y));
  if (!points.length) return null;
  const [width, height, left, right, top, bottom] = [240, 120, 34, 234, 12, 98];
  const [lowX, highX] = [Math.min(0, points[0][0]), points[points.length - 1][0] || 1];
  let [low, high] = extentOf(points.map(([, y]) => y));
  if (low === high) { low -= 0.5; high += 0.5; }
  const x = (value) => left + ((value - lowX) / (highX - lowX)) * (right - left);
  const y = (value) => bottom - ((value - low) / (high - low)) * (bottom - top);
  const at = points.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`);
  const [endX, endY] = points[points.length - 1];
  const clear = y(endY) < top + 16 ? y(endY) + 16 : y(endY) - 8;
  const label = `${title}: ${up(points[0][1])} at the start, ${up(endY)} at ${along(endX)}`;
  return el("figure", { class: "chart" }, el("figcaption", {}, title), svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label },
    svg("g", { class: "grid" }, [low, high].map((value) => svg("line", { x1: left, x2: right, y1: y(value), y2: y(value) }))),
    [low, high].map((value) => svg("text", { x: left - 5, y: y(value) + 4, "text-anchor": "end" }, up(value, 2))),
    svg("text", { x: right, y: bottom + 16, "text-anchor": "end" }, along(endX)), svg("text", { x: left, y: bottom + 16 }, "0"),
    svg("path", { class: "curve", d: "M" + at.join("L") }), svg("circle", { class: "dot", cx: x(endX), cy: y(endY), r: 2.8 }),
    svg("text", { class: "value", x: right, y: clear, "text-anchor": "end" }, up(endY))));
}

function drawCost(trial) {
  if (!trial.cost.length) return [];
  return [el("h3", {}, "Cost and run"), el("table", {}, el("tbody", {}, trial.cost.map(([label, value]) => rowOf([[label], [value, "n"]]))))];
}
function drawKernels(trial) {
  if (!trial.kernels.length) return [];
  return [el("h3", {}, "Kernels"), el("table", {}, el("tbody", {}, trial.kernels.map((kernel) =>
    el("tr", {}, el("td", { class: "mono" }, kernel.name), el("td", {}, kernel.where ? el("b", {}, kernel.where + ": ") : null, kernel.reason)))))];
}
function drawChoices(trial) {
  if (!trial.choices.length) return [];
  return [el("h3", {}, "Drawn"), el("table", {}, el("tbody", {}, trial.choices.map(([place, value]) => rowOf([[place, "mono"], [value]]))))];
}
function drawSpec(trial) {
  return [
    trial.elsewhere && el("div", { class: "bar" }, el("h3", {}, "Spec, curves and kernels are not in this page")),
    trial.elsewhere && command(trial.elsewhere),
    trial.spec && el("div", { class: "bar" }, el("h3", {}, "Spec"), copyButton(trial.spec)),
    trial.spec && el("pre", { id: "spec", tabindex: 0 }, trial.spec),
    trial.export_command && el("div", { class: "bar" }, el("h3", {}, "Take it along")),
    trial.export_command && command(trial.export_command),
  ];
}
