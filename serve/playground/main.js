// The page: reads what is served, keeps two settings, asks, and shows what comes.

import { generationEvents, getJson, hasKey, Refusal, useKey } from "./api.js";
import { el, freshId } from "./dom.js";
import { clearErrors, field, numberInput, numberOf, selectInput, showError, WrongInput } from "./fields.js";
import { Setting } from "./setting.js";
import { Stage } from "./stage.js";

const MANY_CLASSES = 12;
const PREVIEWS = 3;
const MAX_SEED = 2 ** 31 - 1;
const byId = (id) => document.getElementById(id);
const keyForm = byId("key-form"), controls = byId("controls"), trouble = byId("trouble");

class Playground {
  constructor({ models, rewards, methods, limits }) {
    Object.assign(this, { models, rewards, methods, limits });
    this.stage = new Stage(byId("stage"), { onobserve: (png) => this.shownSetting().list.observe(png) });
    this.busy = null;
    this.comparing = el("input", { type: "checkbox", id: freshId("compare"), role: "switch", onchange: () => this.compare() });
    this.seed = numberInput({ value: 0, minimum: 0, maximum: MAX_SEED, whole: true });
    this.count = numberInput({ value: 4, minimum: 1, maximum: limits.images, whole: true });
    this.model = selectInput(models.map((model) => model.id), models[0].id);
    this.model.addEventListener("change", () => this.useModel());
    this.whatBox = el("fieldset", { class: "group" });
    this.tabs = el("div", { role: "tablist", class: "tabs", "aria-label": "Settings", hidden: true });
    this.settingsBox = el("div", {});
    this.go = el("button", { type: "submit", class: "primary" }, "Generate");
    this.stop = el("button", { type: "button", hidden: true, onclick: () => this.busy?.abort() }, "Stop");
    controls.replaceChildren(this.whatBox, this.switchRow(), this.tabs, this.settingsBox, this.actions());
    controls.addEventListener("submit", (event) => (event.preventDefault(), this.generate()));
    controls.addEventListener("input", () => this.changed());
    this.useModel();
  }

  get current() {
    return this.models.find((model) => model.id === this.model.value);
  }

  useModel() {
    this.whatBox.replaceChildren(
      el("legend", {}, "What"),
      ...(this.models.length > 1 ? [field({ label: "Model", param: "model", input: this.model, wide: true })] : []),
      ...(this.current.class_names.length ? [this.classField()] : []),
      el(
        "div",
        { class: "params" },
        field({ label: "Images", param: "n", input: this.count }),
        this.seedField(),
      ),
    );
    this.settings = null; // while they are being made there is nothing to show
    this.settings = ["A", "B"].map((title) => this.setting(title));
    const first = this.settings[0];
    if (first.list.rewards.length) first.list.insert();
    first.chooseMethod();
    this.comparing.checked = false;
    this.compare();
  }

  setting(title) {
    const { methods, limits, current: model } = this;
    const rewards = this.rewards.filter((reward) => reward.models.includes(model.id));
    return new Setting({ title, rewards, methods, limits, model, onchange: () => this.changed() });
  }

  classField() {
    const names = this.current.class_names;
    if (names.length > MANY_CLASSES) {
      this.chosenClass = selectInput([["", "any"], ...names], "");
      const input = this.chosenClass;
      this.classValue = () => input.value;
      return field({ label: "Class", param: "prompt", input, wide: true });
    }
    const group = freshId("class");
    const chips = ["", ...names].map((name) => {
      const id = freshId("class");
      const radio = el("input", { type: "radio", name: group, id, value: name, checked: name === "" });
      return el("span", { class: "chip" }, radio, el("label", { for: id }, name || "any"));
    });
    const box = el("fieldset", { class: "chips classes wide" }, el("legend", {}, "Class"), ...chips);
    this.classValue = () => box.querySelector("input:checked").value;
    return box;
  }

  seedField() {
    const another = el("button", { type: "button", class: "quiet inset", "aria-label": "Another seed", onclick: () => this.roll() }, "↻");
    const made = field({ label: "Seed", param: "seed", input: this.seed });
    this.seed.after(another);
    made.classList.add("with-inset");
    return made;
  }

  roll() {
    this.seed.value = String(Math.floor(Math.random() * MAX_SEED));
    this.changed();
  }

  switchRow() {
    return el("div", { class: "switch" }, this.comparing, el("label", { for: this.comparing.id }, "Compare two settings at the same seed"));
  }

  actions() {
    return el("div", { class: "actions" }, this.go, this.stop);
  }

  compare() {
    const on = this.comparing.checked;
    const [first, second] = this.settings;
    if (on && !second.used) {
      first.copyTo(second);
      second.used = true;
    }
    this.tabs.hidden = !on;
    this.settings.forEach((setting) => (setting.element.id ||= freshId("setting")));
    this.tabs.replaceChildren(...this.settings.map((setting, index) => this.tab(setting, index)));
    this.settingsBox.replaceChildren(...(on ? this.settings : [first]).map((setting) => setting.element));
    this.show(on ? 1 : 0);
  }

  tab(setting, index) {
    const tab = el("button", { type: "button", role: "tab", class: "ab"[index], "aria-controls": setting.element.id, onclick: () => this.show(index) }, `Setting ${setting.title}`);
    tab.addEventListener("keydown", (event) => {
      if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
      this.show(1 - index);
      this.tabs.children[1 - index].focus();
    });
    return tab;
  }

