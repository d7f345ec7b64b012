// Line charts in SVG: drawn at their real size, so that text stays readable on a phone.

const PLOT = { height: 220, left: 52, right: 10, top: 10, bottom: 26 };
const SMOOTH_PARTS = 30; // the moving average looks back over about this part of a curve

// series: [{ name, colour, points: [[x, y or null]], dashed, dots, smooth }]
function lineChart({ title, series, log = false, format = number, note }) {
  const drawn = series.filter((one) => one.points && one.points.length);
  if (!drawn.length) return null;
  const hidden = new Set();
  const plot = element("div", { class: "plot" });
  const redraw = () => drawPlot(plot, { title, log, format, series: drawn.filter((one) => !hidden.has(one)) });
  const legend = drawn.length > 1 ? element("div", { class: "legend" }, drawn.map((one) => legendKey(one, hidden, redraw))) : null;
  new ResizeObserver(redraw).observe(plot);
  return element("figure", { class: "card", style: "margin:0" },
    element("div", { class: "chart-head" }, element("h3", {}, title), note ? element("span", { class: "soft small" }, note) : null),
    legend, plot);
}

function legendKey(one, hidden, redraw) {
  const toggle = (event) => {
    if (!hidden.delete(one)) hidden.add(one);
    event.currentTarget.setAttribute("aria-pressed", String(!hidden.has(one)));
    redraw();
  };
  return element("button", { type: "button", "aria-pressed": "true", onclick: toggle },
    element("span", { class: one.dashed ? "key dashed" : "key", style: `border-color:${one.colour}` }), one.name);
}

function drawPlot(plot, { title, series, log, format }) {
  const width = plot.clientWidth;
  if (!width) return;
  const frame = { ...PLOT, width };
  const points = series.flatMap((one) => one.points).filter(([, y]) => y !== null && (!log || y > 0));
  const drawing = svg("svg", { height: frame.height, viewBox: `0 0 ${width} ${frame.height}`, role: "img", "aria-label": title });
  plot.replaceChildren(drawing);
  if (!points.length) return;
  const x = scale(extent(points, 0), [frame.left, width - frame.right], false);
  const y = scale(padded(extent(points, 1), log), [frame.height - frame.bottom, frame.top], log);
  drawAxes(drawing, frame, x, y, format);
  for (const one of series) drawSeries(drawing, one, x, y, log);
  attachCursor(plot, drawing, frame, series, x, format);
}

function extent(points, index) {
  const values = points.map((point) => point[index]);
  return [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))];
}

function padded([low, high], log) {
  if (log) return [low / 1.15, high * 1.15];
  const room = (high - low || Math.abs(high) || 1) * 0.06;
  return [low >= 0 && low - room < 0 ? 0 : low - room, high + room];
}

function scale([low, high], [from, to], log) {
  const place = log ? Math.log10 : (value) => value;
  const span = place(high) - place(low) || 1;
  const map = (value) => from + ((place(value) - place(low)) / span) * (to - from);
  map.ticks = (count) => (log ? logTicks(low, high) : niceTicks(low, high, count));
  return map;
}

function niceTicks(low, high, count) {
  if (low === high) return [low];
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((one) => one >= rough);
  const ticks = [];
  for (let tick = Math.ceil(low / step); tick * step <= high + step * 1e-9; tick++) ticks.push(Number((tick * step).toPrecision(12)));
  return ticks;
}

function logTicks(low, high) {
  const factors = high / low > 100 ? [1] : [1, 2, 5];
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
    for (const factor of factors) {
      const tick = Number((factor * 10 ** power).toPrecision(2));
      if (tick >= low && tick <= high) ticks.push(tick);
    }
  return ticks;
}

function drawAxes(drawing, frame, x, y, format) {
  const bottom = frame.height - frame.bottom;
  for (const tick of y.ticks(5)) {
    drawing.append(svg("line", { class: "grid-line", x1: frame.left, x2: frame.width - frame.right, y1: y(tick), y2: y(tick) }));
    drawing.append(svg("text", { x: frame.left - 7, y: y(tick) + 4, "text-anchor": "end" }, format(tick)));
  }
  drawing.append(svg("line", { class: "axis", x1: frame.left, x2: frame.width - frame.right, y1: bottom, y2: bottom }));
  for (const tick of x.ticks(Math.max(2, Math.floor(frame.width / 90))).filter(Number.isInteger))
    drawing.append(svg("text", { x: x(tick), y: bottom + 17, "text-anchor": "middle" }, tick.toLocaleString("en")));
}

function drawSeries(drawing, one, x, y, log) {
  const line = (points, attributes) =>
    drawing.append(svg("path", { d: path(points, x, y, log), fill: "none", stroke: one.colour, "stroke-linejoin": "round", ...attributes }));
  if (one.smooth && one.points.length > 20) {
    line(one.points, { "stroke-width": 1, opacity: 0.28 });
    line(movingAverage(one.points), { "stroke-width": 2 });
  } else line(one.points, { "stroke-width": 2, "stroke-dasharray": one.dashed ? "5 4" : null });
  if (one.dots || one.points.length === 1)
    for (const [step, value] of one.points)
      if (value !== null && (!log || value > 0)) drawing.append(svg("circle", { cx: x(step), cy: y(value), r: 3, fill: one.colour }));
}

// A gap where a value is missing.
function path(points, x, y, log) {
  let pen = "M";
  let d = "";
  for (const [step, value] of points) {
    if (value === null || (log && value <= 0)) {
      pen = "M";
      continue;
    }
    d += `${pen}${x(step).toFixed(1)} ${y(value).toFixed(1)}`;
    pen = "L";
  }
  return d;
}

function movingAverage(points) {
  const past = 1 - 1 / Math.max(2, points.length / SMOOTH_PARTS);
  let sum = 0;
  let weight = 0;
  return points.map(([step, value]) => {
    if (value === null) return [step, null];
    sum = past * sum + value;
    weight = past * weight + 1;
    return [step, sum / weight];
  });
}

function attachCursor(plot, drawing, frame, series, x, format) {
  const steps = [...new Set(series.flatMap((one) => one.points.map(([step]) => step)))].sort((a, b) => a - b);
  const cursor = svg("line", { class: "cursor", y1: frame.top, y2: frame.height - frame.bottom, visibility: "hidden" });
  const tip = element("div", { class: "tip", hidden: true });
  drawing.append(cursor);
  plot.append(tip);
  plot.onpointermove = (event) => {
    const left = event.clientX - plot.getBoundingClientRect().left;
    const step = nearest(steps, left, x);
    cursor.setAttribute("x1", x(step));
    cursor.setAttribute("x2", x(step));
    cursor.setAttribute("visibility", "visible");
    tip.replaceChildren(element("b", {}, `step ${number(step, 6)}`), ...series.map((one) => tipLine(one, step, format)).filter(Boolean));
    tip.hidden = false;
    tip.style.left = `${Math.max(0, x(step) > frame.width / 2 ? x(step) - tip.offsetWidth - 10 : x(step) + 10)}px`;
  };
  plot.onpointerleave = () => {
    cursor.setAttribute("visibility", "hidden");
    tip.hidden = true;
  };
}

function tipLine(one, step, format) {
  const point = one.points.find(([at]) => at === step);
  if (!point || point[1] === null) return null;
  return element("div", {}, element("span", { class: "key", style: `border-color:${one.colour}` }), `${one.name} ${format(point[1])}`);
}

function nearest(steps, left, x) {
  return steps.reduce((best, step) => (Math.abs(x(step) - left) < Math.abs(x(best) - left) ? step : best), steps[0]);
}
