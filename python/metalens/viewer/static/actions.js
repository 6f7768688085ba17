// What stands at the top right: take away, table, theme, keys.

import { byId, el } from "./dom.js";
import { copyOrSave, csv, png, save, svgPicture } from "./exports.js";

/** @typedef {import("./app.js").App} App */

const KEYS = [
  ["← → ↑ ↓", "move through tokens and layers"],
  ["Page Up, Page Down", "ten layers up or down"],
  ["Home, End", "the first, the last token"],
  ["Enter", "follow the top token of the cell, or stop following it"],
  ["Escape", "go back to the end of the text"],
  ["+ − 0", "larger cells, smaller cells, everything"],
  ["1 2 3 4", "first lens, second lens, difference, side by side"],
  ["t", "show the numbers as a table"],
  ["v", "tokens or values in the cells"],
  ["p", "the line of the prediction depth"],
  ["d", "light or dark"],
  ["?", "these keys"],
  ["Ctrl + wheel", "zoom; with Shift only the columns, with Alt only the rows"],
];

/**
 * Fill the top right.
 * @param {HTMLElement} place
 * @param {App} app
 */
export function actions(place, app) {
  const panel = el("div", { hidden: true });
  const toggle = el("button", { type: "button", "aria-expanded": "false", onclick: () => show(panel.hidden) }, "Copy");
  const show = (/** @type {boolean} */ open) => {
    panel.hidden = !open;
    toggle.setAttribute("aria-expanded", String(open));
  };
  const menu = el("div", { class: "menu" }, toggle, panel);
  document.addEventListener("click", (event) => {
    if (!menu.contains(/** @type {Node} */ (event.target))) show(false);
  });
  menu.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || panel.hidden) return;
    show(false);
    toggle.focus();
  });
  /** @type {[string, string, () => Promise<Blob>][]} */
  const kinds = [
    ["Picture, PNG", "metalens.png", () => png(app.maps, app.look(), app.heading())],
    ["Picture, SVG", "metalens.svg", async () => new Blob([svgPicture(app.maps, app.look(), app.heading())], { type: "image/svg+xml" })],
    ["Numbers, CSV", "metalens.csv", async () => new Blob([csv(app.shown())], { type: "text/csv" })],
  ];
  /** Make a file and do something with it, or say why there is none. */
  const withFile = async (/** @type {() => Promise<Blob>} */ make, /** @type {(file: Blob) => unknown} */ use) => {
    try {
      if (!app.shown().length) throw new Error("There is nothing to copy yet. Read a text first.");
      await use(await make());
    } catch (error) {
      byId("message").hidden = false; // the line of `app.say` is seen beside a text only
      byId("message").textContent = error instanceof Error ? error.message : String(error);
    }
  };
  for (const [label, name, make] of kinds) {
    const copy = async (/** @type {Blob} */ file) => app.say((await copyOrSave(file, name)) === "copied" ? `${label}: copied.` : `${label}: saved as ${name}, because the browser does not let this page copy.`);
    panel.append(
      el("span", {}, label),
      el("button", { type: "button", "aria-label": `Copy ${label}`, onclick: () => withFile(make, copy) }, "copy"),
      el("button", { type: "button", "aria-label": `Save ${label}`, onclick: () => withFile(make, (file) => save(file, name)) }, "save"),
    );
  }
  const link = async () => app.say((await copyOrSave(new Blob([app.link()], { type: "text/plain" }), "metalens-link.txt")) === "copied" ? "Link copied: it opens this view." : "Link saved as metalens-link.txt.");
  panel.append(el("span", {}, "Link to this view"), el("button", { type: "button", "aria-label": "Copy link", onclick: link }, "copy"), el("span", {}));
  place.replaceChildren(
    menu,
    el("button", { type: "button", id: "table-toggle", title: "The numbers as a table (t)", "aria-pressed": "false", onclick: () => app.set({ table: !app.state.table }) }, "Table"),
    el("button", { type: "button", title: "Light or dark (d)", onclick: () => app.toggleTheme() }, "Theme"),
    el("button", { type: "button", title: "Keys (?)", onclick: () => help() }, "Keys"),
  );
}

/** Show the keys. */
export function help() {
  const dialog = /** @type {HTMLDialogElement} */ (byId("help"));
  const list = el("dl");
  for (const [keys, what] of KEYS) list.append(el("dt", {}, el("kbd", {}, keys)), el("dd", {}, what));
  dialog.replaceChildren(el("h2", {}, "Keys"), list, el("form", { method: "dialog" }, el("button", { type: "submit" }, "Close")));
  dialog.showModal();
}
