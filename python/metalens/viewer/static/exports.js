// Take things away: PNG, SVG, CSV, a link.

import { el } from "./dom.js";
import { nameOf } from "./legend.js";
import { paint } from "./painter.js";
import { CanvasSurface, SvgSurface } from "./surfaces.js";

/** @typedef {import("./heatmap.js").HeatMap} HeatMap */
/** @typedef {import("./painter.js").Look} Look */
/** @typedef {import("./painter.js").View} View */
/** @typedef {import("./surfaces.js").Surface} Surface */
/** @typedef {import("./trajectory.js").Trajectory} Trajectory */

const TITLE = 34;
const GAP = 18;

/**
 * Draw all maps side by side, with their titles, as they are seen on the page.
 * @param {(width: number, height: number) => Surface} surfaceOf
 * @param {HeatMap[]} maps
 * @param {Look} look
 * @param {string} heading
 * @param {(map: number, draw: (on: Surface, view: View) => void) => void} place calls back with a surface whose origin is that of the map
 */
function compose(surfaceOf, maps, look, heading, place) {
  const views = maps.map((map) => map.view());
  const width = views.reduce((sum, view) => sum + view.width + GAP, -GAP);
  const height = Math.max(...views.map((view) => view.height)) + 2 * TITLE;
  const on = surfaceOf(width, height);
  on.rect(0, 0, width, height, look.ground);
  on.text(heading, 8, TITLE / 2, { color: look.ink, size: 13, weight: 600 });
  maps.forEach((map, n) => {
    place(n, (surface, view) => {
      surface.text(`${map.panel.title} — ${nameOf(map.panel)}`, 8, -TITLE / 2, { color: look.muted, size: 12 });
      paint(surface, map.panel, map.picture ?? map.panel.picture(look.palette, look.dark), view, look);
    });
  });
  return on;
}

/**
 * Return the left edge of each map in a picture of all.
 * @param {HeatMap[]} maps
 */
function edges(maps) {
  let x = 0;
  return maps.map((map) => {
    const left = x;
    x += map.view().width + GAP;
    return left;
  });
}

/**
 * Return what is seen as a PNG picture, at twice the resolution.
 * @param {HeatMap[]} maps
 * @param {Look} look
 * @param {string} heading
 * @returns {Promise<Blob>}
 */
export function png(maps, look, heading) {
  const canvas = document.createElement("canvas");
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  const lefts = edges(maps);
  const still = { ...look, hovered: null };
  compose(
    (width, height) => {
      [canvas.width, canvas.height] = [2 * width, 2 * height];
      context.scale(2, 2);
      return new CanvasSurface(context);
    },
    maps,
    still,
    heading,
    (n, draw) => {
      context.setTransform(2, 0, 0, 2, 2 * lefts[n], 4 * TITLE);
      draw(new CanvasSurface(context), maps[n].view());
    },
  );
  return new Promise((resolve, reject) => canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("The browser could not make the picture."))), "image/png"));
}

/**
 * Return what is seen as SVG. Texts stay texts.
 * @param {HeatMap[]} maps
 * @param {Look} look
 * @param {string} heading
 * @returns {string}
 */
export function svgPicture(maps, look, heading) {
  const lefts = edges(maps);
  /** @type {SvgSurface | null} */
  let surface = null;
  compose(
    (width, height) => (surface = new SvgSurface(width, height)),
    maps,
    { ...look, hovered: null },
    heading,
    (n, draw) => {
      surface?.parts.push(`<g transform="translate(${lefts[n]} ${2 * TITLE})">`);
      if (surface) draw(surface, maps[n].view());
      surface?.parts.push("</g>");
    },
  );
  return String(surface);
}

/**
 * Return a field of CSV. Spreadsheets take =, +, - and @ at the start of a text for a formula: an apostrophe goes before them.
 * @param {string | number} value
 */
export function csvField(value) {
  if (typeof value === "number") return Number.isFinite(value) ? String(value) : "";
  const inert = /^[=+\-@\t\r]/.test(value) ? `'${value}` : value;
  return /[",\r\n']/.test(inert) ? `"${inert.replaceAll('"', '""')}"` : inert;
}

/**
 * Return all numbers of trajectories as CSV, one line for each layer and position.
 * @param {{name: string, trajectory: Trajectory}[]} trajectories
 */
export function csv(trajectories) {
  const names = [...trajectories[0].trajectory.statistics.keys()];
  const lines = [["text_and_lens", "layer", "position", "token_id", "token", "top_id", "top_token", "top_probability", ...names].join(",")];
  for (const { name, trajectory } of trajectories) {
    const { vocabulary } = trajectory;
    for (let r = 0; r < trajectory.rows.length; r++) {
      for (let t = 0; t < trajectory.length; t++) {
        const [best] = trajectory.top(r, t);
        const fields = [name, trajectory.rows[r].layer, t + trajectory.firstPosition, trajectory.tokens[t], vocabulary.text(trajectory.tokens[t]), best.id, vocabulary.text(best.id), best.probability];
        lines.push([...fields, ...names.map((each) => trajectory.value(each, r, t))].map(csvField).join(","));
      }
    }
  }
  return `${lines.join("\r\n")}\r\n`;
}

/**
 * Save a file as downloads do.
 * @param {Blob} blob
 * @param {string} name
 */
export function save(blob, name) {
  const link = el("a", { href: URL.createObjectURL(blob), download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

/**
 * Copy to the clipboard. Where the browser does not allow it, save a file.
 * @param {Blob} blob
 * @param {string} name of the file
 * @returns {Promise<"copied" | "saved">}
 */
export async function copyOrSave(blob, name) {
  try {
    if (blob.type === "image/png") await navigator.clipboard.write([new ClipboardItem({ "image/png": blob })]);
    else await navigator.clipboard.writeText(await blob.text());
    return "copied";
  } catch {
    save(blob, name);
    return "saved";
  }
}
