// The wishes of a setting: rewards with weights and parameters, made from what GET /v1/rewards says.

import { el, freshId } from "./dom.js";
import { Editor } from "./editor.js";
import { field, numberInput, numberOf, selectInput } from "./fields.js";

const DRAWN = ["observed", "mask"];

export class RewardList {
  constructor({ rewards, model, onchange }) {
    Object.assign(this, { rewards, model, onchange, cards: [] });
    this.list = el("div", { class: "cards" });
    this.add = el("button", { type: "button", class: "quiet add", onclick: () => this.insert() }, "Add a reward");
    this.element = el("fieldset", { class: "group" }, el("legend", {}, "Towards"), this.list, this.add);
    this.number();
  }

  insert(name = this.rewards[0]?.id) {
    const card = new RewardCard({ list: this, name });
    this.cards.push(card);
    this.list.append(card.element);
    this.number();
    this.onchange();
    return card;
  }

  remove(card) {
    this.cards = this.cards.filter((other) => other !== card);
    card.element.remove();
    this.number();
    this.onchange();
    this.add.focus();
  }

  // A refusal names a reward by its place.
  number() {
    this.cards.forEach((card, index) => card.place(index));
    this.list.classList.toggle("empty", this.cards.length === 0);
    this.add.disabled = this.rewards.length === 0;
  }

  // The picture that observation cards see; a card is made where there is none.
  async observe(png) {
    const card = this.cards.find((one) => one.editor) ?? this.insert(this.rewards.find(isDrawn).id);
    await card.observe(png);
    card.element.scrollIntoView({ block: "nearest", behavior: "smooth" });
  }

  canObserve() {
    return this.rewards.some(isDrawn);
  }

  values() {
    return this.cards.map((card) => card.value());
  }

  copyTo(other) {
    for (const card of this.cards) card.copyTo(other.insert(card.name));
  }
}

function isDrawn(reward) {
  return DRAWN.every((key) => key in reward.parameters);
}

class RewardCard {
  constructor({ list, name }) {
    this.list = list;
    const named = list.rewards.map((reward) => [reward.id, reward.id.replaceAll("_", " ")]);
    this.choice = selectInput(named, name);
    this.choice.addEventListener("change", () => this.choose(this.choice.value));
    this.weight = numberInput({ value: 1 });
    this.head = el(
      "div",
      { class: "card-head" },
      field({ label: "Reward", param: "", input: this.choice }),
      field({ label: "Weight", param: "", input: this.weight }),
      el("button", { type: "button", class: "quiet remove", "aria-label": "Remove this reward", onclick: () => list.remove(this) }, "×"),
    );
    this.doc = el("p", { class: "hint" });
    this.body = el("div", { class: "params" });
    this.element = el("section", { class: "card" }, this.head, this.doc, this.body);
    this.choose(name);
  }

  get name() {
    return this.reward.id;
  }

  // Its name, with what is not its default: "brightness (target 0.2) × 0.5".
  title() {
    const own = Object.entries(this.inputs).filter(([, { inputs, wrapper, allowed }]) => {
      return inputs.length === 1 && !wrapper.hidden && inputs[0].value !== String(allowed.default ?? "");
    });
    const said = own.map(([key, { inputs }]) => `${key} ${inputs[0].value}`).join(", ");
    const weight = this.weight.value;
    const times = weight === "" || Number(weight) === 1 ? "" : ` × ${weight}`;
    return `${this.name.replaceAll("_", " ")}${said ? ` (${said})` : ""}${times}`;
  }

  choose(name) {
    this.reward = this.list.rewards.find((reward) => reward.id === name);
    this.doc.textContent = this.reward.description;
    this.inputs = {};
    this.editor = this.drawn = null;
    const drawn = isDrawn(this.reward);
    const keys = Object.keys(this.reward.parameters).filter((key) => !(drawn && DRAWN.includes(key)));
    this.body.replaceChildren(...keys.map((key) => this.parameter(key)));
    if (drawn) this.body.prepend(...this.observation());
    if (this.index !== undefined) this.place(this.index);
    this.list.onchange();
  }

  parameter(key) {
    const allowed = this.reward.parameters[key];
    const label = key.replaceAll("_", " ");
    if (allowed.type.includes("array")) return this.vector(key, label, allowed);
    const whole = allowed.type.includes("integer");
    const input = allowed.enum
      ? selectInput(allowed.enum, allowed.default)
      : allowed.type.includes("string")
        ? el("input", { type: "text", value: allowed.default ?? "" })
        : numberInput({
            value: allowed.default,
            placeholder: "none",
            minimum: allowed.minimum ?? allowed.exclusive_minimum,
            maximum: allowed.maximum,
            whole,
          });
    const wide = allowed.description.length > 60;
    this.inputs[key] = { wrapper: field({ label, hint: hintOf(allowed), param: "", input, wide }), inputs: [input], allowed };
    return this.inputs[key].wrapper;
  }

