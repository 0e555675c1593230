// The scatter of trials over two chosen columns, with the front of those two.
const plot = { x: null, y: null, log: {}, labels: true, untrained: true, width: 0, points: [], focus: null };

function axisColumns() {
  return data.columns.filter((column) => trials.some((trial) => meanOf(trial, column.key) !== null));
}
function chooseAxes() {
  const available = new Set(axisColumns().map((column) => column.key));
  const objectives = data.objectives.map((objective) => objective.key).filter((key) => available.has(key));
  const size = ["state_bytes", "parameters", "non_embedding_parameters"].find((key) => available.has(key));
  plot.y = objectives[0] ?? [...available][0] ?? null;
  const rest = objectives.slice(1);
  plot.x = rest.find((key) => columns.get(key).log) ?? rest[0] ?? size ?? [...available].find((key) => key !== plot.y) ?? plot.y;
}
function shownTrials() {
  return trials.filter((trial) => (plot.untrained || trial.state === "trained")
    && meanOf(trial, plot.x) !== null && meanOf(trial, plot.y) !== null);
}
const signOf = (column) => (column.direction === "maximize" ? 1 : -1);

// Trained trials that no other beats on both axes, from the least to the greatest x.
function frontOfAxes(shown) {
  const [cx, cy] = [columns.get(plot.x), columns.get(plot.y)];
  if (!cx.direction || !cy.direction || plot.x === plot.y) return [];
  if (!shown.every((trial) => trial.state === "trained")) return []; // untrained ones would seem to lie beyond it
  const gain = (trial) => [signOf(cx) * meanOf(trial, plot.x), signOf(cy) * meanOf(trial, plot.y)];
  const trained = shown.filter((trial) => trial.state === "trained").map((trial) => ({ trial, gain: gain(trial) }));
  trained.sort((a, b) => b.gain[0] - a.gain[0] || b.gain[1] - a.gain[1]);
  const front = [];
  let best = -Infinity;
  for (const entry of trained) {
    if (entry.gain[1] > best) { front.push(entry.trial); best = entry.gain[1]; }
  }
  return signOf(cx) > 0 ? front.reverse() : front;
}

// The staircase that bounds what the front dominates, as corners from the least to the greatest x.
function frontCorners(front, sx, sy, frame) {
  const at = front.map((trial) => [sx.at(meanOf(trial, plot.x)), sy.at(meanOf(trial, plot.y))]);
  const up = { x: signOf(columns.get(plot.x)) > 0, y: signOf(columns.get(plot.y)) > 0 };
  const worse = { x: up.x ? frame.left : frame.right, y: up.y ? frame.bottom : frame.top };
  const first = up.x ? [worse.x, at[0][1]] : [at[0][0], worse.y];
  const end = at[at.length - 1];
  const last = up.x ? [end[0], worse.y] : [worse.x, end[1]];
  const corners = [first, at[0]];
  for (let index = 1; index < at.length; index += 1) {
    const [a, b] = [at[index - 1], at[index]];
    corners.push(up.x ? [a[0], b[1]] : [b[0], a[1]], b);
  }
  return { corners: [...corners, last], worse };
}
function drawFront({ corners, worse }) {
  const line = "M" + corners.map((corner) => corner.join()).join("L");
  return [svg("path", { class: "area", d: `${line}L${worse.x},${worse.y}Z` }), svg("path", { class: "front-line", d: line })];
}

function drawAxes(sx, sy, frame) {
  const grid = svg("g", { class: "grid" }), axis = svg("g", { class: "axis" });
  for (const { value, text } of sx.ticks) {
    const x = sx.at(value);
    grid.append(svg("line", { x1: x, x2: x, y1: frame.top, y2: frame.bottom }));
    axis.append(svg("text", { class: "tick", x, y: frame.bottom + 18, "text-anchor": "middle" }, text));
  }
  for (const { value, text } of sy.ticks) {
    const y = sy.at(value);
    grid.append(svg("line", { x1: frame.left, x2: frame.right, y1: y, y2: y }));
    axis.append(svg("text", { class: "tick", x: frame.left - 9, y: y + 4, "text-anchor": "end" }, text));
  }
  axis.append(svg("line", { x1: frame.left, x2: frame.right, y1: frame.bottom, y2: frame.bottom }));
  const title = (column) => [column.label, svg("tspan", { class: "axis-better", dx: 8 }, better(column))];
  axis.append(
    svg("text", { class: "axis-title", x: frame.right, y: frame.bottom + 40, "text-anchor": "end" }, title(columns.get(plot.x))),
    svg("text", { class: "axis-title", x: 2, y: 15 }, title(columns.get(plot.y))),
  );
  return [grid, axis];
}

