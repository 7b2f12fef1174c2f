// One way to steer: rewards, method, its arguments, steps. Two of them are compared.

import { el } from "./dom.js";
import { field, numberInput, numberOf, selectInput } from "./fields.js";
import { RewardList } from "./rewards.js";

const LABELS = { guidance_scale: "Scale", num_draws: "Draws", num_particles: "Particles" };
const HINTS = {
  guidance_scale: "how hard it is steered; 1 is the tilted law",
  num_draws: "posterior draws of each step",
};

export class Setting {
  constructor({ title, rewards, methods, limits, model, onchange }) {
    Object.assign(this, { title, methods, limits, onchange });
    this.list = new RewardList({ rewards, model, onchange });
    this.byDefault = el("option", { value: "" });
    this.method = selectInput(methods.map((m) => [m.id, m.id.replaceAll("_", " ")]), "");
    this.method.prepend(this.byDefault);
    this.method.value = "";
    this.method.addEventListener("change", () => this.chooseMethod());
    this.doc = el("p", { class: "hint" });
    this.main = el("div", { class: "params" });
    this.steps = numberInput({ placeholder: 50, minimum: 1, maximum: limits.steps, whole: true });
    this.dynamics = selectInput([["", ""], "ode", "sde"], "");
    this.further = el("div", { class: "params" });
    this.more = el("details", { class: "more" }, el("summary", {}, "More of the method"), this.further);
    const how = el("fieldset", { class: "group" }, el("legend", {}, "How"), this.methodField(), this.doc, this.main, this.more);
    this.element = el("div", { class: "setting" }, this.list.element, how);
    this.chooseMethod();
  }

  methodField() {
    return field({ label: "Method", param: "steering.method", input: this.method, wide: true });
  }

  // What the server takes when none is chosen: the first method, or none without rewards.
  usual() {
    return this.list.cards.length ? this.methods[0].id : "none";
  }

  // The method that answers.
  actual() {
    return this.methods.find((method) => method.id === (this.method.value || this.usual()));
  }

  chooseMethod() {
    const method = this.actual();
    this.byDefault.textContent = `default: ${this.usual().replaceAll("_", " ")}`;
    if (method === this.chosen) return;
    this.chosen = method;
    this.doc.textContent = method.description;
    this.dynamics.options[0].textContent = `default: ${method.dynamics}`;
    this.inputs = Object.fromEntries(Object.entries(method.arguments).map(([key, allowed]) => [key, argumentInput(key, allowed)]));
    const fields = Object.entries(this.inputs).map(([key, input]) => [
      key,
      field({ label: LABELS[key] ?? key.replaceAll("_", " "), hint: HINTS[key], param: `steering.${key}`, input }),
    ]);
    const steps = field({ label: "Steps", param: "steering.num_steps", hint: "from noise to the image", input: this.steps });
    const dynamics = field({ label: "Dynamics", param: "steering.dynamics", input: this.dynamics });
    this.main.replaceChildren(...fields.filter(([key]) => key in LABELS).map(([, one]) => one), steps);
    this.further.replaceChildren(...fields.filter(([key]) => !(key in LABELS)).map(([, one]) => one), dynamics);
    this.onchange();
  }

  // As a request says it: only what was chosen.
  value() {
    const rewards = this.list.values();
    const steering = { ...(this.method.value ? { method: this.method.value } : {}), ...(rewards.length ? { rewards } : {}) };
    for (const [key, input] of Object.entries(this.inputs)) {
      const value = argumentOf(input);
      if (value !== undefined) steering[key] = value;
    }
    const steps = numberOf(this.steps);
    if (steps !== undefined) steering.num_steps = steps;
    if (this.dynamics.value) steering.dynamics = this.dynamics.value;
    return steering;
  }

  // A line that says what it is: "gradient towards symmetry × 0.5".
  summary() {
    const names = this.list.cards.map((card) => card.title());
    const method = this.actual().id.replaceAll("_", " ");
    return names.length ? `${method} towards ${names.join(" and ")}` : "unsteered";
  }

  copyTo(other) {
    this.list.copyTo(other.list);
    other.method.value = this.method.value;
    other.chooseMethod();
    other.steps.value = this.steps.value;
    other.dynamics.value = this.dynamics.value;
    for (const [key, input] of Object.entries(this.inputs)) other.inputs[key].value = input.value;
  }
}

function argumentInput(key, allowed) {
  if (allowed.enum) return selectInput([["", allowed.default], ...allowed.enum.filter((one) => one !== allowed.default)], "");
  const number = typeof allowed.default === "number";
  if (!number) return el("input", { type: "text", placeholder: String(allowed.default), autocomplete: "off" });
  const whole = "maximum" in allowed;
  return numberInput({ placeholder: allowed.default, minimum: allowed.minimum ?? 0, maximum: allowed.maximum, whole });
}

function argumentOf(input) {
  if (input.type === "number") return numberOf(input);
  const text = input.value.trim();
  if (text === "") return undefined;
  if (text === "null") return null;
  return Number.isNaN(Number(text)) ? text : Number(text);
}
