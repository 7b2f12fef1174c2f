// The value estimate along the way, one thin line for each image and their mean; two settings in one picture.

import { el, shown, svg } from "./dom.js";

const HEIGHT = 200;
const ROOM = { left: 52, right: 40, top: 12, bottom: 30 };

// runs: [{ side: "a", title: "A", traces: [[number or null, ...], ...] }]
export function plot(runs, width) {
  const drawn = runs.filter((run) => run.traces.length);
  if (!drawn.length) return el("p", { class: "hint" }, "Without rewards there is no value to estimate.");
  const means = drawn.map((run) => ({ ...run, mean: meanOf(run.traces) }));
  const axis = valueAxis(means.flatMap((run) => run.traces.flat()).filter((v) => v !== null));
  const x = (index, count) => ROOM.left + ((width - ROOM.left - ROOM.right) * index) / Math.max(1, count - 1);
  const y = (value) => ROOM.top + (HEIGHT - ROOM.top - ROOM.bottom) * (1 - axis.share(value));
  const picture = svg("svg", { class: "plot", viewBox: `0 0 ${width} ${HEIGHT}`, width, height: HEIGHT, role: "img", "aria-label": spoken(means) });
  for (const tick of axis.ticks) {
    picture.append(
      svg("line", { class: "grid", x1: ROOM.left, x2: width - ROOM.right, y1: y(tick), y2: y(tick) }),
      svg("text", { class: "tick", x: ROOM.left - 8, y: y(tick) + 4, "text-anchor": "end" }, tick.toLocaleString("en").replace("-", "−")),
    );
  }
  picture.append(
    svg("text", { class: "tick", x: ROOM.left, y: HEIGHT - 8 }, "noise"),
    svg("text", { class: "tick", x: width - ROOM.right, y: HEIGHT - 8, "text-anchor": "end" }, "image"),
  );
  for (const run of means) {
    run.traces.forEach((trace, image) =>
      picture.append(svg("path", { class: `trace ${run.side}`, "data-image": image, d: path(trace, x, y) })),
    );
    picture.append(svg("path", { class: `mean ${run.side}`, d: path(run.mean, x, y) }));
  }
  for (const [run, place] of labelled(means, y)) {
    picture.append(svg("text", { class: `label ${run.side}`, x: width - ROOM.right + 6, y: place + 4 }, run.title));
  }
  return el("div", {}, picture, el("p", { class: "hint" }, axis.note), numbers(means));
}

function path(values, x, y) {
  let pen = "M";
  return values
    .map((value, index) => {
      if (value === null) return (pen = "M"), "";
      const point = `${pen}${x(index, values.length).toFixed(1)} ${y(value).toFixed(1)}`;
      pen = "L";
      return point;
    })
    .join("");
}

function meanOf(traces) {
  return traces[0].map((_, step) => {
    const known = traces.map((trace) => trace[step]).filter((v) => v !== null);
    return known.length ? known.reduce((sum, v) => sum + v, 0) / known.length : null;
  });
}

// Values of likelihoods span thousands early on: beyond a range of 40 the axis is logarithmic away from 0.
function valueAxis(values) {
  const low = Math.min(...values), high = Math.max(...values);
  const wide = Math.max(Math.abs(low), Math.abs(high)) > 40;
  const scale = wide ? Math.asinh : (v) => v;
  const padded = wide ? [low, high] : [low - 0.05 * (high - low || 1), high + 0.05 * (high - low || 1)];
  const [from, to] = padded.map(scale);
  const share = (value) => (to === from ? 0.5 : (scale(value) - from) / (to - from));
  const candidates = wide ? [...powers().map((v) => -v).reverse(), 0, ...powers()] : evenly(low, high);
  const ticks = candidates.filter((tick) => share(tick) >= 0 && share(tick) <= 1);
  const note = "Estimate of the final reward while the images are being made; thin: each image, thick: their mean.";
  return { share, ticks: ticks.length ? ticks : [low], note: wide ? `${note} Logarithmic away from 0.` : note };
}

function powers() {
  return [1, 10, 100, 1000, 10000, 100000, 1000000];
}

function evenly(low, high) {
  const rough = (high - low || 1) / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const ticks = [];
  for (let tick = Math.ceil(low / step); tick * step <= high; tick += 1) ticks.push(Number((tick * step).toPrecision(6)));
  return ticks;
}

// Names at the ends of the lines, apart from each other.
function labelled(means, y) {
  const places = means.map((run) => [run, y(run.mean.findLast((v) => v !== null) ?? 0)]);
  if (places.length === 2 && Math.abs(places[0][1] - places[1][1]) < 15) {
    const middle = (places[0][1] + places[1][1]) / 2;
    const upper = places[0][1] <= places[1][1] ? 0 : 1;
    places[upper][1] = middle - 8;
    places[1 - upper][1] = middle + 8;
  }
  return places;
}

function spoken(means) {
  const each = means.map((run) => `${run.title}: from ${shown(run.mean.find((v) => v !== null))} to ${shown(run.mean.findLast((v) => v !== null))}`);
  return `Mean value estimate from noise to image. ${each.join("; ")}.`;
}

function numbers(means) {
  const rows = 8;
  const at = (run, row) => run.mean[Math.round(((run.mean.length - 1) * row) / rows)];
  const head = el("tr", {}, el("th", { scope: "col" }, "Part of the way"), ...means.map((run) => el("th", { scope: "col" }, `Mean of ${run.title}`)));
  const body = Array.from({ length: rows + 1 }, (_, row) =>
    el("tr", {}, el("th", { scope: "row" }, `${Math.round((100 * row) / rows)} %`), ...means.map((run) => el("td", {}, shown(at(run, row))))),
  );
  return el("details", { class: "more" }, el("summary", {}, "As numbers"), el("table", {}, el("thead", {}, head), el("tbody", {}, ...body)));
}
