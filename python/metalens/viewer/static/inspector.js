// The panel at the side: what the pinned cell predicts, its statistics, and the curves of followed tokens.

import { LINES, colorTable, css } from "./color.js";
import { curve } from "./curves.js";
import { el, segments, tokenElement } from "./dom.js";
import { formatted, percent, statisticOf } from "./statistics.js";

/** @typedef {import("./trajectory.js").Trajectory} Trajectory */
/** @typedef {import("./painter.js").Cell} Cell */
/**
 * @typedef {{
 *   cell: Cell, trajectories: {name: string, trajectory: Trajectory}[], followed: number[], dark: boolean, palette: string, along: "layers" | "text",
 *   follow(id: number): void, moveTo(cell: Cell): void, setAlong(along: "layers" | "text"): void, add(text: string): void, note: string, live: boolean,
 * }} Inspected
 */

/**
 * Return the most likely tokens of a cell as a list with bars.
 * @param {Trajectory} trajectory
 * @param {Cell} cell
 * @param {string} color of the bars
 * @param {((id: number) => void) | null} onPick null = only to be read
 * @param {Map<number, string>} lines the colors of followed tokens
 * @param {number} [most]
 */
export function guesses(trajectory, cell, color, onPick, lines, most = 10) {
  const list = el("ol", { class: "guesses" });
  for (const { id, probability } of trajectory.top(cell.row, cell.position).slice(0, most)) {
    const bar = el("i", { class: "bar" });
    bar.style.width = `${Math.max(0.5, 100 * probability)}%`;
    bar.style.background = lines.get(id) ?? color;
    const content = [el("span", { class: "track" }, bar), tokenElement(trajectory.vocabulary.display(id)), el("span", { class: "number" }, percent(probability))];
    const title = `token ${id}: follow it`;
    list.append(el("li", {}, onPick ? el("button", { type: "button", title, "aria-pressed": String(lines.has(id)), onclick: () => onPick(id) }, ...content) : el("span", { class: "row" }, ...content)));
  }
  return list;
}

/**
 * Return {id: color of its lines}.
 * @param {number[]} followed
 * @param {boolean} dark
 */
export function lineColors(followed, dark) {
  const colors = LINES[dark ? "dark" : "light"];
  return new Map(followed.map((id, i) => [id, colors[i % colors.length]]));
}

/**
 * Fill the panel.
 * @param {HTMLElement} place
 * @param {Inspected} what
 */
export function inspect(place, what) {
  const { cell, trajectories } = what;
  const main = trajectories[0].trajectory;
  const lines = lineColors(what.followed, what.dark);
  const color = css(colorTable(what.palette, what.dark, false)[what.dark ? 130 : 110]);
  const row = main.rows[cell.row];
  const read = main.vocabulary.display(main.tokens[cell.position]);
  const focused = place.contains(document.activeElement) ? document.activeElement?.getAttribute("data-key") : null;
  const typed = /** @type {HTMLInputElement | null} */ (place.querySelector('[data-key="entry"]'))?.value ?? "";
  place.replaceChildren(
    el("h2", {}, row.model ? "the model’s answer" : row.label, el("span", { class: "quiet" }, " after "), tokenElement(read), el("span", { class: "quiet" }, ` · ${cell.position + main.firstPosition}`)),
  );
  for (const { name, trajectory } of trajectories) {
    if (trajectories.length > 1) place.append(el("h3", {}, name));
    place.append(guesses(trajectory, cell, color, what.follow, lines));
  }
  place.append(numbers(what));
  place.append(curves(what, lines));
  const entry = /** @type {HTMLInputElement | null} */ (place.querySelector('[data-key="entry"]'));
  if (entry) entry.value = typed;
  if (focused) /** @type {HTMLElement | null} */ (place.querySelector(`[data-key="${CSS.escape(focused)}"]`))?.focus();
}

