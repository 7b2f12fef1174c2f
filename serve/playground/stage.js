// What comes back: previews as they sharpen, images with their rewards, the value's way, and the request as code.

import { curl, python } from "./code.js";
import { el, shown } from "./dom.js";
import { plot } from "./plot.js";

export class Stage {
  constructor(element, { onobserve }) {
    this.element = element;
    this.onobserve = onobserve;
    this.sides = [];
    this.figures = el("div", { class: "sides" });
    this.trace = el("section", { class: "panel", hidden: true }, el("h2", {}, "The value along the way"), el("div", { class: "chart" }));
    this.code = el("section", { class: "panel", hidden: true }, el("h2", {}, "The same request elsewhere"));
    this.welcome = el("p", { class: "welcome" }, "Nothing made yet. ", el("strong", {}, "Generate"), " makes the first images.");
    element.replaceChildren(this.welcome, this.figures, this.trace, this.code);
    new ResizeObserver(() => this.drawTrace()).observe(this.trace);
  }

  // Room for the runs that begin. runs: [{ side, title, summary, count, size }]
  begin(runs, { canObserve }) {
    this.welcome.hidden = true;
    this.trace.hidden = true;
    this.sides = runs.map((run) => new Side(run, { canObserve, onobserve: this.onobserve, onpoint: (i, on) => this.point(i, on) }));
    this.figures.classList.toggle("two", runs.length > 1);
    this.figures.replaceChildren(...this.sides.map((side) => side.element));
    return this.sides;
  }

  finished() {
    this.trace.hidden = !this.sides.some((side) => side.images.length);
    this.drawTrace();
  }

  drawTrace() {
    if (this.trace.hidden) return;
    const chart = this.trace.querySelector(".chart");
    if (chart.clientWidth === this.drawnAt && chart.dataset.of === this.drawnOf()) return;
    this.drawnAt = chart.clientWidth;
    chart.dataset.of = this.drawnOf();
    const runs = this.sides.map(({ run, images }) => ({
      side: run.side,
      title: run.title,
      traces: images.map((image) => image.trace?.value ?? image.trace?.best_reward).filter(Boolean),
    }));
    chart.replaceChildren(plot(runs, Math.max(240, chart.clientWidth)));
  }

  drawnOf() {
    return this.sides.map((side) => side.stamp).join(" ");
  }

  point(image, on) {
    for (const line of this.trace.querySelectorAll(`[data-image="${image}"]`)) line.classList.toggle("pointed", on);
  }

  // requests: [{ title, body }]
  showCode(requests, base, withKey) {
    const blocks = requests.flatMap(({ title, body }) => [
      snippet(requests.length > 1 ? `curl, ${title}` : "curl", curl(body, base, withKey)),
      snippet(requests.length > 1 ? `Python, ${title}` : "Python", python(body, base, withKey)),
    ]);
    const note = withKey
      ? el("p", { class: "hint" }, "The key is read from the environment: export MFM_RAY_API_KEY=... first.")
      : null;
    this.code.hidden = false;
    this.code.replaceChildren(el("h2", {}, "The same request elsewhere"), ...(note ? [note] : []), ...blocks);
  }
}

function snippet(title, text) {
  const code = el("pre", { tabindex: 0, "aria-label": `${title}, the request` }, el("code", {}, text));
  const told = el("span", { class: "told", "aria-live": "polite" });
  const copy = el("button", { type: "button", class: "quiet", "aria-label": `Copy ${title}` }, "Copy");
  copy.addEventListener("click", async (event) => {
    event.preventDefault();
    try {
      await navigator.clipboard.writeText(text);
      told.textContent = "Copied";
    } catch {
      selectAll(code); // no clipboard here: the text is ready for the keys
      told.textContent = "Selected: press Ctrl+C";
    }
  });
  return el("details", { class: "snippet", "data-kind": title }, el("summary", {}, title), el("div", { class: "row" }, copy, told), code);
}

function selectAll(node) {
  const range = document.createRange();
  range.selectNodeContents(node);
  getSelection().removeAllRanges();
  getSelection().addRange(range);
}

