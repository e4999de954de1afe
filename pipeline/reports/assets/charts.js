// Reading and zooming the charts of a report. It makes no network request and reads only the page it is in.
//
// start() binds the charts of the page. Code that replaces content of <main> calls it again; the zoom is kept. Charts
// over steps share the step under the pointer and the visible range. The axes follow pipeline/reports/charts.py.
"use strict";
const shared = { known: new WeakMap(), charts: [], range: null, at: null, pill: null };
const DRAWN = 400, SIDE = 1000, DOTS = 40, MOVED = 5;

function start(root = document) {
  shared.charts = [...root.querySelectorAll("figure.chart")].map((figure) => {
    if (!shared.known.has(figure)) shared.known.set(figure, bound(figure));
    return shared.known.get(figure);
  });
  if (!shared.charts.some((chart) => chart.zooms)) return;
  const group = root.querySelector("figure.chart").parentElement;
  if (!root.querySelector(".hint")) {
    const hint = document.createElement("p");
    hint.className = "hint";
    hint.textContent = "Drag sideways over a chart, or pinch it, to zoom; double-click for the whole run. "
      + "Keyboard: ← → + − 0.";
    group.before(hint);
  }
  if (!shared.pill) shared.pill = pill();
  if (shared.range) zoom(...shared.range);
}

function pill() {
  const made = document.createElement("div"), said = document.createElement("span");
  const button = document.createElement("button");
  made.className = "zoomed"; made.hidden = true; said.setAttribute("role", "status");
  button.type = "button"; button.textContent = "Whole run";
  button.addEventListener("click", () => zoom(null));
  made.append(said, button); document.body.append(made);
  return made;
}

function zoom(low, high) {
  const charts = shared.charts.filter((chart) => chart.zooms), end = Math.max(...charts.map((chart) => chart.high));
  const least = Math.min(end, 2);
  if (low !== null) {
    const length = Math.min(end, Math.max(least, high - low));
    low = Math.max(0, Math.min(low, end - length)); high = low + length;
  }
  shared.range = low === null || high - low > 0.999 * end ? null : [low, high];
  for (const chart of charts) chart.draw(shared.range);
  shared.pill.hidden = !shared.range;
  if (shared.range) {
    const [from, to] = shared.range.map((step) => Math.round(step).toLocaleString("en"));
    shared.pill.firstChild.textContent = shared.charts.find((chart) => chart.zooms).unit + " " + from + " – " + to;
  }
  if (shared.at !== null) for (const chart of charts) chart.show(shared.at);
}

function hide() {
  shared.at = null;
  for (const chart of shared.charts) chart.hide();
}

function floats(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const words = new Uint32Array(bytes.length / 3), packed = new Float32Array(words.buffer);
  for (let i = 0; i < words.length; i++) words[i] = bytes[3*i] << 8 | bytes[3*i+1] << 16 | bytes[3*i+2] << 24;
  return packed;
}

function steps(runs) {
  const xs = [];
  let x = 0;
  for (let i = 0; i < runs.length; i += 2) for (let n = runs[i + 1]; n > 0; n--) xs.push(x += runs[i]);
  return xs;
}

function first(xs, x) {
  let low = 0, high = xs.length;
  while (low < high) { const middle = (low + high) >> 1; if (xs[middle] < x) low = middle + 1; else high = middle; }
  return low;
}

function nearest(xs, x) {
  const after = Math.min(first(xs, x), xs.length - 1), before = Math.max(0, after - 1);
  return x - xs[before] <= xs[after] - x ? before : after;
}

// As of pipeline.reports.charts, but of what is shown alone: a part of a curve does not begin its axis at 0.
function linearAxis(low, high) {
  if (high - low <= 1e-9 * Math.max(Math.abs(low), Math.abs(high))) {
    const spread = Math.abs(high) / 10 || 1;
    low -= spread; high += spread;
  }
  const margin = 0.05 * (high - low);
  low -= margin; high += margin;
  return { low, high, ticks: ticksOf(low, high), place: (y) => (y - low) / (high - low) };
}

function ticksOf(low, high) {
  const rough = (high - low) / 5, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= rough * (1 - 1e-9));
  const ticks = [];
  for (let n = Math.ceil(low / step - 1e-9); n <= Math.floor(high / step + 1e-9); n++)
    ticks.push(Number((n * step).toPrecision(12)));
  return ticks;
}

