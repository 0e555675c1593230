// The table of trials: sorting by any column, filtering by text and by state.
const table = { sort: null, descending: false, text: "", state: "all" };

function tableColumns() {
  const fixed = [
    { key: "#", label: "#", numeric: true, value: (trial) => trial.number, cell: (trial) => trial.number },
    { key: "name", label: "trial", value: (trial) => trial.name, cell: nameCell },
    { key: "mark", label: "mark", value: markText, cell: markText },
    { key: "state", label: "state", value: (trial) => trial.state, cell: (trial) => trial.state },
    { key: "family", label: "family", value: (trial) => trial.family, cell: (trial) => trial.family },
  ];
  const figures = axisColumns().map((column) => ({
    key: column.key, label: column.short || column.label, numeric: true, title: [column.label, better(column)].filter(Boolean).join(", "),
    direction: column.direction, value: (trial) => meanOf(trial, column.key), cell: (trial) => measured(trial.values[column.key], column.unit),
  }));
  return [...fixed, ...figures];
}
function nameCell(trial) {
  const pick = el("button", { type: "button", class: "pick", title: trial.name, "aria-label": `Show ${trial.name}` }, swatch(trial), trial.name);
  return pick;
}
function markText(trial) {
  return [trial.knee && "knee", trial.front && !trial.knee && "front", trial.baseline && "baseline"].filter(Boolean).join(", ");
}
function searchText(trial) {
  const at = trial.coordinates.map((row) => Object.values(row).join(" ")).join(" ");
  return `#${trial.number} ${trial.name} ${trial.family} ${trial.state} ${markText(trial)} ${trial.reason || ""} ${trial.promoted || ""} ${at}`.toLowerCase();
}
const STATES = {
  all: ["all trials", () => true], trained: ["trained", (trial) => trial.state === "trained"], front: ["on the front", (trial) => trial.front],
  baseline: ["baselines", (trial) => trial.baseline], evaluated: ["not trained", (trial) => trial.state === "evaluated"],
  failed: ["failed", (trial) => trial.state === "failed"],
};

function visibleTrials(shown) {
  const words = table.text.toLowerCase().split(/\s+/).filter(Boolean);
  const found = trials.filter((trial) => STATES[table.state][1](trial) && words.every((word) => searchText(trial).includes(word)));
  const column = shown.find((candidate) => candidate.key === table.sort);
  if (!column) return found;
  const missing = (value) => value === null || value === "";
  return found.sort((a, b) => {
    const [left, right] = [column.value(a), column.value(b)];
    if (missing(left) || missing(right)) return missing(left) - missing(right) || a.number - b.number;
    const order = column.numeric ? left - right : String(left).localeCompare(String(right));
    return (table.descending ? -order : order) || a.number - b.number;
  });
}
function sortBy(column) {
  const first = column.direction === "maximize";
  if (table.sort === column.key) table.descending = !table.descending;
  else Object.assign(table, { sort: column.key, descending: first });
  drawTable();
}
function headerCell(column) {
  const sorted = table.sort === column.key;
  const arrow = sorted ? (table.descending ? "\u2193" : "\u2191") : "";
  return el("th", { class: column.numeric ? "n" : "", scope: "col", "aria-sort": sorted ? (table.descending ? "descending" : "ascending") : "none" },
    el("button", { type: "button", title: column.title || column.label, "data-sort": column.key, onclick: () => sortBy(column) },
      column.label, el("span", { class: "arrow", "aria-hidden": "true" }, arrow)));
}
function drawTable() {
  const shown = tableColumns();
  const rows = visibleTrials(shown);
  const body = rows.map((trial) => el("tr", { "data-trial": trial.number, onclick: () => select(trial.number) },
    shown.map((column) => el("td", { class: column.numeric ? "n" : "" }, column.cell(trial)))));
  const focused = document.activeElement?.dataset?.sort;
  document.getElementById("table").replaceChildren(el("table", {}, el("thead", {}, el("tr", {}, shown.map(headerCell))), el("tbody", {}, body)));
  document.getElementById("table-count").textContent = rows.length === trials.length ? `${rows.length} trials` : `${rows.length} of ${trials.length} trials`;
  if (focused) [...document.querySelectorAll("#table [data-sort]")].find((node) => node.dataset.sort === focused)?.focus();
  markSelected();
}
function buildTable() {
  const filter = el("input", { type: "search", id: "filter", placeholder: "Filter: name, family, coordinate", "aria-label": "Filter trials" });
  filter.addEventListener("input", () => { table.text = filter.value; drawTable(); });
  const options = Object.entries(STATES).filter(([, [, test]]) => trials.some(test)).map(([key, [label]]) => el("option", { value: key }, label));
  const state = el("select", { "aria-label": "Which trials" }, options);
  state.addEventListener("change", () => { table.state = state.value; drawTable(); });
  document.getElementById("trials").append(
    el("div", { class: "table-top" }, el("h2", {}, "Trials"), filter, state, el("span", { class: "faint push", id: "table-count" })),
    data.trials_note ? el("p", { class: "note" }, data.trials_note) : "",
    el("div", { class: "trials", id: "table", tabindex: 0, role: "region", "aria-label": "Table of trials" }),
  );
  drawTable();
}