/** @param {Inspected} what */
function numbers({ cell, trajectories }) {
  const table = el("table", { class: "numbers" });
  if (trajectories.length > 1) table.append(el("tr", {}, el("td"), ...trajectories.map(({ name }) => el("th", { scope: "col" }, name))));
  for (const name of trajectories[0].trajectory.statistics.keys()) {
    const { label, unit } = statisticOf(name, trajectories[0].trajectory);
    const values = trajectories.map(({ trajectory }) => el("td", {}, formatted(name, trajectory.value(name, cell.row, cell.position))));
    table.append(el("tr", {}, el("th", { scope: "row" }, label, unit ? el("span", { class: "quiet" }, ` ${unit}`) : ""), ...values));
  }
  const depths = trajectories.map(({ trajectory }) => el("td", {}, trajectory.rows[trajectory.depth(cell.position)].label));
  table.append(el("tr", {}, el("th", { scope: "row" }, "the model’s answer from"), ...depths));
  return table;
}

/**
 * @param {Inspected} what
 * @param {Map<number, string>} colors
 */
function curves(what, colors) {
  const { cell, trajectories, along, followed } = what;
  const main = trajectories[0].trajectory;
  const layers = along === "layers";
  const section = el("section", { class: "follow" });
  const chips = el("div", { class: "chips" });
  for (const id of followed) {
    const first = main.firstOnTop(id, cell.position);
    const swatch = el("i", { class: "swatch" });
    swatch.style.background = colors.get(id) ?? "";
    const where = first < 0 ? "never on top" : `first on top: ${main.rows[first].label}`;
    chips.append(el("button", { type: "button", class: "chip", "data-key": `chip ${id}`, title: "Stop following this token", onclick: () => what.follow(id) }, swatch, tokenElement(main.vocabulary.display(id)), el("span", { class: "quiet" }, where), el("span", { class: "close", "aria-hidden": "true" }, "×")));
  }
  const entry = el("input", { type: "text", name: "follow", "data-key": "entry", placeholder: what.live ? "follow a token, such as “ Paris”" : "follow a token of this page", "aria-label": "Token to follow: its text, or # and its id", autocomplete: "off", spellcheck: "false" });
  const form = el("form", { class: "entry", onsubmit: (event) => (event.preventDefault(), what.add(/** @type {HTMLInputElement} */ (entry).value)) }, entry, el("button", { type: "submit" }, "Follow"));
  section.append(el("h3", {}, "Followed tokens"), chips, form);
  if (what.note) section.append(el("p", { class: "quiet", role: "status" }, what.note));
  if (!followed.length) return section;
  section.append(segments("along", "Curves through", [{ value: "layers", label: "through the layers" }, { value: "text", label: "along the text" }], along, (value) => what.setAlong(value === "text" ? "text" : "layers")));
  const steps = layers ? main.rows.length : main.length;
  for (const kind of /** @type {const} */ (["probability", "rank"])) {
    const drawn = trajectories.flatMap(({ trajectory }, n) =>
      followed.map((id) => ({
        color: colors.get(id) ?? "",
        dashed: n > 0,
        name: main.vocabulary.display(id),
        points: Array.from({ length: steps }, (_, x) => {
          const [r, t] = layers ? [x, cell.position] : [cell.row, x];
          return { x, y: t < trajectory.length ? trajectory.standing(id, r, t)[kind] : NaN };
        }),
      })),
    );
    section.append(
      curve({
        title: kind === "rank" ? "rank, 1 on top" : "probability",
        lines: drawn,
        steps,
        kind,
        at: layers ? cell.row : cell.position,
        nameOf: layers ? (x) => main.rows[x].label : (x) => `position ${x + main.firstPosition}`,
        onPick: (x) => what.moveTo(layers ? { row: x, position: cell.position } : { row: cell.row, position: x }),
      }),
    );
  }
  if (trajectories.length > 1) section.append(el("p", { class: "quiet" }, `Solid: ${trajectories[0].name}. Dashed: ${trajectories[1].name}.`));
  const partly = followed.filter((id) => trajectories.some(({ trajectory }) => !trajectory.knows(id)));
  if (partly.length) section.append(el("p", { class: "quiet" }, `Known only where it is among the top ${main.k}: `, ...partly.flatMap((id) => [tokenElement(main.vocabulary.display(id)), " "])));
  return section;
}
