// The page: it holds the document and the reader's choices, and keeps everything that is drawn in step with them.

import { controls, statistics } from "./controls.js";
import { byId, el } from "./dom.js";
import { HeatMap } from "./heatmap.js";
import { inspect, lineColors } from "./inspector.js";
import { BOTTOM, LEFT } from "./painter.js";
import { DifferencePanel, Panel } from "./panel.js";
import { MOST_FOLLOWED, clampedZoom, toHash } from "./state.js";
import { formatted, percent } from "./statistics.js";
import { readingTable } from "./table.js";
import { fillTip } from "./tip.js";

/** @typedef {import("./document.js").Doc} Doc */
/** @typedef {import("./painter.js").Cell} Cell */
/** @typedef {import("./painter.js").Look} Look */
/** @typedef {import("./state.js").State} State */
/** @typedef {import("./trajectory.js").Trajectory} Trajectory */
/** @typedef {import("./document.js").Pair} Pair */
/** A trajectory with the numbers of its text and its lens. @typedef {{name: string, of: [number, number], trajectory: Trajectory}} Named */

const NAMES = ["A", "B"]; // of texts

/** The page. */
export class App {
  /**
   * @param {Doc} doc
   * @param {State} state
   */
  constructor(doc, state) {
    this.doc = doc;
    this.state = state;
    /** @type {HeatMap[]} */
    this.maps = [];
    /** @type {Cell | null} */
    this.hovered = null;
    this.note = "";
    this.syncing = false;
    /** Titles of the maps that are on the page; null = arrange them anew. @type {string | null} */
    this.arranged = null;
    /** Ask the server for the curves of tokens, and follow them; null = there is none. @type {((tokens: (number | string)[], follow: boolean) => void) | null} */
    this.askFor = null;
    /** Ask the server for a comparison; null = there is none. @type {((of: Pair) => void) | null} */
    this.askToCompare = null;
    this.scheme = matchMedia("(prefers-color-scheme: dark)");
    this.scheme.addEventListener("change", () => this.update());
    this.reduced = { x: state.x, y: state.y };
    new ResizeObserver(() => this.#resized()).observe(byId("maps"));
  }

  // ------------------------------------------------------------------ what is chosen

  get dark() {
    return this.state.theme === "dark" || (this.state.theme === "auto" && this.scheme.matches);
  }

  /** Return the number of the text that the side shows. */
  get textNumber() {
    return this.state.text === "compare" ? 0 : Math.min(Number(this.state.text) || 0, Math.max(0, this.doc.texts.length - 1));
  }

  /** Return the lens that is shown: its number, "difference" or "side". The last lens, usually the tuned one, is the default. */
  get lensChoice() {
    const here = this.doc.of(this.textNumber);
    const { lens, text } = this.state;
    if (lens === "difference" && here.length > 1) return lens;
    if (lens === "side" && here.length > 1 && text !== "compare") return lens;
    return here.some((each) => String(each.lens) === lens) ? lens : String(here.at(-1)?.lens ?? 0);
  }

  /** Return the trajectories that are shown, the most important first. @returns {Named[]} */
  shown() {
    const choice = this.lensChoice;
    const both = choice === "difference" || choice === "side";
    if (this.state.text === "compare" && this.doc.texts.length > 1) {
      const lens = both ? (this.doc.of(0).at(-1)?.lens ?? 0) : Number(choice);
      return this.doc.texts.flatMap((list, n) => (list[lens] ? [{ name: `text ${NAMES[n]}, ${list[lens].lens}`, of: /** @type {[number, number]} */ ([n, lens]), trajectory: list[lens] }] : []));
    }
    const prefix = this.doc.texts.length > 1 ? `text ${NAMES[this.textNumber]}, ` : "";
    const text = this.textNumber;
    const here = this.doc.of(text).map(({ lens, trajectory }) => ({ name: prefix + trajectory.lens, of: /** @type {[number, number]} */ ([text, lens]), trajectory }));
    return both ? here.toReversed() : here.filter(({ of }) => String(of[1]) === choice);
  }

  /** Return the chosen cell: where the reader has put it, else where the last token's answer first comes on top. @returns {Cell | null} */
  get cursor() {
    const main = this.shown()[0]?.trajectory;
    if (!main?.length) return null;
    const given = this.state.cursor;
    if (given) return { row: Math.min(given.row, main.rows.length - 1), position: Math.min(given.position, main.length - 1) };
    const position = main.length - 1;
    const first = main.settled(main.topIds.at(main.rows.length - 1, position), position);
    return { row: first < 0 ? main.rows.length - 1 : first, position };
  }

  /** Return the followed tokens: those that the reader chose, else the model's answers at the chosen position. */
  get followed() {
    const at = this.cursor;
    if (this.state.follow) return this.state.follow;
    if (!at) return [];
    const answers = this.shown().filter(({ trajectory }) => at.position < trajectory.length).map(({ trajectory }) => trajectory.topIds.at(trajectory.rows.length - 1, at.position));
    return [...new Set(answers)];
  }

  /** Return which trajectories are compared on the maps: those whose difference they show. @returns {Pair | null} */
  compared() {
    const [a, b] = this.shown();
    const differ = this.state.text === "compare" ? a?.trajectory.length === b?.trajectory.length : this.lensChoice === "difference" || this.lensChoice === "side";
    return a && b && differ ? [a.of, b.of] : null;
  }

  /** Return the divergences of the trajectories that are compared. */
  activeComparison() {
    const of = this.compared();
    return of && this.doc.comparison(of);
  }

  /** Return the comparisons that the color shows, and that are not here in full. @returns {Pair[]} */
  missing() {
    const [kind, name] = this.state.statistic.split(":");
    if (kind === "layers") {
      const steps = this.shown().filter(({ trajectory }) => trajectory.rows.length > 2 && (trajectory.statistics.get(this.state.statistic)?.columns.length ?? 0) < trajectory.length);
      return steps.map(({ of }) => [of, of]);
    }
    const of = kind === "between" ? this.compared() : null;
    return of && (this.doc.comparison(of)?.get(name)?.columns.length ?? 0) < this.shown()[0].trajectory.length ? [of] : [];
  }

  /** Return the panels of the maps. */
  panels() {
    const shown = this.shown();
    const choice = this.lensChoice;
    const compare = this.state.text === "compare" && shown.length > 1;
    const wanted = this.state.statistic;
    const plain = wanted.startsWith("between:") ? "max_probability" : wanted;
    const difference = () => {
      const [a, b] = compare ? shown : [shown[0], shown[1]];
      const title = compare ? NAMES.join(" − ") : `${a.name} − ${b.name}`;
      return new DifferencePanel(a.trajectory, b.trajectory, wanted, title, this.activeComparison());
    };
    if (compare) {
      const maps = shown.map(({ name, trajectory }) => new Panel(trajectory, plain, name));
      return shown[0].trajectory.length === shown[1].trajectory.length ? [...maps, difference()] : maps;
    }
    if (choice === "difference" && shown.length > 1) return [difference()];
    if (choice === "side" && shown.length > 1) return [...shown.toReversed().map(({ name, trajectory }) => new Panel(trajectory, plain, name)), difference()];
    return shown.map(({ name, trajectory }) => new Panel(trajectory, plain, name));
  }

  /** Return the size of cells: what the reader chose, else what fits and can be read. */
  zoom() {
    if (this.state.zoom) return this.state.zoom;
    const box = this.maps[0]?.box;
    if (!box) return { cell: 74, row: 22 };
    const columns = Math.max(1, ...this.maps.map((map) => map.panel.length));
    const rows = this.maps[0].panel.rows.length;
    return { cell: Math.floor(Math.min(128, Math.max(54, (box.clientWidth - LEFT - 2) / columns))), row: Math.floor(Math.min(30, Math.max(16, (box.clientHeight - BOTTOM - 1) / rows))) };
  }

  /** Return colors and marks for the painter. @returns {Look} */
  look() {
    const style = getComputedStyle(document.documentElement);
    const [ground, ink, muted, line, accent] = ["--ground", "--ink", "--muted", "--line", "--accent"].map((name) => style.getPropertyValue(name).trim());
    const colors = lineColors(this.followed, this.dark);
    const followed = [...colors].map(([id, color]) => ({ id, color }));
    return { dark: this.dark, palette: this.state.palette, ground, ink, muted, line, accent, tokens: this.state.words === "token", hovered: this.hovered, cursor: this.cursor, followed, depth: this.state.depth };
  }

  /** Return what pictures say above the maps. */
  heading() {
    return `metalens · ${this.doc.title}`;
  }

  /** Return the address that shows this view. */
  link() {
    return `${location.href.replace(/#.*$/, "")}#${toHash(this.state)}`;
  }

  // ------------------------------------------------------------------ change

  /**
   * Take over a choice.
   * @param {Partial<State>} change
   */
  set(change) {
    Object.assign(this.state, change);
    this.update();
    this.complete();
  }

  /** Show a line where screen readers hear it. @param {string} text */
  say(text) {
    this.note = text;
    byId("said").textContent = text;
    this.#inspect();
  }

  /** Draw everything anew. */
  update() {
    document.documentElement.toggleAttribute("data-dark", this.dark);
    byId("model").textContent = this.doc.title;
    const known = statistics(this).map(({ value }) => value);
    if (known.length && !known.includes(this.state.statistic)) this.state.statistic = known.includes("max_probability") ? "max_probability" : known[0];
    const panels = this.panels();
    const tied = new Map();
    for (const panel of panels) {
      panel.scale = panel.ownScale();
      const key = `${panel.label} ${panel.scale.kind}`;
      tied.set(key, Math.max(tied.get(key) ?? 0, panel.scale.hi));
    }
    for (const panel of panels) panel.scale.hi = tied.get(`${panel.label} ${panel.scale.kind}`);
    this.#arrange(panels);
    byId("controls").hidden = !panels.length;
    controls(byId("controls"), this);
    byId("table-toggle").setAttribute("aria-pressed", String(this.state.table));
    for (const map of this.maps) map.refresh();
    if (!this.state.cursor && this.cursor) this.maps.forEach((map) => map.reveal({ row: map.panel.rows.length - 1, position: map.panel.length - 1 }));
    this.#inspect();
    this.remember();
  }

  /** @param {Panel[]} panels */
  #arrange(panels) {
    const place = byId("maps");
    const key = panels.map((panel) => panel.title).join("|");
    if (key === this.arranged && this.maps.length === panels.length) {
      panels.forEach((panel, i) => (this.maps[i].panel = panel));
      return;
    }
    const [x, y] = this.maps.length ? [this.maps[0].box.scrollLeft, this.maps[0].box.scrollTop] : [this.reduced.x, this.reduced.y];
    for (const map of this.maps) map.remove();
    this.arranged = key;
    this.maps = panels.map((panel) => new HeatMap(panel, this));
    place.replaceChildren(...this.maps.map((map) => map.element));
    if (!panels.length) place.append(el("p", { class: "empty" }, this.doc.live ? "Type a text above and read it. Every row is a layer, every column a token; each cell shows what the model would say next if it stopped at this layer." : "This page holds no text."));
    for (const map of this.maps) {
      map.refresh();
      [map.box.scrollLeft, map.box.scrollTop] = [x, y];
    }
  }

