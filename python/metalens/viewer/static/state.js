// What the reader has chosen. It lives in the page's address, so that a link shows the same.

import { PALETTES } from "./color.js";

/** @typedef {import("./painter.js").Cell} Cell */
/**
 * @typedef {{
 *   text: string, lens: string, statistic: string, words: "token" | "value", palette: string, theme: "auto" | "light" | "dark",
 *   zoom: {cell: number, row: number} | null, x: number, y: number, cursor: Cell | null, follow: number[] | null, along: "layers" | "text", table: boolean, depth: boolean, prompts: string[],
 * }} State
 */

export const MOST_FOLLOWED = 6; // as many as there are colors

/**
 * Return a size of cells within what can be drawn.
 * @param {number} cell
 * @param {number} row
 */
export function clampedZoom(cell, row) {
  return { cell: Math.min(400, Math.max(1, cell)), row: Math.min(80, Math.max(1, row)) };
}

/** @returns {State} null = what the page chooses: cells that fit, the end of the text, its top token */
export function defaultState() {
  return {
    text: "0", lens: "", statistic: "max_probability", words: "token", palette: "ink", theme: "auto",
    zoom: null, x: 0, y: 0, cursor: null, follow: null, along: "layers", table: false, depth: false, prompts: [],
  };
}

const PLAIN = /** @type {const} */ (["text", "lens", "statistic", "words", "palette", "theme", "along"]);
const CHOICES = { palette: PALETTES, words: ["token", "value"], theme: ["auto", "light", "dark"], along: ["layers", "text"] };

/**
 * Return a state as the part of an address after #.
 * @param {State} state
 */
export function toHash(state) {
  const defaults = defaultState();
  const out = new URLSearchParams();
  for (const name of PLAIN) if (state[name] !== defaults[name]) out.set(name, state[name]);
  if (state.zoom) out.set("zoom", `${state.zoom.cell.toFixed(1)},${state.zoom.row.toFixed(1)}`);
  if (state.x || state.y) out.set("at", `${Math.round(state.x)},${Math.round(state.y)}`);
  if (state.cursor) out.set("cell", `${state.cursor.row},${state.cursor.position}`);
  if (state.follow) out.set("follow", state.follow.join(","));
  if (state.table) out.set("table", "1");
  if (state.depth) out.set("depth", "1");
  state.prompts.forEach((prompt) => out.append("prompt", prompt));
  return out.toString();
}

/**
 * Return the state that an address holds. Whatever it does not hold, or holds wrongly, is the default.
 * @param {string} hash
 * @param {Partial<State>} [chosen] what the page chooses in place of the default
 * @returns {State}
 */
export function fromHash(hash, chosen = {}) {
  const state = { ...defaultState(), ...chosen };
  const given = new URLSearchParams(hash.replace(/^#/, ""));
  for (const name of PLAIN) {
    const value = given.get(name);
    const choices = /** @type {Record<string, string[]>} */ (CHOICES)[name];
    if (value !== null && (!choices || choices.includes(value))) Object.assign(state, { [name]: value });
  }
  const pair = (/** @type {string} */ name) => {
    const numbers = (given.get(name) ?? "").split(",").map(Number);
    return numbers.length === 2 && numbers.every((n) => Number.isFinite(n) && n >= 0) ? numbers : null;
  };
  const [zoom, at, cell] = ["zoom", "at", "cell"].map(pair);
  if (zoom) state.zoom = clampedZoom(zoom[0], zoom[1]);
  if (at) [state.x, state.y] = at;
  if (cell && cell.every(Number.isInteger)) state.cursor = { row: cell[0], position: cell[1] };
  const follow = given.get("follow");
  if (follow !== null) state.follow = follow.split(",").filter((id) => /^\d+$/.test(id)).map(Number).slice(0, MOST_FOLLOWED);
  state.table = given.get("table") === "1";
  state.depth = given.get("depth") === "1";
  state.prompts = given.getAll("prompt").slice(0, 2);
  return state;
}
