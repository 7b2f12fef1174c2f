// The picture that a masked observation sees: pixels are drawn, hidden and brought back, by pointer or by keys.

import { getJson } from "./api.js";
import { el, freshId } from "./dom.js";

const TOOLS = { draw: "Draw", hide: "Erase", see: "Bring back" };

export class Editor {
  constructor({ model, rows, onchange }) {
    const [width, height] = model.size.split("x").map(Number);
    Object.assign(this, { model, width, height, onchange });
    this.values = new Uint8ClampedArray(width * height * 3);
    this.seen = new Uint8Array(width * height);
    this.tool = "draw";
    this.at = [0, 0];
    this.zoom = Math.max(1, Math.floor(256 / Math.max(width, height)));
    this.element = this.build(rows);
    this.paint();
  }

  build(rows) {
    const hint = freshId("editor-hint");
    this.canvas = el("canvas", {
      width: this.width * this.zoom,
      height: this.height * this.zoom,
      tabindex: 0,
      role: "application",
      "aria-label": `Picture of ${this.width} by ${this.height} pixels`,
      "aria-describedby": hint,
    });
    this.listen();
    this.told = el("p", { class: "told", "aria-live": "polite" });
    this.count = el("p", { class: "count" });
    return el(
      "div",
      { class: "editor" },
      this.canvas,
      el("div", { class: "tools" }, this.toolset(), this.inkField(), this.brushField(), this.actions(rows), this.count),
      el("p", { class: "hint", id: hint }, "Drag over pixels; or move with the arrow keys and press Space. Striped pixels are left open."),
      this.told,
    );
  }

  toolset() {
    const name = freshId("tool");
    const choices = Object.entries(TOOLS).map(([tool, text]) => {
      const id = freshId("tool");
      const radio = el("input", { type: "radio", name, id, value: tool, checked: tool === this.tool });
      radio.addEventListener("change", () => (this.tool = tool));
      return el("span", { class: "chip" }, radio, el("label", { for: id }, text));
    });
    return el("fieldset", { class: "chips" }, el("legend", {}, "Tool"), ...choices);
  }

  inkField() {
    const id = freshId("ink");
    const grey = this.model.channels === 1;
    this.ink = grey
      ? el("input", { type: "range", id, min: 0, max: 255, value: 255 })
      : el("input", { type: "color", id, value: "#ffffff" });
    return el("div", { class: "field" }, el("label", { for: id }, grey ? "Ink, black to white" : "Ink"), this.ink);
  }

  brushField() {
    const most = Math.max(1, Math.floor(Math.max(this.width, this.height) / 8));
    this.brush = el("input", { type: "range", id: freshId("brush"), min: 1, max: most, value: Math.ceil(most / 3) });
    return most === 1 ? null : el("div", { class: "field" }, el("label", { for: this.brush.id }, "Brush"), this.brush);
  }

  actions(rows) {
    const action = (text, work) => el("button", { type: "button", onclick: () => this.change(work) }, text);
    const box = el(
      "div",
      { class: "row" },
      action("All", () => this.seen.fill(1)),
      action("Upper half", () => this.seen.forEach((_, i) => (this.seen[i] = Number(i < (this.width * this.height) >> 1)))),
      action("Clear", () => (this.seen.fill(0), this.values.fill(0))),
    );
    if (!rows) return box;
    const id = freshId("row");
    this.row = el("input", { type: "number", id, min: rows.minimum, max: rows.maximum, value: rows.default, step: 1 });
    const load = el("button", { type: "button", onclick: () => this.load() }, "Take it");
    this.loadError = el("p", { class: "error", role: "alert" });
    const heldout = el(
      "div",
      { class: "field" },
      el("label", { for: id }, "Held-out image"),
      el("div", { class: "row" }, this.row, load),
      this.loadError,
    );
    return el("div", {}, heldout, box);
  }

  async load() {
    this.loadError.textContent = "";
    try {
      const answer = await getJson(`v1/models/${encodeURIComponent(this.model.id)}/heldout/${encodeURIComponent(this.row.value)}`);
      await this.take(answer.b64_json);
    } catch (error) {
      this.loadError.textContent = error.message;
    }
  }

  // A picture as base64 of a PNG; all of it is seen where nothing was.
  async take(png) {
    const image = new Image();
    image.src = `data:image/png;base64,${png}`;
    await image.decode();
    const context = this.small();
    context.drawImage(image, 0, 0);
    const { data } = context.getImageData(0, 0, this.width, this.height);
    this.change(() => {
      for (let i = 0; i < this.seen.length; i += 1) for (let c = 0; c < 3; c += 1) this.values[3 * i + c] = data[4 * i + c];
      if (!this.seen.includes(1)) this.seen.fill(1);
    });
  }

