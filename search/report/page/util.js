// Data, elements and number formats. Text reaches the page as text nodes only, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const columns = new Map(data.columns.map((column) => [column.key, column]));
const trials = data.trials;
const byNumber = new Map(trials.map((trial) => [trial.number, trial]));

function fill(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : String(value));
  }
  for (const child of children.flat()) {
    if (child === null || child === undefined || child === false) continue;
    node.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return node;
}
const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

function significant(value, digits = 3) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-3) return value.toExponential(digits - 1).replace("e+", "e").replace("-", "\u2212");
  const text = size >= 1000 ? value.toFixed(0) : value.toPrecision(digits);
  return text.replace(/^-/, "\u2212");
}
function scaled(value, step, units) {
  let index = 0;
  while (Math.abs(value) >= step && index < units.length - 1) { value /= step; index += 1; }
  const text = Number.isInteger(value) ? String(value) : value.toPrecision(3).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "");
  return text + units[index];
}
function format(value, unit) {
  if (value === null || value === undefined) return "\u2013";
  if (unit === "bytes") return scaled(value, 1024, [" B", " KiB", " MiB", " GiB", " TiB"]);
  if (unit === "count") return scaled(value, 1000, ["", "k", "M", "G", "T"]);
  return significant(value) + (unit ? " " + unit : "");
}
// A mean with as many decimals as its spread has meaning in: 0.9123 +/- 0.0121.
function measured(entry, unit) {
  if (!entry || entry.mean === null) return "\u2013";
  if (!entry.spread) return format(entry.mean, unit);
  if (unit === "bytes" || unit === "count") return `${format(entry.mean, unit)} \u00b1 ${format(entry.spread, unit)}`;
  const decimals = Math.min(6, Math.max(0, 1 - Math.floor(Math.log10(entry.spread))));
  const text = `${entry.mean.toFixed(decimals)} \u00b1 ${entry.spread.toFixed(decimals)}`;
  return text.replace(/^-/, "\u2212") + (unit ? " " + unit : "");
}
function interval(entry, unit) {
  if (!entry || entry.low === null || entry.low === undefined) return "";
  const shown = unit === "bytes" || unit === "count" ? unit : ""; // the mean beside it carries any other
  return `[${format(entry.low, shown)}, ${format(entry.high, shown)}]`;
}
const meanOf = (trial, key) => {
  const entry = trial.values[key];
  return entry && Number.isFinite(entry.mean) ? entry.mean : null;
};
const better = (column) => ({ maximize: "\u2191 higher is better", minimize: "\u2193 lower is better" })[column.direction] || "";

function copyButton(text) {
  const button = el("button", { type: "button" }, "Copy");
  button.addEventListener("click", async () => {
    try { await navigator.clipboard.writeText(text); button.textContent = "Copied"; }
    catch { button.textContent = "Select and copy by hand"; }
    setTimeout(() => { button.textContent = "Copy"; }, 1600);
  });
  return button;
}
const command = (text) => el("span", { class: "command" }, el("code", {}, text), copyButton(text));

// One colour and one shape per family, in the order the data names them; the last is shared by all that follow.
const NUM_COLOURS = 8;
const familyIndex = new Map(data.families.map((family, index) => [family, Math.min(index, NUM_COLOURS - 1)]));
const familyOf = (trial) => familyIndex.get(trial.family) ?? NUM_COLOURS - 1;
const colourOf = (index) => `var(--c${index})`;
const SHAPES = [
  (r) => `M${r},0A${r},${r} 0 1 1 ${-r},0A${r},${r} 0 1 1 ${r},0Z`,
  (r) => polygon([[-1, -1], [1, -1], [1, 1], [-1, 1]], r * 0.9),
  (r) => polygon([[0, -1.18], [1.08, 0.78], [-1.08, 0.78]], r * 1.06),
  (r) => polygon([[0, -1], [1, 0], [0, 1], [-1, 0]], r * 1.28),
  (r) => polygon([[0, 1.18], [1.08, -0.78], [-1.08, -0.78]], r * 1.06),
  (r) => polygon([...Array(10).keys()].map((i) => around(i / 10, i % 2 ? 0.5 : 1)), r * 1.42),
  (r) => polygon([...Array(6).keys()].map((i) => around(i / 6, 1)), r * 1.12),
  (r) => polygon([[-1, -0.36], [-0.36, -0.36], [-0.36, -1], [0.36, -1], [0.36, -0.36], [1, -0.36],
    [1, 0.36], [0.36, 0.36], [0.36, 1], [-0.36, 1], [-0.36, 0.36], [-1, 0.36]], r * 1.15),
];
function around(turn, radius) { return [radius * Math.sin(2 * Math.PI * turn), -radius * Math.cos(2 * Math.PI * turn)]; }
function polygon(corners, r) { return "M" + corners.map(([x, y]) => `${(x * r).toFixed(2)},${(y * r).toFixed(2)}`).join("L") + "Z"; }
function glyph(index, r, extra = {}) {
  return svg("path", { class: "mark", d: SHAPES[index](r), fill: colourOf(index), color: colourOf(index), ...extra });
}
function swatch(trial) {
  const index = familyOf(trial);
  return svg("svg", { class: "swatch", viewBox: "-8 -8 16 16", "aria-hidden": "true" }, glyph(index, 5));
}