function logAxis(low, high) {
  low /= 1.1; high *= 1.1;
  const bottom = Math.floor(Math.log10(low)), top = Math.ceil(Math.log10(high)), few = top - bottom < 4;
  let ticks = [];
  for (let p = bottom; p <= top; p++) for (const factor of few ? [1, 2, 5] : [1]) ticks.push(Number(factor + "e" + p));
  ticks = ticks.filter((tick) => low <= tick && tick <= high);
  if (ticks.length < 2) ticks = ticksOf(low, high);
  const every = few ? 1 : Math.ceil(ticks.length / 6);
  const place = (y) => Math.log(y / low) / Math.log(high / low);
  return { low, high, ticks: ticks.filter((_, i) => i % every === 0), place };
}

function label(value, percent, step) {
  if (percent) {
    const decimals = step ? Math.max(0, -Math.floor(Math.log10(step * 100) + 1e-9)) : 1;
    return (100 * value).toFixed(decimals) + "%";
  }
  const size = Math.abs(value);
  for (const [limit, divisor, suffix] of [[1e9, 1e9, "G"], [1e6, 1e6, "M"], [1e4, 1e3, "k"]])
    if (size >= limit) return Number((value / divisor).toPrecision(5)) + suffix;
  if (size >= 1000) return value.toLocaleString("en", { maximumFractionDigits: 0 });
  return String(Number(value.toPrecision(4)));
}

function read(value, percent) {
  if (!Number.isFinite(value)) return "not finite";
  if (percent) return (100 * value).toFixed(1) + "%";
  if (value !== 0 && Math.abs(value) < 1e-3) return value.toExponential(2);
  return value.toLocaleString("en", { maximumSignificantDigits: 4 });
}

// The points of a line between low and high and one beyond on either side, thinned to columns of [x, mean, low, high].
function columnsOf(line, low, high) {
  const from = Math.max(0, first(line.x, low) - 1), to = Math.min(line.x.length, first(line.x, high) + 2);
  const all = [];
  if (to - from <= DRAWN) {
    for (let i = from; i < to; i++) all.push([line.x[i], line.y[i], line.low[i], line.high[i]]);
    return all;
  }
  let part = null, at = null;
  for (let i = from; i < to; i++) {
    const here = Math.floor((line.x[i] - low) / (high - low) * DRAWN);
    if (here !== at) {
      at = here; all.push(part = { n: 0, x: 0, y: 0, count: 0, low: Infinity, high: -Infinity });
    }
    part.n++; part.x += line.x[i];
    if (Number.isFinite(line.y[i])) {
      part.count++; part.y += line.y[i];
      part.low = Math.min(part.low, line.low[i]); part.high = Math.max(part.high, line.high[i]);
    }
  }
  return all.map((p) => [p.x / p.n, p.count ? p.y / p.count : NaN, p.low, p.high]);
}

function pathsOf(line, columns, x, y) {
  const at = (c, value) => (SIDE * x(c[0])).toFixed(1) + " " + (SIDE * (1 - y(value))).toFixed(1);
  const style = "t" + line.tone + (line.fixed ? " dashed" : "");
  let html = "", run = [];
  const flush = () => {
    if (!run.length) return;
    if (run.some((c) => c[3] > c[2])) {
      const edge = [...run.map((c) => at(c, c[3])), ...run.slice().reverse().map((c) => at(c, c[2]))];
      html += '<path class="band ' + style + '" d="M' + edge.join("L") + 'Z"/>';
    }
    html += '<path class="line ' + style + '" d="M' + run.map((c) => at(c, c[1])).join("L")
      + (run.length === 1 ? "h0" : "") + '"/>';
    run = [];
  };
  for (const column of columns) if (Number.isFinite(column[1])) run.push(column); else flush();
  flush();
  const seen = columns.filter((c) => Number.isFinite(c[1]));
  if (columns.length <= DOTS && !line.fixed)
    html += '<path class="dots ' + style + '" d="' + seen.map((c) => "M" + at(c, c[1]) + "h0").join("") + '"/>';
  return html;
}