  listen() {
    let drawing = false;
    const at = (event) => {
      const box = this.canvas.getBoundingClientRect();
      const clamp = (value, size) => Math.min(size - 1, Math.max(0, Math.floor(value * size)));
      return [clamp((event.clientX - box.left) / box.width, this.width), clamp((event.clientY - box.top) / box.height, this.height)];
    };
    this.canvas.addEventListener("pointerdown", (event) => {
      drawing = true;
      this.canvas.setPointerCapture(event.pointerId);
      this.stroke(at(event));
    });
    this.canvas.addEventListener("pointermove", (event) => {
      if (!drawing) return;
      for (const part of event.getCoalescedEvents?.() ?? [event]) this.stroke(at(part));
    });
    for (const end of ["pointerup", "pointercancel"]) this.canvas.addEventListener(end, () => (drawing = false));
    for (const change of ["focus", "blur"]) this.canvas.addEventListener(change, () => this.paint());
    this.canvas.addEventListener("keydown", (event) => this.onKey(event));
  }

  onKey(event) {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const move = moves[event.key];
    if (move) {
      const clamp = (value, size) => Math.min(size - 1, Math.max(0, value));
      this.at = [clamp(this.at[0] + move[0], this.width), clamp(this.at[1] + move[1], this.height)];
      this.paint();
      this.tell();
    } else if (event.key === " " || event.key === "Enter") {
      this.stroke(this.at);
      this.tell();
    } else return;
    event.preventDefault();
  }

  tell() {
    const [x, y] = this.at;
    const state = this.seen[y * this.width + x] ? "seen" : "open";
    this.told.textContent = `row ${y + 1}, column ${x + 1}: ${state}`;
  }

  stroke([x, y]) {
    this.at = [x, y];
    const radius = this.brush ? Number(this.brush.value) - 1 : 0;
    this.change(() => {
      for (let j = Math.max(0, y - radius); j <= Math.min(this.height - 1, y + radius); j += 1)
        for (let i = Math.max(0, x - radius); i <= Math.min(this.width - 1, x + radius); i += 1) this.dab(j * this.width + i);
    });
  }

  dab(pixel) {
    this.seen[pixel] = this.tool === "hide" ? 0 : 1;
    if (this.tool !== "draw") return;
    const grey = this.ink.type === "range";
    const colour = grey ? null : parseInt(this.ink.value.slice(1), 16);
    for (let c = 0; c < 3; c += 1) this.values[3 * pixel + c] = grey ? Number(this.ink.value) : (colour >> (16 - 8 * c)) & 255;
  }

  change(work) {
    work();
    this.paint();
    this.onchange();
  }

  paint() {
    const context = this.canvas.getContext("2d");
    const z = this.zoom;
    for (let i = 0; i < this.seen.length; i += 1) {
      const x = (i % this.width) * z, y = Math.floor(i / this.width) * z;
      const [r, g, b] = this.values.subarray(3 * i, 3 * i + 3);
      context.fillStyle = this.seen[i] ? `rgb(${r} ${g} ${b})` : "#8a857b";
      context.fillRect(x, y, z, z);
      if (!this.seen[i]) stripes(context, x, y, z);
    }
    if (document.activeElement === this.canvas) {
      for (const [inset, colour] of [[1, "#000"], [2.5, "#ffd84d"]]) {
        context.strokeStyle = colour;
        context.lineWidth = 2;
        context.strokeRect(this.at[0] * z + inset, this.at[1] * z + inset, z - 2 * inset, z - 2 * inset);
      }
    }
    const count = this.seen.reduce((sum, one) => sum + one, 0);
    this.count.textContent = `${count} of ${this.seen.length} pixels seen`;
  }

  small() {
    return el("canvas", { width: this.width, height: this.height }).getContext("2d", { willReadFrequently: true });
  }

  png(colourOf) {
    const context = this.small();
    const image = context.createImageData(this.width, this.height);
    for (let i = 0; i < this.seen.length; i += 1) image.data.set([...colourOf(i), 255], 4 * i);
    context.putImageData(image, 0, 0);
    return context.canvas.toDataURL("image/png").split(",")[1];
  }

  // The parameters of the reward that this picture is.
  params() {
    return {
      observed: this.png((i) => (this.seen[i] ? this.values.subarray(3 * i, 3 * i + 3) : [0, 0, 0])),
      mask: this.png((i) => Array(3).fill(this.seen[i] ? 255 : 0)),
    };
  }
}

function stripes(context, x, y, z) {
  context.save();
  context.beginPath();
  context.rect(x, y, z, z);
  context.clip();
  context.strokeStyle = "#a8a297";
  context.lineWidth = Math.max(1, z / 10);
  for (const shift of [-z / 2, 0, z / 2]) {
    context.beginPath();
    context.moveTo(x + shift, y + z);
    context.lineTo(x + shift + z, y);
    context.stroke();
  }
  context.restore();
}
