// Lines of followed tokens: probability and rank, through the layers or along the text.

import { el, svg } from "./dom.js";
import { percent } from "./statistics.js";

/** @typedef {{x: number, y: number}} Point */
/** @typedef {{color: string, dashed: boolean, points: Point[], name: string}} Line */
/**
 * @typedef {{
 *   title: string, lines: Line[], steps: number, kind: "probability" | "rank", at: number,
 *   nameOf: (x: number) => string, onPick: (x: number) => void,
 * }} Chart
 */

const [WIDTH, HEIGHT] = [296, 104];
const PLOT = { left: 38, right: 6, top: 8, bottom: 18 };

/**
 * Return a path that is interrupted where a value is missing.
 * @param {Point[]} points in pixels
 */
function pathOf(points) {
  let pen = "M";
  return points
    .map(({ x, y }) => {
      if (!Number.isFinite(y)) {
        pen = "M";
        return "";
      }
      const step = `${pen}${x.toFixed(1)} ${y.toFixed(1)}`;
      pen = "L";
      return step;
    })
    .join("");
}

/**
 * Return a chart as an element. Probabilities go from 0 to 1; ranks are logarithmic, with the first on top.
 * @param {Chart} chart
 */
export function curve(chart) {
  const { steps, kind, at } = chart;
  const ranks = chart.lines.flatMap((line) => line.points.map((p) => p.y)).filter(Number.isFinite);
  const worst = kind === "rank" ? Math.max(10, ranks.reduce((a, b) => Math.max(a, b), 1)) : 1;
  const plotWidth = WIDTH - PLOT.left - PLOT.right;
  const plotHeight = HEIGHT - PLOT.top - PLOT.bottom;
  const px = (/** @type {number} */ x) => PLOT.left + (steps > 1 ? (x / (steps - 1)) * plotWidth : plotWidth / 2);
  const py = (/** @type {number} */ y) => PLOT.top + plotHeight * (kind === "rank" ? Math.log(y) / Math.log(worst) : 1 - y);
  const ticks = kind === "rank" ? [1, 10, 100, 1000, 10000, 100000].filter((tick) => tick <= worst) : [0, 0.5, 1];
  const root = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "curve", role: "img" });
  root.append(svg("title", {}, describe(chart)));
  for (const tick of ticks) {
    root.append(svg("line", { x1: PLOT.left, x2: WIDTH - PLOT.right, y1: py(tick), y2: py(tick), class: "rule" }));
    const label = kind === "rank" ? (tick >= 1000 ? `${tick / 1000}k` : String(tick)) : percent(tick);
    root.append(svg("text", { x: PLOT.left - 6, y: py(tick), dy: "0.34em", "text-anchor": "end" }, label));
  }
  const marks = steps > 1 ? [0, at, steps - 1] : [0];
  for (const x of new Set(marks)) {
    if (x !== at && Math.abs(px(x) - px(at)) < 58) continue;
    const end = x === 0 ? "start" : x === steps - 1 ? "end" : "middle";
    root.append(svg("text", { x: px(x), y: HEIGHT - 5, "text-anchor": steps > 1 ? end : "middle", class: x === at ? "at" : "" }, chart.nameOf(x)));
  }
  root.append(svg("line", { x1: px(at), x2: px(at), y1: PLOT.top, y2: HEIGHT - PLOT.bottom, class: "now" }));
  for (const line of chart.lines) {
    const points = line.points.map(({ x, y }) => ({ x: px(x), y: py(y) }));
    root.append(svg("path", { d: pathOf(points), fill: "none", stroke: line.color, "stroke-width": line.dashed ? 1.25 : 1.75, "stroke-dasharray": line.dashed ? "3 3" : "none", "stroke-linejoin": "round" }));
    points.forEach((p, i) => {
      const alone = !Number.isFinite(points[i - 1]?.y) && !Number.isFinite(points[i + 1]?.y);
      if (Number.isFinite(p.y) && (alone || line.points[i].x === at)) root.append(svg("circle", { cx: p.x, cy: p.y, r: line.points[i].x === at ? 2.75 : 1.5, fill: line.color }));
    });
  }
  root.addEventListener("click", (event) => {
    const box = root.getBoundingClientRect();
    const x = ((/** @type {MouseEvent} */ (event).clientX - box.left) / box.width) * WIDTH;
    chart.onPick(Math.min(steps - 1, Math.max(0, Math.round(((x - PLOT.left) / plotWidth) * (steps - 1)))));
  });
  return el("figure", {}, el("figcaption", {}, chart.title), root);
}

/**
 * Say what a chart shows, for screen readers.
 * @param {Chart} chart
 */
function describe({ title, lines, kind, at, nameOf }) {
  const values = lines.map((line) => {
    const y = line.points.find((p) => p.x === at)?.y ?? NaN;
    return `${line.name}${line.dashed ? ", other lens" : ""}: ${Number.isFinite(y) ? (kind === "rank" ? `rank ${Math.round(y)}` : percent(y)) : "not among the top tokens"}`;
  });
  return `${title}. At ${nameOf(at)}: ${values.join("; ")}`;
}