// Intervals may reach beyond the frame, which is fitted to the means: they end at its edge.
function drawWhiskers({ trial, x, y }, sx, sy, frame) {
  const marks = [];
  const colour = colourOf(familyOf(trial));
  const [ex, ey] = [trial.values[plot.x], trial.values[plot.y]];
  const line = (x1, y1, x2, y2) => marks.push(svg("line", { class: "whisker", stroke: colour, x1, y1, x2, y2 }));
  const usable = (key, entry) => Number.isFinite(entry.low) && Number.isFinite(entry.high) && (!plot.log[key] || entry.low > 0);
  const across = (value) => Math.min(frame.right, Math.max(frame.left, sx.at(value)));
  const up = (value) => Math.min(frame.bottom, Math.max(frame.top, sy.at(value)));
  if (usable(plot.x, ex)) line(across(ex.low), y, across(ex.high), y);
  if (usable(plot.y, ey)) line(x, up(ey.low), x, up(ey.high));
  return marks;
}

function describe(trial) {
  const score = (key) => `${columns.get(key).label} ${measured(trial.values[key], columns.get(key).unit)}`;
  const marks = [trial.baseline && "baseline", trial.front && "on the front", trial.knee && "knee"].filter(Boolean);
  return [`${trial.name} (trial ${trial.number}, ${trial.family})`, ...marks, score(plot.x), score(plot.y)].join(", ");
}
function drawPoint(point) {
  const { trial, x, y } = point;
  const trained = trial.state === "trained";
  const classes = ["point", trained ? "" : "untrained", trained && !trial.front ? "behind" : "", trial.baseline ? "baseline" : ""];
  const index = familyOf(trial);
  const radius = trained ? 5.6 : 3.4;
  const mark = glyph(index, radius);
  const node = svg("g", {
    class: classes.filter(Boolean).join(" "), transform: `translate(${x.toFixed(1)},${y.toFixed(1)})`,
    role: "button", tabindex: -1, "aria-label": describe(trial), "data-trial": trial.number,
  }, svg("title", {}, trial.name), svg("circle", { class: "halo", r: radius + 5.5 }),
  trial.knee ? svg("circle", { class: "ring", r: radius + 4 }) : null, mark, svg("circle", { class: "hit", r: trained ? 10 : 6 }));
  node.addEventListener("mouseenter", () => showTooltip(point));
  node.addEventListener("mouseleave", hideTooltip);
  node.addEventListener("focus", () => { plot.focus = trial.number; showTooltip(point); });
  node.addEventListener("blur", hideTooltip);
  node.addEventListener("click", () => select(trial.number));
  node.addEventListener("keydown", (event) => onPointKey(event, point));
  point.node = node;
  return node;
}
function onPointKey(event, point) {
  const order = plot.points;
  const at = order.indexOf(point);
  const to = { ArrowRight: at + 1, ArrowUp: at + 1, ArrowLeft: at - 1, ArrowDown: at - 1, Home: 0, End: order.length - 1 }[event.key];
  if (event.key === "Enter" || event.key === " ") { event.preventDefault(); select(point.trial.number); }
  if (to === undefined || !order[to]) return;
  event.preventDefault();
  rove(order[to]);
  order[to].node.focus();
}
function rove(point) {
  for (const other of plot.points) other.node.setAttribute("tabindex", other === point ? 0 : -1);
}

