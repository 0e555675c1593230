// How wide a text will be, in pixels, before it is drawn.
const pen = document.createElement("canvas").getContext("2d");
function textWidth(text, size, weight = 400) {
  pen.font = `${weight} ${size}px ${getComputedStyle(document.body).fontFamily}`;
  return pen.measureText(text).width;
}

// Axes: linear and logarithmic scales with readable ticks. Bytes are counted in powers of two.
function extentOf(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) { low = Math.min(low, value); high = Math.max(high, value); }
  return [low, high];
}
const allowsLog = (values) => values.length > 0 && values.every((value) => value > 0);
function prefersLog(column, values) {
  if (!column.log || !allowsLog(values)) return false;
  const [low, high] = extentOf(values);
  return high / low >= 4;
}
function makeScale(values, log, range, unit) {
  let [low, high] = values.length ? extentOf(values) : [0, 1];
  const forward = log ? Math.log : (value) => value;
  if (low === high) {
    const margin = log ? 2 : Math.abs(low) * 0.1 || 1;
    [low, high] = log ? [low / margin, high * margin] : [low - margin, high + margin];
  }
  let [from, to] = [forward(low), forward(high)];
  const margin = (to - from) * 0.09;
  [from, to] = [from - margin, to + margin];
  const at = (value) => range[0] + ((forward(value) - from) / (to - from)) * (range[1] - range[0]);
  const bounds = log ? [Math.exp(from), Math.exp(to)] : [from, to];
  const room = range[1] > range[0] ? 95 : 58;  // pixels a tick needs, across and up
  const wanted = Math.max(3, Math.round(Math.abs(range[1] - range[0]) / room));
  return { at, ticks: log ? logTicks(bounds, wanted, unit) : linearTicks(bounds, wanted, unit) };
}
function linearTicks([low, high], wanted, unit) {
  const rough = (high - low) / wanted;
  const base = unit === "bytes" && rough >= 1 ? 2 : 10;
  const power = Math.pow(base, Math.floor(Math.log(rough) / Math.log(base)));
  const steps = base === 2 ? [1, 2] : [1, 2, 2.5, 5, 10];
  const step = steps.map((factor) => factor * power).find((size) => size >= rough * 0.999);
  const decimals = Math.max(0, -Math.floor(Math.log10(step) + 1e-9) + (String(step / power) === "2.5" ? 1 : 0));
  const ticks = [];
  for (let index = Math.ceil(low / step); index * step <= high; index += 1) {
    const value = index * step;
    const text = unit === "bytes" || unit === "count" ? format(value, unit) : value.toFixed(Math.min(decimals, 6));
    ticks.push({ value, text: text.replace(/^-/, "\u2212") });
  }
  return ticks;
}
function logTicks([low, high], wanted, unit) {
  const base = unit === "bytes" ? 2 : 10;
  const all = [];
  for (let power = Math.floor(Math.log(low) / Math.log(base)); Math.pow(base, power) <= high; power += 1) {
    for (const factor of base === 2 ? [1] : [1, 2, 5]) {
      const value = factor * Math.pow(base, power);
      if (value >= low && value <= high) all.push({ value, factor, power });
    }
  }
  if (all.length < 2) return linearTicks([low, high], wanted, unit);
  let kept = all;
  if (base === 10 && all.length > wanted * 1.5 && all.some((tick) => tick.factor === 1)) kept = all.filter((tick) => tick.factor === 1);
  const every = Math.ceil(kept.length / (wanted * 1.5));
  kept = kept.filter((tick) => (base === 2 || every > 1 ? mod(Math.round(tick.power), every) === 0 : true));
  return kept.map(({ value }) => ({ value, text: format(value, unit) }));
}
const mod = (value, by) => ((value % by) + by) % by;
