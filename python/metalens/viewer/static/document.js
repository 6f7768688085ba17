// All that a page shows: one or two texts, each through one or two lenses, and how far they are apart.

import { Columns, unpack } from "./arrays.js";
import { Trajectory, Vocabulary } from "./trajectory.js";

/** @typedef {import("./trajectory.js").TrajectoryJson} TrajectoryJson */
/** @typedef {import("./trajectory.js").ComparisonJson} ComparisonJson */
/** @typedef {import("./trajectory.js").Statistic} Statistic */
/** @typedef {[[number, number], [number, number]]} Pair two trajectories, as the numbers of their text and their lens */
/** @typedef {{lenses: string[], max_tokens: number, max_new_tokens: number}} LiveJson */
/** @typedef {{format: string, version: number, title: string, texts: {name: string, trajectories: TrajectoryJson[]}[], comparisons: ComparisonJson[], live: LiveJson | null, statistic?: string | null}} DocumentJson */

/** The texts of a page. */
export class Doc {
  /** @param {DocumentJson} json */
  constructor(json) {
    if (json.format !== "metalens.view" || json.version !== 1) throw new Error(`This page shows documents of version 1, not ${json.format} ${json.version}.`);
    this.title = json.title;
    this.live = json.live;
    this.reading = ""; // names the texts to the server; "" = it has read none
    this.vocabulary = new Vocabulary();
    /** @type {(Trajectory | undefined)[][]} one list for each text, one entry for each lens */
    this.texts = [];
    /** {trajectories that are compared: their divergences}. @type {Map<string, Map<string, Statistic>>} */
    this.comparisons = new Map();
    json.texts.forEach(({ trajectories }, text) => trajectories.forEach((each, lens) => this.add(text, lens, each)));
    for (const comparison of json.comparisons) this.compare(comparison, 0);
  }

  /** Forget all texts. */
  clear() {
    this.reading = "";
    this.vocabulary = new Vocabulary();
    this.texts = [];
    this.comparisons = new Map();
  }

  /**
   * Add a trajectory, or the next part of one.
   * @param {number} text
   * @param {number} lens
   * @param {TrajectoryJson} json
   */
  add(text, lens, json) {
    const list = (this.texts[text] ??= []);
    const known = list[lens];
    if (known) known.append(json);
    else list[lens] = new Trajectory(json, this.vocabulary);
  }

  /**
   * Add a comparison, or the next part of one. Of a trajectory with itself, it is that of every layer with the next one.
   * @param {ComparisonJson} json
   * @param {number} start 0, or the position after those that are here
   */
  compare(json, start) {
    const [[text, lens], other] = json.of;
    if (other.join() === [text, lens].join()) return this.texts[text]?.[lens]?.addSteps(json, start);
    const key = json.of.join(";");
    const known = (start ? this.comparisons.get(key) : undefined) ?? new Map();
    this.comparisons.set(key, known);
    for (const [name, { label, unit, values }] of Object.entries(json.statistics)) {
      const [rows, count] = values.shape;
      const entry = known.get(name) ?? { label, unit, columns: new Columns(rows + 1) };
      known.set(name, entry);
      if (entry.columns.length === start) entry.columns.append(unpack(values), null, count);
    }
  }

  /** Return the names of the lenses. */
  get lenses() {
    const count = this.texts.reduce((most, list) => Math.max(most, list.length), 0);
    return Array.from({ length: count }, (_, lens) => this.texts.map((list) => list[lens]).find((each) => each)?.lens ?? this.live?.lenses[lens] ?? `lens ${lens}`);
  }

  /**
   * Return the trajectories of a text that are here, with the numbers of their lenses.
   * @param {number} text
   */
  of(text) {
    return (this.texts[text] ?? []).flatMap((trajectory, lens) => (trajectory ? [{ lens, trajectory }] : []));
  }

  /**
   * Return the divergences of two trajectories that are here.
   * @param {Pair} of
   */
  comparison(of) {
    return this.comparisons.get(of.join(";")) ?? null;
  }
}
