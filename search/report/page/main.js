// Heading, correlations and the run's own facts; then everything is put in place.
function buildHeading() {
  const { status } = data;
  document.getElementById("heading").append(...[
    el("div", { class: "line" }, el("h1", {}, data.study), el("span", { class: `status ${status.finished ? "" : "warn"}` }, status.text)),
    el("p", { class: "meta" }, data.summary),
    data.command && el("p", { class: "continue" }, status.finished ? "Run it again or add trials:" : "Continue:", command(data.command)),
    el("div", { class: "tiles" }, data.counts.map(([label, value]) => el("div", { class: "tile" }, el("b", {}, value), el("span", {}, label)))),
    el("div", { class: "line reasons" }, reasonsOf("Why candidates were rejected", data.rejected), reasonsOf("Why trials failed", data.failed)),
  ].filter(Boolean));
}
function reasonsOf(title, entries) {
  if (!entries.length) return null;
  const list = entries.map(([reason, count]) => el("li", {}, `${count} \u00d7 ${reason}`));
  return el("details", {}, el("summary", {}, title), el("ul", {}, list));
}

const signed = (value) => (value === null ? "\u2013" : value.toFixed(2).replace("-", "\u2212"));
function buildCorrelations() {
  const card = document.getElementById("correlations");
  card.append(el("h2", {}, "Does a metric rank trained models?"), el("p", { class: "note" }, data.correlation_note));
  if (!data.correlations.length) return;
  const scores = [...new Set(data.correlations.map((row) => row.score))];
  const rows = scores.flatMap((score) => [
    el("tr", {}, el("th", { colspan: 6, scope: "rowgroup", class: "group" }, `against ${score}`)),
    ...data.correlations.filter((row) => row.score === score).map(correlationRow),
  ]);
  card.append(el("div", { class: "scroll" }, el("table", { id: "correlation-table" },
    headOf([["metric"], ["rank correlation", "n"], ["95% interval", "n"], ["at equal size", "n"], ["n", "n"], ["verdict"]]), el("tbody", {}, rows))));
}
function correlationRow(row) {
  return el("tr", {}, [
    el("td", {}, row.metric), el("td", { class: "n" }, signed(row.rho)),
    el("td", { class: "n spread" }, row.low === null ? "\u2013" : `[${row.low.toFixed(2)}, ${row.high.toFixed(2)}]`.replaceAll("-", "\u2212")),
    el("td", { class: "n" }, signed(row.partial)), el("td", { class: "n" }, row.n), el("td", { class: `verdict ${row.evidence ? "" : "none"}` }, row.verdict),
  ]);
}
function facts(entries) {
  return el("dl", { class: "facts" }, entries.flatMap(([label, value]) => [el("dt", {}, label), el("dd", {}, value)]));
}
// A front stands until another joins it: the hypervolume goes up in steps.
const stepped = (points) => points.flatMap(([x, y], at) => (at ? [[x, points[at - 1][1]], [x, y]] : [[x, y]]));
function growth() {
  if (data.history.length < 2) return null;
  const timed = data.history.filter(([, seconds]) => seconds !== null).map(([, seconds, volume]) => [seconds, volume]);
  const short = (value) => (Math.abs(value) >= 1000 ? format(value, "count") : significant(value));
  const time = (seconds) => (seconds >= 7200 ? `${significant(seconds / 3600)} h` : seconds >= 120 ? `${significant(seconds / 60)} min` : `${significant(seconds)} s`);
  return el("div", { class: "charts", id: "growth" },
    drawChart(stepped(data.history.map(([count, , volume]) => [count, volume])), "Hypervolume over trials", (count) => `${count} trials`, short),
    drawChart(stepped(timed), "Hypervolume over time", time, short));
}
function buildAnalysis() {
  const card = document.getElementById("analysis");
  if (!data.analysis.length) { card.remove(); return; }
  card.append(el("h2", {}, "Which choices mattered?"));
  for (const { label, note, influences, maps } of data.analysis) {
    card.append(...[
      el("h3", {}, label), el("p", { class: "note" }, note),
      influences.length ? el("div", { class: "scroll" }, el("table", { class: "influences" },
        headOf([["drawn value"], ["share", "n"], ["p", "n"], ["n", "n"], ["best"], ["verdict"]]),
        el("tbody", {}, influences.map((row) => el("tr", {}, row.map((cell, at) => el("td", { class: at && at < 4 ? "n" : "" }, cell))))))) : "",
      ...maps.map(heatMap),
    ].filter(Boolean));
  }
}
function heatMap({ axes, rows, columns: names, cells, note }) {
  const body = rows.map((row, at) => el("tr", {}, el("th", { scope: "row" }, row), cells[at].map((cell) => (cell === null ? el("td", { class: "heat" }, "\u00b7")
    : el("td", { class: `heat heat-${cell.level} ${cell.few ? "few" : ""}` }, el("b", {}, cell.mean), el("span", {}, `best ${cell.best}, n = ${cell.n}`))))));
  return el("div", { class: "scroll" }, el("table", { class: "heatmap" },
    el("caption", {}, `${axes[0]} \u00d7 ${axes[1]}, mean over trials. ${note}`),
    el("thead", {}, el("tr", {}, el("th", {}, axes.join(" \\ ")), names.map((name) => el("th", { scope: "col" }, name)))), el("tbody", {}, body)));
}
function buildRun() {
  document.getElementById("run").append(...[
    el("h2", {}, "Hypervolume and environment"), facts(data.certainty), facts(data.hypervolume), growth(), el("h3", {}, "Environment"), facts(data.environment),
  ]);
}
function firstSelected() {
  const wanted = byNumber.get(Number(location.hash.replace("#trial-", "")));
  if (location.hash.startsWith("#trial-") && wanted) return wanted;
  return trials.find((trial) => trial.knee) ?? trials.find((trial) => trial.front && !trial.baseline) ?? trials.find((trial) => trial.front) ?? trials.find((trial) => trial.state === "trained") ?? trials[0];
}

buildHeading();
buildPlotCard();
buildTable();
buildCorrelations();
buildAnalysis();
buildRun();
const opening = firstSelected();
if (opening) select(opening.number, false);
else document.getElementById("detail").append(el("p", { class: "note" }, "No trial to show yet."));
document.documentElement.dataset.ready = "yes";
