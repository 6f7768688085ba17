// One text through one lens: what the page draws. Parts of a text join as they arrive.

import { Columns, unpack } from "./arrays.js";
import { nameOfStep } from "./statistics.js";

/** @typedef {import("./arrays.js").Packed} Packed */
/** @typedef {{label: string, unit: string, values: Packed, model?: Packed}} StatisticJson */
/** @typedef {{layer: number | string, label: string, translated: boolean}} LayerJson */
/** @typedef {{ids: number[], text: string[], display: string[]}} VocabularyJson */
/**
 * A saved trajectory, or a part of one.
 * @typedef {{
 *   format: string, version: number,
 *   model: {name: string | null, num_layers: number, vocab_size: number},
 *   lens: {name: string, path: string | null},
 *   layers: LayerJson[], first_position: number, token_ids: number[], target_ids?: number[],
 *   vocabulary: VocabularyJson,
 *   statistics: Record<string, StatisticJson>,
 *   top: {ids: Packed, log_probabilities: Packed, model: {ids: Packed, log_probabilities: Packed}},
 *   chosen: {ids: number[], log_probabilities: Packed, ranks: Packed, model: {log_probabilities: Packed, ranks: Packed}},
 * }} TrajectoryJson
 */
/** @typedef {{label: string, unit: string, columns: Columns}} Statistic */
/** @typedef {{of: [[number, number], [number, number]], statistics: Record<string, StatisticJson>}} ComparisonJson */
/** @typedef {{id: number, probability: number}} Guess */
/** @typedef {{probability: Columns, rank: Columns}} Followed */

/**
 * Return the probabilities of packed log-probabilities.
 * @param {Packed} packed
 */
const exponentials = (packed) => Float32Array.from(unpack(packed), Math.exp);

/** The text of tokens, for all trajectories of a page. */
export class Vocabulary {
  constructor() {
    /** @type {Map<number, {text: string, display: string}>} */
    this.entries = new Map();
  }

  /** @param {VocabularyJson} json */
  add(json) {
    json.ids.forEach((id, i) => this.entries.set(id, { text: json.text[i], display: json.display[i] }));
  }

  /**
   * Return a token as one visible line.
   * @param {number} id
   */
  display(id) {
    return this.entries.get(id)?.display ?? `<${id}>`;
  }

  /**
   * Return the exact text of a token.
   * @param {number} id
   */
  text(id) {
    return this.entries.get(id)?.text ?? `<${id}>`;
  }
}

/** Layers by positions of one text through one lens. The last row is the model's own answer. */
export class Trajectory {
  /**
   * @param {TrajectoryJson} json
   * @param {Vocabulary} vocabulary
   */
  constructor(json, vocabulary) {
    if (json.format !== "metalens.trajectory" || json.version !== 2) throw new Error(`This page reads trajectories of version 2, not ${json.format} ${json.version}.`);
    this.model = json.model;
    this.lens = json.lens.name;
    this.vocabulary = vocabulary;
    /** @type {(LayerJson & {model: boolean})[]} */
    this.rows = [...json.layers.map((layer) => ({ ...layer, model: false })), { layer: "model", label: "model", translated: true, model: true }];
    this.firstPosition = json.first_position;
    /** @type {number[]} */
    this.tokens = [];
    this.k = json.top.ids.shape[2];
    /** @type {Map<string, Statistic>} */
    this.statistics = new Map();
    this.topIds = new Columns(this.rows.length, this.k);
    this.topProbabilities = new Columns(this.rows.length, this.k);
    /** @type {Map<number, Followed>} */
    this.followed = new Map();
    for (const [name, { label, unit }] of Object.entries(json.statistics)) this.statistics.set(name, { label, unit, columns: new Columns(this.rows.length) });
    this.append(json);
  }

  /** Return the number of positions. */
  get length() {
    return this.tokens.length;
  }

  /**
   * Append a part: the columns after those that are here.
   * @param {TrajectoryJson} json
   */
  append(json) {
    const count = json.token_ids.length;
    if (json.layers.length !== this.rows.length - 1) throw new Error(`A part of ${json.layers.length} layers does not fit ${this.rows.length - 1} layers.`);
    this.vocabulary.add(json.vocabulary);
    for (const [name, { columns }] of this.statistics) {
      const part = json.statistics[name];
      if (!part) continue; // a comparison, which arrives alone
      const values = (/** @type {Packed} */ packed) => (name === "rank" ? Float32Array.from(unpack(packed), (v) => (v < 1 ? NaN : v)) : unpack(packed));
      columns.append(values(part.values), part.model ? values(part.model) : null, count);
    }
    this.topIds.append(unpack(json.top.ids), unpack(json.top.model.ids), count);
    this.topProbabilities.append(exponentials(json.top.log_probabilities), exponentials(json.top.model.log_probabilities), count);
    for (const id of json.token_ids) this.tokens.push(id);
    this.addFollowed(json.chosen, this.length - count, count);
  }