// The images of one setting.
class Side {
  constructor(run, { canObserve, onobserve, onpoint }) {
    Object.assign(this, { run, canObserve, onobserve, images: [], stamp: `${run.title}${performance.now()}` });
    this.status = el("p", { class: "status", role: "status" }, "Waiting for the server");
    this.problem = el("p", { class: "notice", role: "alert", hidden: true });
    this.bar = el("progress", { max: 1, value: 0, "aria-label": `Progress of ${run.title}` });
    this.cells = Array.from({ length: run.count }, (_, index) => this.cell(index, onpoint));
    this.element = el(
      "section",
      { class: `side ${run.side}`, "aria-label": run.heading },
      el("h2", {}, el("span", { class: "mark", "aria-hidden": "true" }, run.mark), run.summary),
      this.bar,
      this.status,
      this.problem,
      el("div", { class: run.count === 1 ? "images one" : "images" }, ...this.cells.map((cell) => cell.figure)),
    );
  }

  cell(index, onpoint) {
    const [width, height] = this.run.size;
    const picture = el("img", { alt: `Image ${index + 1}, not made yet`, src: blank(width, height), width, height, class: "waiting" });
    const caption = el("figcaption", {});
    const figure = el("figure", {}, picture, caption);
    for (const [event, on] of [["pointerenter", true], ["pointerleave", false]]) figure.addEventListener(event, () => onpoint(index, on));
    return { figure, picture, caption };
  }

  async preview(event) {
    const { picture, caption } = this.cells[event.image_index];
    picture.src = `data:image/png;base64,${event.b64_json}`;
    picture.alt = `Image ${event.image_index + 1}, preview`;
    picture.className = "preview";
    caption.textContent = "preview";
    this.bar.value = event.step / event.num_steps;
    this.status.textContent = `Step ${event.step} of ${event.num_steps}`;
    await picture.decode();
  }

  complete(event) {
    const { figure, picture, caption } = this.cells[event.index];
    this.images[event.index] = event;
    picture.src = `data:image/png;base64,${event.b64_json}`;
    picture.alt = `Image ${event.index + 1}${event.reward === null ? "" : `, reward ${shown(event.reward)}`}`;
    picture.className = "";
    const parts = Object.entries(event.rewards);
    caption.replaceChildren(el("span", { class: "reward" }, event.reward === null ? "unsteered" : shown(event.reward)));
    if (parts.length > 1 || (parts.length === 1 && parts[0][1] !== event.reward))
      caption.append(el("span", { class: "parts" }, parts.map(([name, value]) => `${name.replaceAll("_", " ")} ${shown(value)}`).join(", ")));
    if (this.canObserve)
      figure.append(el("button", { type: "button", class: "quiet", "aria-label": `Observe image ${event.index + 1}`, onclick: () => this.onobserve(event.b64_json) }, "Observe"));
  }

  done(seconds) {
    const rewards = this.images.map((image) => image.reward).filter((reward) => reward !== null);
    const mean = rewards.length ? ` · mean reward ${shown(rewards.reduce((sum, r) => sum + r, 0) / rewards.length)}` : "";
    const calls = this.images[0].nfe.toLocaleString("en", { maximumFractionDigits: 1 });
    this.bar.value = 1;
    this.status.textContent = `${seconds.toFixed(2)} s${mean} · ${calls} network calls an image`;
    this.element.classList.add("done");
    this.warn(this.images[0].steering.dropped?.length ? `left out, since they failed: ${this.images[0].steering.dropped.join(", ")}` : "");
  }

  warn(message) {
    this.problem.textContent = message;
    this.problem.hidden = message === "";
  }

  stopped(message) {
    this.status.textContent = message;
    this.element.classList.add("done");
    for (const { figure, picture } of this.cells) if (picture.className === "waiting") figure.remove();
  }
}

// Nothing, in an image's proportions.
function blank(width, height) {
  return `data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 ${width} ${height}'/>`;
}
