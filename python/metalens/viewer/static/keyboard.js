// Keys of the page. Those of the maps work while the maps have the focus; the others while no text is being typed.

import { help } from "./actions.js";
import { byId } from "./dom.js";

/** @typedef {import("./app.js").App} App */

/** @param {App} app */
export function keyboard(app) {
  byId("maps").addEventListener("keydown", (event) => {
    const at = app.cursor;
    const main = app.shown()[0]?.trajectory;
    if (!at || !main || event.ctrlKey || event.metaKey || event.altKey) return;
    const { row, position } = at;
    const last = main.length - 1;
    /** @type {Record<string, [number, number]>} */
    const moves = {
      ArrowLeft: [row, position - 1], ArrowRight: [row, position + 1], ArrowUp: [row + 1, position], ArrowDown: [row - 1, position],
      PageUp: [row + 10, position], PageDown: [row - 10, position], Home: [row, 0], End: [row, last],
    };
    if (event.key in moves) {
      const [r, t] = moves[event.key];
      app.moveTo({ row: Math.min(main.rows.length - 1, Math.max(0, r)), position: Math.min(last, Math.max(0, t)) });
    } else if (event.key === "Enter") {
      app.follow(main.topIds.at(row, position));
    } else return;
    event.preventDefault();
  });
  document.addEventListener("keydown", (event) => {
    const typing = event.target instanceof HTMLElement && event.target.matches("input:not([type=radio]), textarea, select");
    if (typing || event.ctrlKey || event.metaKey || event.altKey || /** @type {HTMLDialogElement} */ (byId("help")).open) return;
    /** @type {Record<string, () => void>} */
    const keys = {
      "+": () => app.zoomBy(1.25), "=": () => app.zoomBy(1.25), "-": () => app.zoomBy(0.8), "0": () => app.zoomToFit(),
      "1": () => app.set({ lens: "0" }), "2": () => app.set({ lens: "1" }), "3": () => app.set({ lens: "difference" }), "4": () => app.set({ lens: "side" }),
      t: () => app.set({ table: !app.state.table }), p: () => app.set({ depth: !app.state.depth }), v: () => app.set({ words: app.state.words === "token" ? "value" : "token" }), d: () => app.toggleTheme(), "?": help,
      Escape: () => app.set({ cursor: null, zoom: null, follow: null }),
    };
    if (!(event.key in keys)) return;
    event.preventDefault();
    keys[event.key]();
  });
}
