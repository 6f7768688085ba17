// Draw a panel: only the cells that the window shows, on a canvas or as SVG.

import { colorTable, inkOn } from "./color.js";
import { SAME } from "./panel.js";
import { placeOf } from "./statistics.js";
import { MONO } from "./surfaces.js";

/** @typedef {import("./panel.js").Panel} Panel */
/** @typedef {import("./surfaces.js").Surface} Surface */
/** A window on the cells: its offset and size, the size of a cell, in CSS pixels. @typedef {{x: number, y: number, width: number, height: number, cell: number, row: number}} View */
/** @typedef {{row: number, position: number}} Cell */
/**
 * Colors of the page, and what is marked.
 * @typedef {{
 *   dark: boolean, palette: string, ground: string, ink: string, muted: string, line: string, accent: string, tokens: boolean,
 *   hovered: Cell | null, cursor: Cell | null, followed: {id: number, color: string}[], depth: boolean,
 * }} Look
 */

export const LEFT = 70; // the names of the rows
export const BOTTOM = 40; // the tokens that are read
const TEXT_FROM = { width: 30, height: 14 }; // smaller cells show color only

let measuring = /** @type {CanvasRenderingContext2D | null} */ (null);
/** @type {Map<string, string>} */
const fitted = new Map();

/**
 * Return a text that is cut to a width.
 * @param {string} text
 * @param {number} width
 * @param {number} size of the font
 */
export function fit(text, width, size) {
  const key = `${size} ${Math.floor(width)} ${text}`;
  const known = fitted.get(key);
  if (known !== undefined) return known;
  measuring ??= document.createElement("canvas").getContext("2d");
  if (!measuring) return text;
  const font = `400 ${size}px ${MONO}`;
  if (measuring.font !== font) measuring.font = font;
  let out = text;
  if (measuring.measureText(text).width > width) {
    const letters = [...text];
    let [low, high] = [0, letters.length];
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (measuring.measureText(`${letters.slice(0, middle).join("")}…`).width <= width) low = middle;
      else high = middle - 1;
    }
    out = low ? `${letters.slice(0, low).join("")}…` : "";
  }
  if (fitted.size > 20000) fitted.clear();
  fitted.set(key, out);
  return out;
}

/**
 * Return the cells that a window shows: [first, end) of columns, and of rows counted from the top.
 * @param {Panel} panel
 * @param {View} view
 */
export function visible(panel, view) {
  const [rows, columns] = [panel.rows.length, panel.length];
  return {
    first: Math.max(0, Math.floor(view.x / view.cell)),
    end: Math.min(columns, Math.ceil((view.x + view.width - LEFT) / view.cell)),
    top: Math.max(0, Math.floor(view.y / view.row)),
    bottom: Math.min(rows, Math.ceil((view.y + view.height - BOTTOM) / view.row)),
  };
}

/**
 * Return where the cells end and the tokens begin: below the last row that is seen.
 * @param {Panel} panel
 * @param {View} view
 */
export function floorOf(panel, view) {
  return Math.min(view.height - BOTTOM, Math.ceil(panel.rows.length * view.row - view.y));
}

/**
 * Draw a panel.
 * @param {Surface} on
 * @param {Panel} panel
 * @param {HTMLCanvasElement} picture its cells, one pixel each
 * @param {View} view
 * @param {Look} look
 */
export function paint(on, panel, picture, view, look) {
  const { first, end, top, bottom } = visible(panel, view);
  const { cell, row } = view;
  const [x0, y0] = [LEFT - view.x, -view.y];
  const rows = panel.rows.length;
  const plot = [LEFT, 0, view.width - LEFT, floorOf(panel, view)];
  on.rect(0, 0, view.width, view.height, look.ground);
  if (end <= first || bottom <= top) return;
  on.clipped(plot[0], plot[1], plot[2], plot[3], () => {
    on.bitmap(picture, [first, top, end - first, bottom - top], [x0 + first * cell, y0 + top * row, (end - first) * cell, (bottom - top) * row]);
    if (Math.min(cell, row) >= 9) lines(on, { first, end, top, bottom }, x0, y0, view, look);
    if (row >= 5) on.rect(LEFT, y0 + row - 1, plot[2], 2, look.ground); // the model's answer stands apart
    if (cell >= TEXT_FROM.width && row >= TEXT_FROM.height) words(on, panel, { first, end, top, bottom }, x0, y0, view, look);
    for (const { id, color } of look.followed) {
      if (Math.min(cell, row) < 5) break;
      for (let t = first; t < end; t++) {
        for (let v = top; v < bottom; v++) {
          if (panel.trajectory.topIds.at(rows - 1 - v, t) === id) on.frame(x0 + t * cell + 1.5, y0 + v * row + 1.5, cell - 4, row - 4, color, 2);
        }
      }
    }
    if (look.depth) depth(on, panel, first, end, x0, y0, view, look);
    for (const [at, color, width] of /** @type {[Cell | null, string, number][]} */ ([[look.hovered, look.muted, 1], [look.cursor, look.ink, 2]])) {
      if (at && at.position < panel.length) on.frame(x0 + at.position * cell, y0 + (rows - 1 - at.row) * row, cell - 1, row - 1, color, width);
    }
  });
  names(on, panel, { top, bottom }, y0, view, look);
  tokens(on, panel, { first, end }, x0, view, look);
}