  #resized() {
    if (!this.state.zoom) for (const map of this.maps) map.refresh();
  }

  #inspect() {
    const place = byId("inspector");
    const at = this.cursor;
    const trajectories = this.shown().filter(({ trajectory }) => at && at.position < trajectory.length);
    place.hidden = !at || !trajectories.length;
    byId("table").hidden = !this.state.table || !at;
    if (!at || !trajectories.length) return;
    inspect(place, {
      cell: at, trajectories, followed: this.followed, dark: this.dark, palette: this.state.palette, along: this.state.along, note: this.note, live: Boolean(this.doc.live),
      follow: (id) => this.follow(id), moveTo: (cell) => this.moveTo(cell), setAlong: (along) => this.set({ along }), add: (text) => this.add(text),
    });
    if (this.state.table) byId("table").replaceChildren(readingTable(this.maps[0].panel, at, (cell) => this.moveTo(cell)));
  }

  /** Write the choices into the address, without an entry in the history. */
  remember() {
    if (this.maps[0]) [this.state.x, this.state.y] = [this.maps[0].box.scrollLeft, this.maps[0].box.scrollTop];
    clearTimeout(this.remembering);
    this.remembering = setTimeout(() => {
      try {
        history.replaceState(null, "", `#${toHash(this.state)}`);
      } catch {
        // a frame of a notebook has no address of its own
      }
    }, 200);
  }

  /**
   * Choose a cell.
   * @param {Cell} cell
   */
  moveTo(cell) {
    this.state.cursor = cell;
    for (const map of this.maps) {
      if (cell.position < map.panel.length) map.reveal(cell);
      map.draw();
    }
    const [{ trajectory }] = this.shown();
    const best = trajectory.top(cell.row, cell.position)[0];
    const { vocabulary, rows, tokens } = trajectory;
    const value = `${this.maps[0].panel.label} ${formatted(this.state.statistic, this.maps[0].panel.value(cell.row, cell.position))}`;
    byId("said").textContent = `${rows[cell.row].label}, after ${vocabulary.display(tokens[cell.position])}, position ${cell.position + trajectory.firstPosition}: ${vocabulary.display(best.id)}, ${percent(best.probability)}. ${value}`;
    this.note = "";
    this.#inspect();
    this.remember();
  }

  /**
   * Follow a token, or stop following it.
   * @param {number} id
   */
  follow(id) {
    const before = this.followed;
    this.note = "";
    if (!before.includes(id) && before.length >= MOST_FOLLOWED) return this.say(`${MOST_FOLLOWED} tokens can be followed at once. Remove one first.`);
    this.set({ follow: before.includes(id) ? before.filter((each) => each !== id) : [...before, id] });
  }

  /** Ask for what is shown and not known everywhere yet: curves first, then a comparison. */
  complete() {
    if (!this.askFor) return;
    const tokens = this.followed.filter((id) => this.shown().some(({ trajectory }) => !trajectory.knows(id)));
    if (tokens.length) return this.askFor(tokens, false);
    const [of] = this.missing();
    if (of) this.askToCompare?.(of);
  }

  /**
   * Follow a token that the reader typed: its text, or # and its id.
   * @param {string} typed
   */
  add(typed) {
    if (!typed) return;
    const id = /^#\d+$/.test(typed) ? Number(typed.slice(1)) : undefined;
    if (this.askFor) return this.askFor([id ?? typed], true);
    for (const [known, { text, display }] of this.doc.vocabulary.entries) if (known === id || text === typed || display === typed || text === ` ${typed}`) return this.followed.includes(known) ? this.say("This token is followed already.") : this.follow(known);
    this.say("This page does not know that token: it holds the most likely tokens only. Write the page with --token to add others, or start `metalens view` without --save.");
  }

  toggleTheme() {
    this.set({ theme: this.dark ? "light" : "dark" });
  }

  // ------------------------------------------------------------------ what the maps report

  /**
   * @param {Cell | null} cell
   * @param {HeatMap} map
   * @param {number} x
   * @param {number} y
   */
  pointed(cell, map, x, y) {
    const tip = byId("tip");
    const changed = cell?.row !== this.hovered?.row || cell?.position !== this.hovered?.position;
    this.hovered = cell;
    if (changed) for (const each of this.maps) each.draw();
    tip.hidden = !cell;
    if (!cell) return;
    if (changed) fillTip(tip, cell, map.panel, { palette: this.state.palette, dark: this.dark, lines: lineColors(this.followed, this.dark) });
    const [width, height] = [tip.offsetWidth, tip.offsetHeight];
    tip.style.left = `${x + 18 + width > innerWidth ? x - width - 14 : x + 18}px`;
    tip.style.top = `${Math.max(6, Math.min(y + 14, innerHeight - height - 6))}px`;
  }

  /** @param {HeatMap} from */
  scrolled(from) {
    if (this.syncing) return;
    this.syncing = true;
    for (const map of this.maps) if (map !== from) [map.box.scrollLeft, map.box.scrollTop] = [from.box.scrollLeft, from.box.scrollTop];
    this.syncing = false;
    this.remember();
  }

  /**
   * @param {number} factor
   * @param {HeatMap} [map]
   * @param {number} [clientX] the point that stays where it is; without it, the middle
   * @param {number} [clientY]
   * @param {"both" | "cell" | "row"} [only]
   */
  zoomBy(factor, map = this.maps[0], clientX, clientY, only = "both") {
    if (!map) return;
    const before = this.zoom();
    const after = clampedZoom(before.cell * (only === "row" ? 1 : factor), before.row * (only === "cell" ? 1 : factor));
    const box = map.box.getBoundingClientRect();
    const [x, y] = [clientX === undefined ? (box.width + LEFT) / 2 : clientX - box.left, clientY === undefined ? (box.height - BOTTOM) / 2 : clientY - box.top];
    const [column, row] = [(map.box.scrollLeft + x - LEFT) / before.cell, (map.box.scrollTop + y) / before.row];
    this.state.zoom = after;
    for (const each of this.maps) each.refresh();
    [map.box.scrollLeft, map.box.scrollTop] = [column * after.cell - x + LEFT, row * after.row - y];
    this.remember();
  }

  /** Show the whole text and all layers, as far as a cell is a pixel or more. */
  zoomToFit() {
    const box = this.maps[0]?.box;
    if (!box) return;
    const columns = Math.max(...this.maps.map((map) => map.panel.length));
    const zoom = clampedZoom((box.clientWidth - LEFT - 2) / columns, (box.clientHeight - BOTTOM - 1) / this.maps[0].panel.rows.length);
    this.set({ zoom: { cell: Math.min(zoom.cell, 128), row: Math.min(zoom.row, 30) } });
  }

  /** @param {Cell} cell */
  pinned(cell) {
    this.moveTo(cell);
  }
}
