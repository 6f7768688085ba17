// What the color can show: names, scales and formats of statistics.

/** @typedef {import("./trajectory.js").Trajectory} Trajectory */
/** @typedef {"linear" | "log" | "signed"} Kind */
/** @typedef {{lo: number, hi: number, kind: Kind}} Scale */
/** @typedef {{label: string, unit: string, kind: Kind, limits: [number, number | null]}} Statistic */

/** How each statistic of a trajectory is scaled. null = the largest value that is drawn. @type {Record<string, {kind: Kind, limits: [number, number | null]}>} */
const SCALES = {
  max_probability: { kind: "linear", limits: [0, 1] },
  entropy: { kind: "linear", limits: [0, null] },
  kl: { kind: "linear", limits: [0, null] },
  reverse_kl: { kind: "linear", limits: [0, null] },
  cross_entropy: { kind: "linear", limits: [0, null] },
  rank: { kind: "log", limits: [1, null] },
  agrees: { kind: "linear", limits: [0, 1] },
  log_prob_difference: { kind: "signed", limits: [0, null] },
  js: { kind: "linear", limits: [0, Math.LN2] },
  tv: { kind: "linear", limits: [0, 1] },
};

/** The divergences of a comparison, for a page that can still ask for them. @type {Record<string, {label: string, unit: string}>} */
export const DIVERGENCES = {
  kl: { label: "KL(a || b)", unit: "nats" },
  reverse_kl: { label: "KL(b || a)", unit: "nats" },
  js: { label: "Jensen-Shannon divergence", unit: "nats" },
  tv: { label: "total variation", unit: "" },
};
const TO_NEXT = { kl: "KL(layer || next layer)", reverse_kl: "KL(next layer || layer)" };

/**
 * Return the name of a divergence between a layer and the next one.
 * @param {string} name as in DIVERGENCES
 */
export function nameOfStep(name) {
  return /** @type {Record<string, string>} */ (TO_NEXT)[name] ?? `${DIVERGENCES[name]?.label ?? name}, to the next layer`;
}

/**
 * Return what is known of a statistic.
 * @param {string} name its name in a document, or token:probability:ID, token:rank:ID, or layers:js for a divergence between a layer and the next one
 * @param {Trajectory} trajectory
 * @returns {Statistic}
 */
export function statisticOf(name, trajectory) {
  if (name.startsWith("token:")) {
    const [, what, id] = name.split(":");
    const label = `${what} of ${trajectory.vocabulary.display(Number(id))}`;
    return { label, unit: "", ...(what === "rank" ? SCALES.rank : SCALES.max_probability) };
  }
  const divergence = name.startsWith("layers:") ? name.slice(7) : null;
  const expected = divergence ? { label: nameOfStep(divergence), unit: DIVERGENCES[divergence]?.unit ?? "" } : { label: name, unit: "" };
  const { label, unit } = trajectory.statistics.get(name) ?? expected;
  return { label, unit, ...scalingOf(name) };
}

/**
 * Return how a statistic is scaled.
 * @param {string} name
 */
export function scalingOf(name) {
  return SCALES[name.replace(/^(between|layers):/, "")] ?? { kind: /** @type {Kind} */ ("linear"), limits: /** @type {[number, null]} */ ([0, null]) };
}

/**
 * Return the largest size of the finite values of some cells. The 0.5 percent above it do not stretch the scale.
 * @param {Float32Array} values
 */
export function robustMaximum(values) {
  const step = Math.max(1, Math.floor(values.length / 20000));
  const sizes = [];
  for (let i = 0; i < values.length; i += step) if (Number.isFinite(values[i])) sizes.push(Math.abs(values[i]));
  if (!sizes.length) return 1;
  sizes.sort((a, b) => a - b);
  return sizes[Math.min(sizes.length - 1, Math.floor(sizes.length * 0.995))] || 1;
}

/**
 * Return where a value lies on a scale: 0 to 1, NaN for no value.
 * @param {number} value
 * @param {Scale} scale
 */
export function placeOf(value, { lo, hi, kind }) {
  if (Number.isNaN(value)) return NaN;
  const part =
    kind === "log" ? (Math.log(value) - Math.log(lo)) / (Math.log(hi) - Math.log(lo) || 1) : kind === "signed" ? 0.5 + value / (2 * hi || 1) : (value - lo) / (hi - lo || 1);
  return Math.min(1, Math.max(0, part));
}

/**
 * Return the value at a place of a scale, for its legend.
 * @param {number} place 0 to 1
 * @param {Scale} scale
 */
export function valueAt(place, { lo, hi, kind }) {
  if (kind === "log") return Math.exp(Math.log(lo) + place * (Math.log(hi) - Math.log(lo)));
  return kind === "signed" ? (2 * place - 1) * hi : lo + place * (hi - lo);
}

/** @param {number} p a probability */
export function percent(p) {
  if (!Number.isFinite(p)) return "–";
  if (p === 0 || p === 1) return `${100 * p} %`;
  if (p < 0.0001) return "<0.01 %";
  return `${(100 * p).toFixed(p < 0.01 ? 2 : p < 0.1 ? 1 : 0)} %`;
}

/**
 * Return a number as people read it.
 * @param {string} name of its statistic
 * @param {number} value
 */
export function formatted(name, value) {
  if (!Number.isFinite(value)) return "–";
  if (name === "agrees") return value ? "yes" : "no";
  if (name === "max_probability" || name.startsWith("token:probability")) return percent(value);
  if (name.endsWith("rank") || name.startsWith("token:rank")) return Math.round(value).toLocaleString("en-US");
  return value.toFixed(Math.abs(value) < 10 ? 2 : 1);
}