function bound(figure) {
  const data = JSON.parse(figure.querySelector("script").textContent), area = figure.querySelector(".area");
  const svg = area.querySelector("svg"), side = figure.querySelector(".y"), below = figure.querySelector(".x");
  const lines = data.lines.map((line) => {
    const y = floats(line.y);
    const [low, high] = line.low ? [floats(line.low), floats(line.high)] : [y, y];
    return { ...line, x: steps(line.x), y, low, high };
  });
  const home = { svg: svg.innerHTML, side: side.innerHTML, width: side.style.width, below: below.innerHTML };
  const moving = lines.filter((line) => !line.fixed && line.x.length), zooms = data.x !== "layer";
  const cursor = document.createElement("div"), box = document.createElement("div");
  cursor.className = "cursor"; box.className = "read"; cursor.hidden = box.hidden = true;
  area.append(cursor, box);
  const whole = { ...data.axis, ticks: [], place: data.log
    ? (value) => Math.log(value / data.axis.low) / Math.log(data.axis.high / data.axis.low)
    : (value) => (value - data.axis.low) / (data.axis.high - data.axis.low) };
  let x = [0, data.high], y = whole;

  function axisOf(low, high) {
    let least = Infinity, most = -Infinity;
    for (const line of moving) {
      for (let i = first(line.x, low); i < line.x.length && line.x[i] <= high; i++) {
        if (!Number.isFinite(line.y[i])) continue;
        least = Math.min(least, line.low[i]); most = Math.max(most, line.high[i]);
      }
    }
    if (least > most) return null;  // nothing was logged there
    return data.log && least > 0 ? logAxis(least, most) : linearAxis(least, most);
  }

  function draw(range) {
    area.classList.toggle("part", !!range);
    x = range || [0, data.high];
    if (!range) {
      y = whole;
      svg.innerHTML = home.svg; side.innerHTML = home.side; side.style.width = home.width; below.innerHTML = home.below;
      return;
    }
    const found = axisOf(...range), ticks = found ? found.ticks : [];
    y = found || whole;
    const placeX = (step) => (step - x[0]) / (x[1] - x[0]);
    const grid = ticks.map((tick) => "M0 " + (SIDE * (1 - y.place(tick))).toFixed(1) + "H" + SIDE).join("");
    const marks = data.marks.filter((step) => x[0] <= step && step <= x[1])
      .map((step) => "M" + (SIDE * placeX(step)).toFixed(1) + " 0V" + SIDE).join("");
    svg.innerHTML = '<path class="grid" d="' + grid + '"/><path class="mark" d="' + marks + '"/>'
      + lines.map((line) => pathsOf(line, columnsOf(line, ...x), placeX, y.place)).join("");
    const texts = ticks.map((tick) => label(tick, data.percent, ticks.length > 1 ? ticks[1] - ticks[0] : 0));
    side.replaceChildren(...ticks.map((tick, i) => placed("top", 1 - y.place(tick), texts[i])));
    side.style.width = Math.max(1, ...texts.map((text) => text.length)) + 1.4 + "ch";
    const steps = ticksOf(...x).filter((step) => placeX(step) < 0.95 && placeX(step) > 0.02 && Number.isInteger(step));
    below.replaceChildren(...steps.map((step) => placed("left", placeX(step), label(step))));
  }

  function placed(where, share, text) {
    const span = document.createElement("span");
    span.style[where] = 100 * share + "%"; span.textContent = text;
    return span;
  }

  function show(at) {
    if (!moving.length || !area.clientWidth) return;
    const step = moving[0].x[nearest(moving[0].x, at)], share = (step - x[0]) / (x[1] - x[0]);
    if (share < 0 || share > 1) { cursor.hidden = box.hidden = true; return; }
    cursor.style.left = 100 * share + "%"; cursor.hidden = box.hidden = false; cursor.replaceChildren();
    const title = document.createElement("b");
    title.textContent = data.x + " " + step.toLocaleString("en"); box.replaceChildren(title);
    for (const line of lines) {
      if (!line.x.length) continue;
      const i = nearest(line.x, step), value = document.createElement("span"), dot = document.createElement("i");
      const apart = line.fixed || line.x[i] === step ? "" : " (" + data.x + " " + line.x[i].toLocaleString("en") + ")";
      const range = line.high[i] > line.low[i]
        ? " (" + read(line.low[i], data.percent) + " – " + read(line.high[i], data.percent) + ")" : "";
      value.className = dot.className = "t" + line.tone;
      value.textContent = (lines.length > 1 ? line.name + " " : "") + read(line.y[i], data.percent) + range + apart;
      box.append(value);
      const height = 1 - y.place(line.y[i]);
      if (!apart && height >= 0 && height <= 1) { dot.style.top = 100 * height + "%"; cursor.append(dot); }
    }
    const room = area.clientWidth - box.offsetWidth, right = share * area.clientWidth + 10;
    const left = right <= room ? right : right - 20 - box.offsetWidth;
    box.style.left = Math.max(left, Math.min(0, room)) + "px";
  }

  const unit = data.x === "step" ? "Steps" : "Samples";
  const chart = { area, moving, zooms, unit, high: data.high, draw, show, range: () => x,
    hide: () => { cursor.hidden = box.hidden = true; } };
  pointers(chart);
  keys(chart);
  return chart;
}

