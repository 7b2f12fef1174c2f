// Labelled inputs. Each carries the request's own name for it (data-param), so that a refusal finds its place.

import { el, freshId } from "./dom.js";

// A label, the input, what it means, and room for what is wrong with it.
export function field({ label, hint, param, input, wide = false }) {
  const id = freshId("field");
  const hintId = `${id}-hint`, errorId = `${id}-error`;
  input.id = id;
  input.dataset.param = param;
  input.setAttribute("aria-describedby", hint ? `${hintId} ${errorId}` : errorId);
  return el(
    "div",
    { class: wide ? "field wide" : "field" },
    el("label", { for: id }, label),
    input,
    hint ? el("p", { class: "hint", id: hintId }, hint) : null,
    el("p", { class: "error", id: errorId }),
  );
}

export function numberInput({ value = null, placeholder = "", minimum, maximum, whole = false }) {
  return el("input", {
    type: "number",
    value: value === null ? undefined : String(value),
    placeholder: String(placeholder),
    min: minimum,
    max: maximum,
    step: whole ? 1 : "any",
    inputmode: whole ? "numeric" : "decimal",
  });
}

export function selectInput(options, chosen) {
  const entries = options.map((option) => (Array.isArray(option) ? option : [option, option]));
  return el("select", {}, ...entries.map(([value, text]) => el("option", { value, selected: value === chosen }, text)));
}

// The number in an input, undefined where it is left to the server. Refuses what the browser could not read.
export function numberOf(input) {
  if (input.validity.badInput) throw new WrongInput(input, `${input.dataset.param}: expected a number`);
  return input.value === "" ? undefined : Number(input.value);
}

export class WrongInput extends Error {
  constructor(input, message) {
    super(message);
    this.param = input.dataset.param;
  }
}

export function clearErrors(root) {
  for (const input of root.querySelectorAll("[aria-invalid]")) input.removeAttribute("aria-invalid");
  for (const error of root.querySelectorAll(".error")) error.textContent = "";
}

// Shows a message beside the field that a refusal names, or the nearest one around it. Whether there is one.
export function showError(roots, param, message) {
  for (let name = param ?? ""; name; name = parent(name)) {
    const input = roots.flatMap((root) => [...root.querySelectorAll("[data-param]")]).find((i) => i.dataset.param === name);
    if (!input) continue;
    input.setAttribute("aria-invalid", "true");
    const error = document.getElementById(input.getAttribute("aria-describedby").split(" ").at(-1));
    error.textContent = message;
    for (let node = input; node; node = node.parentElement) if (node.tagName === "DETAILS") node.open = true;
    input.focus();
    return true;
  }
  return false;
}

function parent(name) {
  const end = Math.max(name.lastIndexOf("."), name.lastIndexOf("["));
  return end < 0 ? "" : name.slice(0, end);
}
