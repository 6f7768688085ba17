// What appears beside the pointer: the most likely tokens of a cell, and its value.

import { colorTable, css } from "./color.js";
import { el, tokenElement } from "./dom.js";
import { guesses } from "./inspector.js";
import { DifferencePanel } from "./panel.js";

/** @typedef {import("./painter.js").Cell} Cell */
/** @typedef {import("./panel.js").Panel} Panel */

/**
 * Fill the box beside the pointer.
 * @param {HTMLElement} place
 * @param {Cell} cell
 * @param {Panel} panel
 * @param {{palette: string, dark: boolean, lines: Map<number, string>}} look `lines` are the colors of followed tokens
 */
export function fillTip(place, cell, panel, { palette, dark, lines }) {
  const color = css(colorTable(palette, dark, false)[dark ? 130 : 110]);
  const both = panel instanceof DifferencePanel ? [panel.trajectory, panel.other] : [panel.trajectory];
  const { vocabulary, tokens, firstPosition } = panel.trajectory;
  place.replaceChildren(el("h2", {}, panel.rows[cell.row].label, el("span", { class: "quiet" }, " after "), tokenElement(vocabulary.display(tokens[cell.position])), el("span", { class: "quiet" }, ` · ${cell.position + firstPosition}`)));
  both.forEach((trajectory) => {
    if (both.length > 1) place.append(el("p", {}, trajectory.lens));
    place.append(guesses(trajectory, cell, color, null, lines, both.length > 1 ? 3 : 5));
  });
  place.append(el("p", {}, `${panel.label}: ${panel.word(cell.row, cell.position, false)}${panel.unit ? ` ${panel.unit}` : ""}`));
}