  /**
   * Add the divergences of every layer from the next one, for some positions. The last layer and the model's row have none.
   * @param {ComparisonJson} json
   * @param {number} start 0, or the position after those that are here
   */
  addSteps(json, start) {
    for (const [name, part] of Object.entries(json.statistics)) {
      const known = start ? this.statistics.get(`layers:${name}`) : undefined;
      const entry = known ?? { label: nameOfStep(name), unit: part.unit, columns: new Columns(this.rows.length) };
      this.statistics.set(`layers:${name}`, entry);
      const count = part.values.shape[1];
      const values = new Float32Array((this.rows.length - 1) * count).fill(NaN);
      values.set(unpack(part.values));
      if (entry.columns.length === start) entry.columns.append(values, null, count);
    }
  }

  /**
   * Add the curves of chosen tokens, for some positions.
   * @param {TrajectoryJson["chosen"]} chosen
   * @param {number} start 0, or the position after those that are here
   * @param {number} count
   */
  addFollowed(chosen, start, count) {
    const layers = this.rows.length - 1;
    const [probabilities, ranks] = [exponentials(chosen.log_probabilities), unpack(chosen.ranks)];
    const [ofModel, ranksOfModel] = [exponentials(chosen.model.log_probabilities), unpack(chosen.model.ranks)];
    chosen.ids.forEach((id, c) => {
      let entry = this.followed.get(id);
      if (entry && entry.probability.length !== start) entry = undefined;
      if (!entry) {
        if (start > 0) return; // known for a part only: the top-k speaks for it
        entry = { probability: new Columns(layers + 1), rank: new Columns(layers + 1) };
        this.followed.set(id, entry);
      }
      const cells = [c * layers * count, (c + 1) * layers * count];
      const ends = [c * count, (c + 1) * count];
      entry.probability.append(probabilities.subarray(cells[0], cells[1]), ofModel.subarray(ends[0], ends[1]), count);
      entry.rank.append(ranks.subarray(cells[0], cells[1]), ranksOfModel.subarray(ends[0], ends[1]), count);
    });
  }

  /**
   * Return the most likely tokens of a cell, most likely first.
   * @param {number} row
   * @param {number} position
   * @returns {Guess[]}
   */
  top(row, position) {
    return Array.from({ length: this.k }, (_, i) => ({ id: this.topIds.at(row, position, i), probability: this.topProbabilities.at(row, position, i) }));
  }

  /**
   * Return a statistic of a cell; NaN where it has no value.
   * @param {string} name
   * @param {number} row
   * @param {number} position
   */
  value(name, row, position) {
    if (name.startsWith("token:")) {
      const [, what, id] = name.split(":");
      const { probability, rank } = this.standing(Number(id), row, position);
      return what === "rank" ? rank : probability;
    }
    return this.statistics.get(name)?.columns.at(row, position) ?? NaN;
  }

  /**
   * Return whether the curves of a token are known everywhere, not only where it is among the top k.
   * @param {number} id
   */
  knows(id) {
    return this.followed.get(id)?.probability.length === this.length;
  }

  /**
   * Return probability and rank of a token in a cell; NaN where nothing is known of it.
   * @param {number} id
   * @param {number} row
   * @param {number} position
   * @returns {{probability: number, rank: number}}
   */
  standing(id, row, position) {
    const entry = this.followed.get(id);
    if (entry && position < entry.probability.length) return { probability: entry.probability.at(row, position), rank: entry.rank.at(row, position) };
    for (let i = 0; i < this.k; i++) {
      if (this.topIds.at(row, position, i) === id) return { probability: this.topProbabilities.at(row, position, i), rank: i + 1 };
    }
    return { probability: NaN, rank: NaN };
  }

  /**
   * Return the first row in which a token is on top and stays there up to the last layer; -1 = none.
   * @param {number} id
   * @param {number} position
   */
  settled(id, position) {
    let row = this.rows.length - 2;
    while (row >= 0 && this.topIds.at(row, position) === id) row--;
    return row === this.rows.length - 2 ? -1 : row + 1;
  }

  /**
   * Return the prediction depth of a position: the first row from which on the top token is the model's. The model's own row = never before.
   * @param {number} position
   */
  depth(position) {
    const row = this.settled(this.topIds.at(this.rows.length - 1, position), position);
    return row < 0 ? this.rows.length - 1 : row;
  }

  /**
   * Return the first row in which a token is on top; -1 = none.
   * @param {number} id
   * @param {number} position
   */
  firstOnTop(id, position) {
    for (let row = 0; row < this.rows.length - 1; row++) if (this.topIds.at(row, position) === id) return row;
    return -1;
  }
}