function showAll(chart, at) {
  shared.at = at;
  for (const other of chart.zooms ? shared.charts.filter((one) => one.zooms) : [chart]) other.show(at);
}

// A mouse, a pen or a finger sideways marks the steps to zoom into; two fingers pinch. Up and down stays the page's.
function pointers(chart) {
  const area = chart.area, down = new Map(), brush = document.createElement("div");
  let begun = null, pinch = null;
  brush.className = "brush"; brush.hidden = true; area.append(brush);
  const stepAt = (clientX) => {
    const box = area.getBoundingClientRect(), [low, high] = chart.range();
    return low + Math.min(1, Math.max(0, (clientX - box.left) / box.width)) * (high - low);
  };
  const drop = () => { begun = null; brush.hidden = true; };
  area.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    down.set(event.pointerId, event.clientX);
    showAll(chart, stepAt(event.clientX));
    if (!chart.zooms) return;
    begun = event.clientX;
    if (down.size === 2) { drop(); pinch = [...down.values()].map(stepAt); }
  });
  area.addEventListener("pointermove", (event) => {
    if (down.has(event.pointerId)) down.set(event.pointerId, event.clientX);
    if (pinch && down.size === 2) { pinched(area, pinch, [...down.values()]); return; }
    showAll(chart, stepAt(event.clientX));
    if (begun === null || Math.abs(event.clientX - begun) < MOVED) return;
    if (brush.hidden) area.setPointerCapture(event.pointerId);
    const box = area.getBoundingClientRect();
    const [left, right] = [begun, event.clientX].map((x) => Math.min(box.width, Math.max(0, x - box.left)))
      .sort((a, b) => a - b);
    brush.hidden = false; brush.style.left = left + "px"; brush.style.width = right - left + "px";
  });
  const up = (event) => {
    const marked = event.type === "pointerup" && begun !== null && !brush.hidden;
    const range = marked ? [begun, event.clientX].map(stepAt).sort((a, b) => a - b) : null;
    down.delete(event.pointerId);
    if (down.size < 2) pinch = null;
    drop();
    if (range && range[1] > range[0]) zoom(...range);
  };
  area.addEventListener("pointerup", up);
  area.addEventListener("pointercancel", up);
  area.addEventListener("pointerleave", () => { if (!down.size) hide(); });
  area.addEventListener("dblclick", () => { if (chart.zooms) zoom(null); });
}

function pinched(area, held, fingers) {
  const box = area.getBoundingClientRect(), [a, b] = fingers.map((x) => (x - box.left) / box.width);
  if (Math.abs(a - b) < 0.02) return;
  const length = (held[1] - held[0]) / (b - a), low = held[0] - a * length;
  if (length > 0) zoom(low, low + length);
}

function keys(chart) {
  const area = chart.area;
  area.tabIndex = 0;
  area.setAttribute("role", "group");
  area.setAttribute("aria-label", area.querySelector("svg").getAttribute("aria-label"));
  area.querySelector("svg").setAttribute("aria-hidden", "true");
  area.addEventListener("focus", () => area.querySelector(".read").setAttribute("aria-live", "polite"));
  area.addEventListener("blur", () => { area.querySelector(".read").removeAttribute("aria-live"); hide(); });
  area.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !chart.moving.length) return;
    const xs = chart.moving[0].x, [low, high] = chart.range(), middle = (low + high) / 2;
    const inside = (at) => Math.min(xs.length - 1, Math.max(0, at));
    const here = shared.at === null ? null : nearest(xs, shared.at), jump = event.shiftKey ? 10 : 1;
    const to = { ArrowLeft: here === null ? nearest(xs, middle) : here - jump, ArrowRight: here === null
      ? nearest(xs, middle) : here + jump, Home: first(xs, low), End: first(xs, high + 0.5) - 1 }[event.key];
    const factor = { "+": 0.5, "=": 0.5, "-": 2, "_": 2 }[event.key];
    if (to !== undefined) {
      const at = xs[inside(to)], beyond = at < low ? at - low : Math.max(0, at - high);
      if (beyond) zoom(low + beyond, high + beyond);
      showAll(chart, at);
    } else if (factor && chart.zooms) {
      const about = shared.at === null ? middle : Math.min(high, Math.max(low, shared.at));
      zoom(about - (about - low) * factor, about + (high - about) * factor);
    } else if (event.key === "0" && chart.zooms) zoom(null);
    else if (event.key === "Escape") hide();
    else return;
    event.preventDefault();
  });
}

start();