  show(index) {
    this.showing = index;
    this.settings.forEach((setting, i) => {
      setting.element.hidden = this.comparing.checked && i !== index;
      if (this.comparing.checked) {
        setting.element.setAttribute("role", "tabpanel");
        setting.element.setAttribute("aria-label", `Setting ${setting.title}`);
      } else {
        setting.element.removeAttribute("role");
        setting.element.removeAttribute("aria-label");
      }
      this.tabs.children[i].setAttribute("aria-selected", String(i === index));
      this.tabs.children[i].tabIndex = i === index ? 0 : -1;
    });
    this.changed();
  }

  shownSetting() {
    return this.settings[this.comparing.checked ? this.showing : 0];
  }

  asked() {
    return this.comparing.checked ? this.settings : [this.settings[0]];
  }

  // What a request of a setting says, streaming apart.
  body(setting) {
    const prompt = this.current.class_names.length ? this.classValue() : "";
    const n = numberOf(this.count), seed = numberOf(this.seed);
    const steering = setting.value();
    return {
      model: this.current.id,
      ...(prompt ? { prompt } : {}),
      ...(n === undefined ? {} : { n }),
      ...(seed === undefined ? {} : { seed }),
      ...(Object.keys(steering).length ? { steering } : {}),
    };
  }

  // Something was changed: methods follow the rewards, and the code says what Generate would ask.
  changed() {
    if (!this.settings) return;
    for (const setting of this.settings) setting.chooseMethod();
    try {
      const requests = this.asked().map((one) => ({ title: one.title, body: this.body(one) }));
      this.stage.showCode(requests, new URL(".", location.href).href, hasKey());
    } catch (error) {
      if (!(error instanceof WrongInput)) throw error;
    }
  }

  async generate() {
    this.busy?.abort();
    clearErrors(controls);
    if (this.seed.value === "" && !this.seed.validity.badInput) this.roll();
    let bodies;
    try {
      bodies = this.asked().map((setting) => this.body(setting));
    } catch (error) {
      if (!(error instanceof WrongInput)) throw error;
      showError([controls], error.param, error.message);
      return;
    }
    const began = performance.now();
    performance.clearMarks();
    performance.mark("generate");
    const busy = (this.busy = new AbortController());
    this.running(true);
    const size = this.current.size.split("x").map(Number);
    const runs = this.asked().map((setting, index) => ({
      side: "ab"[index],
      title: this.comparing.checked ? setting.title : "Mean",
      mark: this.comparing.checked ? setting.title : "",
      heading: this.comparing.checked ? `Images of setting ${setting.title}` : "Images",
      summary: setting.summary(),
      count: Math.min(this.limits.images, Math.max(1, bodies[index].n ?? 1)),
      size,
    }));
    const sides = this.stage.begin(runs, { canObserve: this.settings[0].list.canObserve() });
    if (innerWidth < 820) byId("stage").scrollIntoView({ block: "start" });
    await Promise.all(sides.map((side, index) => this.run(side, bodies[index], index, began, busy.signal)));
    if (this.busy === busy) {
      this.running(false);
      this.stage.finished();
    }
  }

  async run(side, body, index, began, signal) {
    try {
      for await (const event of generationEvents({ ...body, stream: true, partial_images: PREVIEWS, include: ["trace"] }, signal)) {
        if (event.type === "image_generation.partial_image") {
          await side.preview(event);
          if (!performance.getEntriesByName("first-preview").length) performance.mark("first-preview");
        } else if (event.type === "image_generation.completed") side.complete(event);
      }
      side.done((performance.now() - began) / 1000);
    } catch (error) {
      this.failed(side, index, error);
    }
  }

  failed(side, index, error) {
    if (error.name === "AbortError") return side.stopped("Stopped");
    if (!(error instanceof Refusal)) throw error;
    side.stopped("Not made");
    side.warn(error.message);
    if (error.status === 401) return askForKey(error.message);
    if (this.comparing.checked && error.param?.startsWith("steering")) this.show(index);
    showError([this.whatBox, this.asked()[index].element], error.param, error.message);
  }

  running(on) {
    this.stop.hidden = !on;
    this.go.textContent = on ? "Generate anew" : "Generate";
    if (!on) this.busy = null;
  }
}

function askForKey(message) {
  keyForm.hidden = false;
  byId("key-error").textContent = hasKey() ? message : "";
  byId("key").setAttribute("aria-invalid", String(hasKey()));
  byId("key-asked").textContent = hasKey() ? "" : `The server asks for a key: ${message}.`;
  byId("key").focus();
}

let playground = null; // kept when another key is given later

async function start() {
  trouble.hidden = true;
  try {
    const [models, rewards, methods] = await Promise.all(["v1/models", "v1/rewards", "v1/methods"].map(getJson));
    keyForm.hidden = true;
    controls.hidden = byId("stage").hidden = false;
    playground ??= new Playground({ models: models.data, rewards: rewards.data, methods: methods.data, limits: methods.limits });
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    if (error.status === 401) return askForKey(error.message);
    trouble.textContent = error.message;
    trouble.hidden = false;
  }
}

keyForm.addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(byId("key").value);
  byId("key").value = "";
  start();
});
start();