  vector(key, label, allowed) {
    const names = this.list.model.class_names;
    const inputs = allowed.default.map((value) => numberInput({ value, minimum: allowed.minimum, maximum: allowed.maximum }));
    const cells = inputs.map((input, index) => {
      input.id = freshId("entry");
      input.setAttribute("aria-describedby", `${input.id}-error`);
      const name = names.length === inputs.length ? names[index] : String(index);
      return el("div", { class: "entry" }, el("label", { for: input.id }, name), input, el("p", { class: "error", id: `${input.id}-error` }));
    });
    const hint = el("p", { class: "hint" }, hintOf(allowed));
    const wrapper = el("fieldset", { class: "vector wide" }, el("legend", {}, label), el("div", { class: "entries" }, ...cells), hint);
    this.inputs[key] = { wrapper, inputs, allowed };
    return wrapper;
  }

  // Either one half of a held-out image, or a picture that is drawn here.
  observation() {
    const name = freshId("observation");
    const radio = (value, text, checked) => {
      const id = freshId("observation");
      const input = el("input", { type: "radio", name, id, value, checked, onchange: () => this.draw(value === "drawn") });
      return el("span", { class: "chip" }, input, el("label", { for: id }, text));
    };
    this.modes = el(
      "fieldset",
      { class: "chips wide" },
      el("legend", {}, "What is seen"),
      radio("heldout", "Half of an image", true),
      radio("drawn", "What I draw", false),
    );
    const rows = this.reward.parameters.row;
    this.editor = new Editor({ model: this.list.model, rows, onchange: () => this.list.onchange() });
    this.drawn = el("div", { class: "wide", hidden: true }, this.editor.element, el("p", { class: "error", id: freshId("drawn-error") }));
    this.editor.canvas.setAttribute("aria-describedby", `${this.editor.canvas.getAttribute("aria-describedby")} ${this.drawn.lastChild.id}`);
    return [this.modes, this.drawn];
  }

  draw(on) {
    this.modes.querySelector(`[value=${on ? "drawn" : "heldout"}]`).checked = true;
    this.drawn.hidden = !on;
    for (const key of ["half", "row"]) if (this.inputs[key]) this.inputs[key].wrapper.hidden = on;
    if (on && !this.editor.seen.includes(1)) this.editor.load();
    this.list.onchange();
  }

  async observe(png) {
    await this.editor.take(png);
    this.draw(true);
  }

  isDrawing() {
    return this.drawn !== null && !this.drawn.hidden;
  }

  place(index) {
    this.index = index;
    const prefix = `steering.rewards[${index}]`;
    this.element.setAttribute("aria-label", `Reward ${index + 1}`);
    this.choice.dataset.param = `${prefix}.name`;
    this.weight.dataset.param = `${prefix}.weight`;
    for (const [key, { inputs }] of Object.entries(this.inputs)) {
      inputs.forEach((input, i) => (input.dataset.param = `${prefix}.params.${key}${inputs.length > 1 ? `[${i}]` : ""}`));
      if (inputs.length > 1) inputs[0].dataset.param = `${prefix}.params.${key}`;
    }
    if (this.editor) this.editor.canvas.dataset.param = `${prefix}.params.mask`;
  }

  // As a request says it: only what is not the default.
  value() {
    const params = {};
    for (const [key, { inputs, wrapper, allowed }] of Object.entries(this.inputs)) {
      if (wrapper.hidden) continue;
      const value = inputs.length > 1 ? inputs.map((input) => numberOf(input) ?? 0) : plain(inputs[0]);
      if (value !== undefined && JSON.stringify(value) !== JSON.stringify(allowed.default)) params[key] = value;
    }
    if (this.isDrawing()) Object.assign(params, this.editor.params());
    const weight = numberOf(this.weight) ?? 1;
    return { name: this.name, ...(weight === 1 ? {} : { weight }), ...(Object.keys(params).length ? { params } : {}) };
  }

  copyTo(other) {
    other.weight.value = this.weight.value;
    for (const [key, { inputs }] of Object.entries(this.inputs)) inputs.forEach((input, i) => (other.inputs[key].inputs[i].value = input.value));
    if (!this.editor) return;
    other.editor.values.set(this.editor.values);
    other.editor.seen.set(this.editor.seen);
    other.editor.paint();
    if (this.isDrawing()) other.draw(true);
  }
}

function plain(input) {
  return input.type === "number" ? numberOf(input) : input.value;
}

function hintOf(allowed) {
  return allowed.enum ? allowed.description : `${allowed.description} (${allowed.expected})`;
}