// Names beside the points that matter, where there is room for them.
function drawLabels(frame, corners) {
  const rank = (trial) => (trial.knee ? 0 : trial.baseline ? 1 : trial.front ? 2 : 3);
  const wanted = plot.points.filter(({ trial }) => rank(trial) < 3).sort((a, b) => rank(a.trial) - rank(b.trial));
  const taken = plot.points.filter(({ trial }) => trial.state === "trained").map(({ x, y }) => [x - 6, y - 6, x + 6, y + 6]);
  const lines = corners.slice(1).map(([x, y], index) => [Math.min(x, corners[index][0]) - 2, Math.min(y, corners[index][1]) - 2,
    Math.max(x, corners[index][0]) + 2, Math.max(y, corners[index][1]) + 2]);
  const layer = svg("g", { class: "labels" });
  for (const { trial, x, y } of plot.labels ? wanted : []) {
    const name = trial.name.length > 26 ? trial.name.slice(0, 25) + "\u2026" : trial.name;
    const text = trial.knee ? `${name} (knee)` : name;
    const width = textWidth(text, 12, trial.knee ? 650 : 400) + 4;
    const away = trial.knee ? 15 : 10;
    const places = [[away, 4, "start"], [-away, 4, "end"], [0, -12, "middle"], [0, 21, "middle"], [9, -9, "start"], [9, 17, "start"], [-9, -9, "end"], [-9, 17, "end"]];
    const boxAt = ([dx, dy, anchor]) => {
      const left = x + dx - (anchor === "end" ? width : anchor === "middle" ? width / 2 : 0);
      return [left, y + dy - 11, left + width, y + dy + 3];
    };
    const inside = (box) => box[0] >= frame.left + 2 && box[2] <= frame.right + frame.margin && box[1] >= frame.top - 6 && box[3] <= frame.bottom - 2;
    const free = places.filter((place) => inside(boxAt(place)) && !taken.some((other) => overlaps(boxAt(place), other)));
    const best = free.find((place) => !lines.some((line) => overlaps(boxAt(place), line))) ?? free[0];
    if (!best) continue;
    taken.push(boxAt(best));
    const tone = trial.knee ? "strong" : trial.baseline ? "" : "quiet";
    layer.append(svg("text", { class: `label ${tone}`, x: x + best[0], y: y + best[1], "text-anchor": best[2] }, text));
  }
  return layer;
}
const overlaps = (a, b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];

function drawPlot() {
  const holder = document.getElementById("plot");
  const width = Math.max(300, holder.clientWidth || 800);
  const height = Math.round(Math.min(580, Math.max(340, width * 0.62)));
  plot.width = width;
  const frame = { left: 62, right: width - 16, top: 34, bottom: height - 52, margin: 10 };
  const shown = plot.x && plot.y ? shownTrials() : [];
  hideTooltip();
  if (!shown.length) {
    holder.replaceChildren(svg("svg", { viewBox: `0 0 ${width} 120`, role: "img" },
      svg("text", { class: "empty", x: width / 2, y: 60, "text-anchor": "middle" }, "No trial has both of these figures yet.")), tooltip);
    plot.points = [];
    return;
  }
  const [xs, ys] = [plot.x, plot.y].map((key) => shown.map((trial) => meanOf(trial, key)));
  const sx = makeScale(xs, isLog(plot.x, xs), [frame.left, frame.right], columns.get(plot.x).unit);
  const sy = makeScale(ys, isLog(plot.y, ys), [frame.bottom, frame.top], columns.get(plot.y).unit);
  const front = frontOfAxes(shown);
  const staircase = front.length ? frontCorners(front, sx, sy, frame) : null;
  plot.points = shown.map((trial) => ({ trial, x: sx.at(meanOf(trial, plot.x)), y: sy.at(meanOf(trial, plot.y)) }));
  plot.points.sort((a, b) => a.x - b.x || a.y - b.y);
  const depth = ({ trial }) => (trial.state === "trained") + 2 * trial.front + 4 * trial.baseline + 8 * trial.knee;
  const stacked = [...plot.points].sort((a, b) => depth(a) - depth(b));
  const legend = makeLegend(shown, front.length > 0, width);
  legend.layer.setAttribute("transform", `translate(0,${height + 8})`);
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height + 8 + legend.height}`, role: "group", "aria-label": caption() },
    ...drawAxes(sx, sy, frame), ...(staircase ? drawFront(staircase) : []),
    ...stacked.filter(({ trial }) => trial.state === "trained").flatMap((point) => drawWhiskers(point, sx, sy, frame)),
    drawLabels(frame, staircase ? staircase.corners : []), ...stacked.map(drawPoint), legend.layer);
  holder.replaceChildren(picture, tooltip);
  rove(plot.points.find(({ trial }) => trial.number === (plot.focus ?? selected)) ?? plot.points[0]);
  markSelected();
}
function isLog(key, values) {
  if (plot.log[key] === undefined) plot.log[key] = prefersLog(columns.get(key), values);
  return plot.log[key] && allowsLog(values);
}
const caption = () => `${columns.get(plot.y).label} against ${columns.get(plot.x).label} of each trial`;
