// Color maps that are even in lightness, so that people with any color vision can read them, and in gray.

/** @typedef {[number, number, number]} Rgb */

/** Stops from "little" to "much". @type {Record<string, {light: string[], dark: string[]}>} */
const SEQUENTIAL = {
  ink: {
    light: ["#f4f2ec", "#dbe3e6", "#b3cbd9", "#83adc8", "#508ab2", "#286797", "#114673", "#08284a"],
    dark: ["#1b1e23", "#1d3244", "#21496a", "#2d6690", "#4a87b2", "#78a9cb", "#adcbe0", "#e6f0f5"],
  },
  viridis: same(["#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39", "#fde725"]),
  cividis: same(["#00224e", "#213b6e", "#4c546c", "#6c6e72", "#8d8878", "#b0a473", "#d6c35f", "#fee838"]),
  gray: {
    light: ["#f7f7f5", "#dcdcda", "#bcbcba", "#989896", "#727270", "#4d4d4c", "#2c2c2b", "#0f0f0f"],
    dark: ["#1b1d20", "#323437", "#4b4d50", "#66686b", "#848689", "#a4a6a8", "#c8c9cb", "#f2f2f3"],
  },
};

/** From "less" to "more". Orange and blue stay apart in every common color vision. */
const DIVERGING = {
  light: ["#7a3a06", "#b5651d", "#dda56b", "#f1ddc4", "#f6f4ef", "#ccdbe6", "#86adcb", "#3f7aa8", "#0f4474"],
  dark: ["#ffc58a", "#e0944a", "#a8652a", "#5c3d22", "#1f2125", "#23405a", "#2f6c9c", "#62a0d0", "#b9def7"],
};

/** Lines of followed tokens: Okabe and Ito's colors, without those that are faint on this ground. */
export const LINES = {
  light: ["#d55e00", "#0072b2", "#009e73", "#cc79a7", "#8a6d00", "#5b5b5b"],
  dark: ["#ff8c42", "#56b4e9", "#2fc79b", "#e79bc6", "#e6c84f", "#b8b8b8"],
};

export const PALETTES = Object.keys(SEQUENTIAL);

/** @param {string[]} stops */
function same(stops) {
  return { light: stops, dark: stops };
}

/**
 * Return 256 colors between stops.
 * @param {string[]} stops
 * @returns {Rgb[]}
 */
function between(stops) {
  const points = stops.map((stop) => [1, 3, 5].map((i) => parseInt(stop.slice(i, i + 2), 16)));
  return Array.from({ length: 256 }, (_, i) => {
    const at = (i / 255) * (points.length - 1);
    const low = Math.min(points.length - 2, Math.floor(at));
    return /** @type {Rgb} */ (points[low].map((c, j) => Math.round(c + (at - low) * (points[low + 1][j] - c))));
  });
}

/** @type {Map<string, Rgb[]>} */
const tables = new Map();

/**
 * Return the 256 colors of a map.
 * @param {string} palette
 * @param {boolean} dark
 * @param {boolean} signed whether values have two directions
 * @returns {Rgb[]}
 */
export function colorTable(palette, dark, signed) {
  const key = `${signed ? "signed" : palette} ${dark}`;
  let table = tables.get(key);
  if (!table) {
    const stops = signed ? DIVERGING : (SEQUENTIAL[palette] ?? SEQUENTIAL.ink);
    table = between(dark ? stops.dark : stops.light);
    tables.set(key, table);
  }
  return table;
}

/** @param {Rgb} rgb */
export function css([r, g, b]) {
  return `rgb(${r},${g},${b})`;
}

/**
 * Return black or white, the better contrast (WCAG's relative luminance).
 * @param {Rgb} rgb
 */
export function inkOn(rgb) {
  const [r, g, b] = rgb.map((c) => ((c / 255 + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.18 ? "#111315" : "#ffffff";
}
