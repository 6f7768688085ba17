// All that a page shows: one or two texts, each through one or two lenses, and how far they are apart.

import { Trajectory, Vocabulary } from "./trajectory.js";

/** @typedef {import("./trajectory.js").TrajectoryJson} TrajectoryJson */
/** @typedef {import("./panel.js").ComparisonJson} ComparisonJson */
/** @typedef {{lenses: string[], max_tokens: number, max_new_tokens: number}} LiveJson */
/** @typedef {{format: string, version: number, title: string, texts: {name: string, trajectories: TrajectoryJson[]}[], comparisons: ComparisonJson[], live: LiveJson | null}} DocumentJson */

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
    /** @type {ComparisonJson[]} */
    this.comparisons = [];
    json.texts.forEach(({ trajectories }, text) => trajectories.forEach((each, lens) => this.add(text, lens, each)));
    this.comparisons = json.comparisons;
  }

  /** Forget all texts. */
  clear() {
    this.reading = "";
    this.vocabulary = new Vocabulary();
    this.texts = [];
    this.comparisons = [];
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
   * Return the comparison of two trajectories.
   * @param {[number, number]} a text and lens
   * @param {[number, number]} b
   */
  comparison(a, b) {
    return this.comparisons.find(({ of }) => of[0].join() === a.join() && of[1].join() === b.join()) ?? null;
  }
}