/**
 * Draw the prediction depth as a line: above it, the top token is the model's answer.
 * @param {Surface} on
 * @param {Panel} panel
 * @param {number} first
 * @param {number} end
 * @param {number} x0
 * @param {number} y0
 * @param {View} view
 * @param {Look} look
 */
function depth(on, panel, first, end, x0, y0, { cell, row }, look) {
  const level = (/** @type {number} */ t) => y0 + (panel.rows.length - panel.trajectory.depth(t)) * row;
  for (const [color, width] of /** @type {[string, number][]} */ ([[look.ground, 5], [look.ink, 2]])) {
    const half = width / 2;
    for (let t = first; t < end; t++) {
      const [x, y] = [x0 + t * cell, level(t)];
      on.rect(x - half, y - half, cell + width, width, color);
      const before = t > first ? level(t - 1) : y;
      if (before !== y) on.rect(x - half, Math.min(y, before) - half, width, Math.abs(y - before) + width, color);
    }
  }
}

/** @typedef {{first: number, end: number, top: number, bottom: number}} Seen */

/**
 * @param {Surface} on
 * @param {Seen} seen
 * @param {number} x0
 * @param {number} y0
 * @param {View} view
 * @param {Look} look
 */
function lines(on, seen, x0, y0, { cell, row }, look) {
  const [width, height] = [(seen.end - seen.first) * cell, (seen.bottom - seen.top) * row];
  for (let t = seen.first; t < seen.end; t++) on.rect(x0 + (t + 1) * cell - 1, y0 + seen.top * row, 1, height, look.ground);
  for (let v = seen.top; v < seen.bottom; v++) on.rect(x0 + seen.first * cell, y0 + (v + 1) * row - 1, width, 1, look.ground);
}

/**
 * @param {Surface} on
 * @param {Panel} panel
 * @param {Seen} seen
 * @param {number} x0
 * @param {number} y0
 * @param {View} view
 * @param {Look} look
 */
function words(on, panel, seen, x0, y0, { cell, row }, look) {
  const table = colorTable(look.palette, look.dark, panel.scale.kind === "signed");
  const inks = table.map(inkOn);
  const size = row >= 20 ? 11.5 : 10;
  for (let v = seen.top; v < seen.bottom; v++) {
    const r = panel.rows.length - 1 - v;
    for (let t = seen.first; t < seen.end; t++) {
      const place = placeOf(panel.value(r, t), panel.scale);
      const word = panel.word(r, t, look.tokens);
      const color = Number.isNaN(place) || word === SAME ? look.muted : inks[Math.round(place * 255)];
      on.text(fit(word, cell - 7, size), x0 + (t + 0.5) * cell - 0.5, y0 + (v + 0.5) * row, { color, size, align: "center", mono: true });
    }
  }
}

/**
 * Write the names of the rows.
 * @param {Surface} on
 * @param {Panel} panel
 * @param {{top: number, bottom: number}} seen
 * @param {number} y0
 * @param {View} view
 * @param {Look} look
 */
function names(on, panel, { top, bottom }, y0, view, look) {
  const every = [1, 2, 5, 10, 20, 50].find((step) => step * view.row >= 12) ?? 100;
  on.clipped(0, 0, LEFT, floorOf(panel, view), () => {
    for (let v = top; v < bottom; v++) {
      const r = panel.rows.length - 1 - v;
      const { label, model } = panel.rows[r];
      if (!model && r % every) continue;
      if (model && every > 1 && (panel.rows.length - 2) % every === 0 && view.row < 6) continue;
      const chosen = look.cursor?.row === r;
      const short = label.replace(/^layer /, "");
      on.text(short, LEFT - 10, y0 + (v + 0.5) * view.row, { color: chosen ? look.ink : look.muted, size: 11, align: "right", weight: chosen || model ? 600 : 400 });
    }
  });
}

/**
 * Write the tokens that were read, and the numbers of their positions.
 * @param {Surface} on
 * @param {Panel} panel
 * @param {{first: number, end: number}} seen
 * @param {number} x0
 * @param {View} view
 * @param {Look} look
 */
function tokens(on, panel, { first, end }, x0, view, look) {
  const { cell, width } = view;
  const y = floorOf(panel, view);
  const every = [1, 2, 5, 10, 20, 50, 100, 200, 500].find((step) => step * cell >= 34) ?? 1000;
  const { vocabulary, firstPosition } = panel.trajectory;
  on.clipped(LEFT, y, width - LEFT, BOTTOM, () => {
    on.rect(LEFT, y, width - LEFT, BOTTOM, look.ground);
    for (let t = first; t < end; t++) {
      const chosen = look.cursor?.position === t;
      const color = chosen ? look.ink : look.muted;
      const x = x0 + (t + 0.5) * cell;
      if (cell >= TEXT_FROM.width) on.text(fit(vocabulary.display(panel.trajectory.tokens[t]), cell - 5, 11), x, y + 13, { color: look.ink, size: 11, align: "center", mono: true, weight: chosen ? 700 : 400 });
      if (t % every === 0 || (chosen && every === 1)) on.text(String(t + firstPosition), x, y + (cell >= TEXT_FROM.width ? 29 : 13), { color, size: 10, align: "center" });
    }
  });
}
