// The numbers as a table, for screen readers and for people who like tables: some positions at a time, every layer.

import { el, tokenElement } from "./dom.js";

/** @typedef {import("./panel.js").Panel} Panel */
/** @typedef {import("./painter.js").Cell} Cell */

export const TABLE_COLUMNS = 12;

/**
 * Return a table of a panel around a cell.
 * @param {Panel} panel
 * @param {Cell} cursor
 * @param {(cell: Cell) => void} onPick
 */
export function readingTable(panel, cursor, onPick) {
  const { trajectory } = panel;
  const first = Math.max(0, Math.min(cursor.position - (TABLE_COLUMNS >> 1), panel.length - TABLE_COLUMNS));
  const end = Math.min(panel.length, first + TABLE_COLUMNS);
  const positions = Array.from({ length: end - first }, (_, i) => first + i);
  const some = end - first < panel.length ? `positions ${first + trajectory.firstPosition} to ${end - 1 + trajectory.firstPosition} of ${panel.length}` : "all positions";
  const head = el("tr", {}, el("th", { scope: "col" }, "layer"));
  for (const t of positions) head.append(el("th", { scope: "col" }, tokenElement(trajectory.vocabulary.display(trajectory.tokens[t])), el("small", {}, ` ${t + trajectory.firstPosition}`)));
  const body = el("tbody");
  for (let r = panel.rows.length - 1; r >= 0; r--) {
    const line = el("tr", {}, el("th", { scope: "row" }, panel.rows[r].label));
    for (const t of positions) {
      const here = r === cursor.row && t === cursor.position;
      const word = tokenElement(panel.word(r, t, true));
      line.append(el("td", { "aria-selected": here ? "true" : undefined, onclick: () => onPick({ row: r, position: t }) }, word, " ", el("small", {}, panel.word(r, t, false))));
    }
    body.append(line);
  }
  const turn = (/** @type {number} */ by) => () => onPick({ row: cursor.row, position: Math.min(panel.length - 1, Math.max(0, cursor.position + by)) });
  return el(
    "div",
    {},
    el("div", { class: "turn" }, el("button", { type: "button", onclick: turn(-TABLE_COLUMNS), disabled: first === 0 }, "← earlier"), el("span", { class: "quiet" }, some), el("button", { type: "button", onclick: turn(TABLE_COLUMNS), disabled: end === panel.length }, "later →")),
    el("div", { class: "wide", tabindex: 0, role: "region", "aria-label": panel.title }, el("table", { class: "cells" }, el("caption", {}, `${panel.title}: the most likely next token, and ${panel.label}`), el("thead", {}, head), body)),
  );
}
