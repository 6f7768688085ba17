// What one heat map shows: a statistic of one trajectory, or of the difference of two.

import { colorTable } from "./color.js";
import { DIVERGENCES, formatted, placeOf, robustMaximum, scalingOf, statisticOf } from "./statistics.js";

/** @typedef {import("./statistics.js").Scale} Scale */
/** @typedef {import("./trajectory.js").Trajectory} Trajectory */
/** @typedef {import("./trajectory.js").Statistic} Statistic */

export const SAME = "="; // both have the same top token

/** One heat map: rows from the first layer up, columns from the first token on. */
export class Panel {
  /**
   * @param {Trajectory} trajectory what the cells and the hover show
   * @param {string} statistic its name
   * @param {string} title
   */
  constructor(trajectory, statistic, title) {
    this.trajectory = trajectory;
    this.statistic = statistic;
    this.title = title;
    const { label, unit } = statisticOf(statistic, trajectory);
    this.label = label;
    this.unit = unit;
    /** @type {Scale} */
    this.scale = { lo: 0, hi: 1, kind: "linear" };
  }

  get length() {
    return this.trajectory.length;
  }

  get rows() {
    return this.trajectory.rows;
  }

  /**
   * Return the value of a cell.
   * @param {number} row
   * @param {number} position
   */
  value(row, position) {
    return this.trajectory.value(this.statistic, row, position);
  }

  /**
   * Return the word in a cell: its most likely token, or its value.
   * @param {number} row
   * @param {number} position
   * @param {boolean} tokens
   */
  word(row, position, tokens) {
    if (tokens) return this.trajectory.vocabulary.display(this.trajectory.topIds.at(row, position));
    return formatted(this.statistic, this.value(row, position));
  }

  /** Return how values are scaled if this panel alone is drawn. @returns {Scale} */
  ownScale() {
    const { kind, limits } = scalingOf(this.statistic.startsWith("token:rank") ? "rank" : this.statistic.startsWith("token:") ? "max_probability" : this.statistic);
    return { lo: limits[0], hi: limits[1] ?? Math.max(robustMaximum(this.values()), kind === "log" ? 2 : 0), kind };
  }

  /** Return all values, [positions, rows]. */
  values() {
    const known = this.trajectory.statistics.get(this.statistic);
    if (known && known.columns.length >= this.length) return known.columns.values.subarray(0, this.length * this.rows.length);
    const out = new Float32Array(this.length * this.rows.length);
    for (let t = 0, i = 0; t < this.length; t++) for (let r = 0; r < this.rows.length; r++) out[i++] = this.value(r, t);
    return out;
  }

  /**
   * Return a picture with one pixel for each cell, the last row on top.
   * @param {string} palette
   * @param {boolean} dark
   */
  picture(palette, dark) {
    const canvas = document.createElement("canvas");
    const [width, height] = [Math.max(1, this.length), this.rows.length];
    [canvas.width, canvas.height] = [width, height];
    const image = new ImageData(width, height);
    const table = colorTable(palette, dark, this.scale.kind === "signed");
    const values = this.values();
    for (let t = 0, i = 0; t < this.length; t++) {
      for (let r = 0; r < height; r++, i++) {
        const place = placeOf(values[i], this.scale);
        if (Number.isNaN(place)) continue; // transparent: the ground shows
        image.data.set([...table[Math.round(place * 255)], 255], 4 * ((height - 1 - r) * width + t));
      }
    }
    canvas.getContext("2d")?.putImageData(image, 0, 0);
    return canvas;
  }
}

/** The difference of two trajectories of equal length, or how far they are apart. */
export class DifferencePanel extends Panel {
  /**
   * @param {Trajectory} trajectory a
   * @param {Trajectory} other b
   * @param {string} statistic a statistic of both, drawn as a - b; or kl, reverse_kl, js, tv of the comparison, as "between:js"
   * @param {string} title
   * @param {Map<string, Statistic> | null} comparison
   */
  constructor(trajectory, other, statistic, title, comparison) {
    super(trajectory, statistic, title);
    this.other = other;
    const name = statistic.startsWith("between:") ? statistic.slice(8) : null;
    /** What is drawn if it is a divergence; it may arrive later. @type {(Partial<Statistic> & {label: string, unit: string}) | null} */
    this.between = name === null ? null : (comparison?.get(name) ?? DIVERGENCES[name] ?? null);
    if (this.between) [this.label, this.unit] = [this.between.label, this.between.unit];
    else this.label = `difference of ${this.label}`;
  }

  /** @override */
  get length() {
    return Math.min(this.trajectory.length, this.other.length);
  }

  /**
   * @override
   * @param {number} row
   * @param {number} position
   */
  value(row, position) {
    if (this.between) return this.between.columns?.at(row, position) ?? NaN;
    return this.trajectory.value(this.statistic, row, position) - this.other.value(this.statistic, row, position);
  }

  /**
   * @override
   * @param {number} row
   * @param {number} position
   * @param {boolean} tokens
   */
  word(row, position, tokens) {
    const [mine, theirs] = [this.trajectory.topIds.at(row, position), this.other.topIds.at(row, position)];
    if (tokens) return mine === theirs ? SAME : this.trajectory.vocabulary.display(mine);
    const value = this.value(row, position);
    if (this.between || !Number.isFinite(value)) return Number.isFinite(value) ? value.toFixed(2) : "–";
    const points = this.statistic === "max_probability" || this.statistic.startsWith("token:probability");
    const size = points ? `${(100 * Math.abs(value)).toFixed(0)}` : this.statistic.endsWith("rank") || this.statistic.startsWith("token:rank") ? Math.abs(value).toFixed(0) : Math.abs(value).toFixed(2);
    return Number(size) ? `${value > 0 ? "+" : "−"}${size}` : "0";
  }

  /** @override @returns {Scale} */
  ownScale() {
    if (this.between) {
      const { limits } = scalingOf(this.statistic.slice(8));
      return { lo: 0, hi: limits[1] ?? robustMaximum(this.values()), kind: "linear" };
    }
    return { lo: 0, hi: robustMaximum(this.values()), kind: "signed" };
  }

  /** @override */
  values() {
    const out = new Float32Array(this.length * this.rows.length);
    for (let t = 0, i = 0; t < this.length; t++) for (let r = 0; r < this.rows.length; r++) out[i++] = this.value(r, t);
    return out;
  }
}
