// What the colors of a map mean.

import { colorTable, css } from "./color.js";
import { el } from "./dom.js";
import { formatted, valueAt } from "./statistics.js";

/** @typedef {import("./panel.js").Panel} Panel */

/**
 * Return the name of what a panel shows, with its unit.
 * @param {Panel} panel
 */
export function nameOf(panel) {
  return panel.unit ? `${panel.label}, ${panel.unit}` : panel.label;
}

/**
 * Return the value at a place of a panel's scale, as people read it.
 * @param {Panel} panel
 * @param {number} place 0 to 1
 */
function mark(panel, place) {
  const value = valueAt(place, panel.scale);
  const name = panel.statistic.replace(/^between:/, "");
  if (panel.scale.kind !== "signed") return formatted(name, value);
  return `${value > 0 ? "+" : value < 0 ? "−" : ""}${formatted(name, Math.abs(value))}`;
}

/**
 * Return a strip of the colors of a panel, with the values at its ends.
 * @param {Panel} panel
 * @param {string} palette
 * @param {boolean} dark
 */
export function legend(panel, palette, dark) {
  const canvas = el("canvas", { width: 256, height: 1 });
  const context = canvas.getContext("2d");
  colorTable(palette, dark, panel.scale.kind === "signed").forEach((color, i) => {
    if (!context) return;
    context.fillStyle = css(color);
    context.fillRect(i, 0, 1, 1);
  });
  const [low, high] = [mark(panel, 0), mark(panel, 1)];
  return el("span", { class: "legend", role: "img", "aria-label": `Colors: ${nameOf(panel)}, from ${low} to ${high}`, title: nameOf(panel) }, el("span", {}, low), canvas, el("span", {}, high));
}
