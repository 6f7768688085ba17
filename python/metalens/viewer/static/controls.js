// The row of controls above the maps: lens, text, color, words, zoom.

import { PALETTES } from "./color.js";
import { el, segments } from "./dom.js";
import { DIVERGENCES, statisticOf } from "./statistics.js";

/** @typedef {import("./app.js").App} App */

/**
 * Return a list to choose from, with its label.
 * @param {string} name
 * @param {string} label
 * @param {{value: string, label: string}[]} options
 * @param {string} chosen
 * @param {(value: string) => void} onChange
 */
function choice(name, label, options, chosen, onChange) {
  const select = el("select", { name, onchange: () => onChange(select.value) }, ...options.map((each) => el("option", { value: each.value, selected: each.value === chosen }, each.label)));
  return el("label", {}, label, select);
}

/**
 * Return the statistics that the maps can show.
 * @param {App} app
 */
export function statistics(app) {
  const first = app.doc.of(app.textNumber)[0]?.trajectory;
  if (!first) return [];
  const options = [...first.statistics.keys()].map((value) => ({ value, label: statisticOf(value, first).label }));
  for (const id of app.followed) {
    for (const what of ["probability", "rank"]) options.push({ value: `token:${what}:${id}`, label: statisticOf(`token:${what}:${id}`, first).label });
  }
  const live = app.doc.live !== null;
  if (app.lensChoice === "difference" || app.state.text === "compare") {
    const known = app.compared() && live ? Object.entries(DIVERGENCES) : [...(app.activeComparison() ?? [])];
    for (const [name, { label }] of known) options.push({ value: `between:${name}`, label: `${label} (difference)` });
  }
  const steps = Object.keys(DIVERGENCES).map((name) => `layers:${name}`).filter((value) => live && first.rows.length > 2 && !first.statistics.has(value));
  for (const value of steps) options.push({ value, label: statisticOf(value, first).label });
  return options;
}

/**
 * Fill the row.
 * @param {HTMLElement} place
 * @param {App} app
 */
export function controls(place, app) {
  const { doc, state } = app;
  const focused = place.contains(document.activeElement) ? /** @type {HTMLInputElement} */ (document.activeElement) : null;
  const [name, value] = [focused?.name, focused?.value];
  const parts = [];
  const lenses = doc.lenses;
  if (doc.texts.length > 1) {
    const options = [...doc.texts.map((_, i) => ({ value: String(i), label: `text ${"AB"[i]}` })), { value: "compare", label: "A and B" }];
    parts.push(segments("text", "Text", options, state.text, (text) => app.set({ text })));
  }
  if (lenses.length > 1) {
    const missing = doc.of(app.textNumber).length < 2;
    const options = [
      ...lenses.map((label, i) => ({ value: String(i), label, disabled: !doc.texts[app.textNumber]?.[i] })),
      { value: "difference", label: "difference", disabled: missing, title: `${lenses[1]} minus ${lenses[0]}` },
      { value: "side", label: "side by side", disabled: missing || state.text === "compare" },
    ];
    parts.push(segments("lens", "Lens", options, app.lensChoice, (lens) => app.set({ lens })));
  }
  parts.push(choice("statistic", "Color", statistics(app), state.statistic, (statistic) => app.set({ statistic })));
  parts.push(choice("words", "Cells", [{ value: "token", label: "top token" }, { value: "value", label: "value" }], state.words, (words) => app.set({ words: words === "value" ? "value" : "token" })));
  parts.push(choice("palette", "Map", PALETTES.map((each) => ({ value: each, label: each })), state.palette, (palette) => app.set({ palette })));
  const line = el("input", { type: "checkbox", name: "depth", checked: state.depth, onchange: () => app.set({ depth: line.checked }) });
  parts.push(el("label", { title: "A line where the top token becomes the model’s answer (p)" }, line, "depth"));
  const zoom = el("span", { class: "zoom", role: "group", "aria-label": "Zoom" });
  zoom.append(
    el("button", { type: "button", title: "Smaller cells (−)", "aria-label": "Smaller cells", onclick: () => app.zoomBy(1 / 1.25) }, "−"),
    el("button", { type: "button", title: "Larger cells (+)", "aria-label": "Larger cells", onclick: () => app.zoomBy(1.25) }, "+"),
    el("button", { type: "button", title: "The whole text and all layers (0)", onclick: () => app.zoomToFit() }, "fit"),
  );
  parts.push(zoom);
  place.replaceChildren(...parts);
  if (name) {
    const again = [.../** @type {NodeListOf<HTMLInputElement>} */ (place.querySelectorAll(`[name="${name}"]`))];
    (again.find((input) => input.value === value || input.checked) ?? again[0])?.focus();
  }
}
