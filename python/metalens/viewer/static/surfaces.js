// Two things to draw on, with the same verbs: a canvas, and an SVG text. The painter does not know which.

export const MONO = 'ui-monospace, "SF Mono", "Cascadia Mono", "JetBrains Mono", Menlo, Consolas, "DejaVu Sans Mono", "Noto Sans Mono", monospace';
export const SANS = 'ui-sans-serif, system-ui, -apple-system, "Segoe UI", "Helvetica Neue", "Noto Sans", "DejaVu Sans", sans-serif';

/** @typedef {{color: string, size: number, align?: "left" | "center" | "right", mono?: boolean, weight?: number, turned?: boolean}} TextStyle */
/**
 * @typedef {{
 *   rect(x: number, y: number, w: number, h: number, color: string): void,
 *   frame(x: number, y: number, w: number, h: number, color: string, width: number): void,
 *   dot(x: number, y: number, radius: number, color: string): void,
 *   text(text: string, x: number, y: number, style: TextStyle): void,
 *   bitmap(image: HTMLCanvasElement, from: [number, number, number, number], to: [number, number, number, number]): void,
 *   clipped(x: number, y: number, w: number, h: number, draw: () => void): void,
 * }} Surface
 */

/**
 * Draw on a canvas.
 * @implements {Surface}
 */
export class CanvasSurface {
  /** @param {CanvasRenderingContext2D} context */
  constructor(context) {
    this.context = context;
    /** @type {string | undefined} */
    this.font = undefined;
    context.imageSmoothingEnabled = false;
    context.textBaseline = "middle";
  }

  /** @type {Surface["rect"]} */
  rect(x, y, w, h, color) {
    this.context.fillStyle = color;
    this.context.fillRect(x, y, w, h);
  }

  /** @type {Surface["frame"]} */
  frame(x, y, w, h, color, width) {
    this.context.strokeStyle = color;
    this.context.lineWidth = width;
    this.context.strokeRect(x, y, w, h);
  }

  /** @type {Surface["dot"]} */
  dot(x, y, radius, color) {
    this.context.fillStyle = color;
    this.context.beginPath();
    this.context.arc(x, y, radius, 0, 2 * Math.PI);
    this.context.fill();
  }

  /** @type {Surface["text"]} */
  text(text, x, y, style) {
    const { context } = this;
    const font = `${style.weight ?? 400} ${style.size}px ${style.mono ? MONO : SANS}`;
    if (this.font !== font) context.font = this.font = font; // setting a font is slow
    context.fillStyle = style.color;
    context.textAlign = style.align ?? "left";
    if (!style.turned) return context.fillText(text, x, y);
    context.save();
    context.translate(x, y);
    context.rotate(-Math.PI / 2);
    context.fillText(text, 0, 0);
    context.restore();
  }

  /** @type {Surface["bitmap"]} */
  bitmap(image, from, to) {
    this.context.drawImage(image, ...from, ...to);
  }

  /** @type {Surface["clipped"]} */
  clipped(x, y, w, h, draw) {
    this.context.save();
    this.context.beginPath();
    this.context.rect(x, y, w, h);
    this.context.clip();
    draw();
    this.context.restore();
    this.font = undefined;
  }
}

/** @param {string} text */
function escaped(text) {
  // XML 1.0 has no control characters, also not as entities.
  return text.replace(/[\u0000-\u0008\u000b\u000c\u000e-\u001f\ufffe\uffff]/g, "\ufffd").replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);
}

/** @param {number} value */
const short = (value) => Number(value.toFixed(2));

/**
 * Write SVG.
 * @implements {Surface}
 */
export class SvgSurface {
  /**
   * @param {number} width
   * @param {number} height
   */
  constructor(width, height) {
    this.width = width;
    this.height = height;
    /** @type {string[]} */
    this.parts = [];
    this.clips = 0;
  }

  /** @type {Surface["rect"]} */
  rect(x, y, w, h, color) {
    this.parts.push(`<rect x="${short(x)}" y="${short(y)}" width="${short(w)}" height="${short(h)}" fill="${color}"/>`);
  }

  /** @type {Surface["frame"]} */
  frame(x, y, w, h, color, width) {
    this.parts.push(`<rect x="${short(x)}" y="${short(y)}" width="${short(w)}" height="${short(h)}" fill="none" stroke="${color}" stroke-width="${width}"/>`);
  }

  /** @type {Surface["dot"]} */
  dot(x, y, radius, color) {
    this.parts.push(`<circle cx="${short(x)}" cy="${short(y)}" r="${radius}" fill="${color}"/>`);
  }

  /** @type {Surface["text"]} */
  text(text, x, y, style) {
    const anchor = { left: "start", center: "middle", right: "end" }[style.align ?? "left"];
    const turn = style.turned ? ` transform="rotate(-90 ${short(x)} ${short(y)})"` : "";
    const font = escaped(style.mono ? MONO : SANS);
    this.parts.push(
      `<text x="${short(x)}" y="${short(y)}" dy="0.35em" font-family="${font}" font-size="${style.size}" font-weight="${style.weight ?? 400}" fill="${style.color}" text-anchor="${anchor}"${turn}>${escaped(text)}</text>`,
    );
  }

  /** @type {Surface["bitmap"]} */
  bitmap(image, [sx, sy, sw, sh], [x, y, w, h]) {
    const [left, top] = [Math.floor(sx), Math.floor(sy)];
    const part = document.createElement("canvas");
    [part.width, part.height] = [Math.ceil(sx + sw) - left, Math.ceil(sy + sh) - top];
    part.getContext("2d")?.drawImage(image, -left, -top);
    const [cw, rh] = [w / sw, h / sh];
    this.parts.push(
      `<image x="${short(x - (sx - left) * cw)}" y="${short(y - (sy - top) * rh)}" width="${short(part.width * cw)}" height="${short(part.height * rh)}" preserveAspectRatio="none" style="image-rendering:pixelated" href="${part.toDataURL()}"/>`,
    );
  }

  /** @type {Surface["clipped"]} */
  clipped(x, y, w, h, draw) {
    const id = `clip${++this.clips}`;
    this.parts.push(`<clipPath id="${id}"><rect x="${short(x)}" y="${short(y)}" width="${short(w)}" height="${short(h)}"/></clipPath><g clip-path="url(#${id})">`);
    draw();
    this.parts.push("</g>");
  }

  /** Return the picture as an SVG file. */
  toString() {
    return `<svg xmlns="http://www.w3.org/2000/svg" width="${this.width}" height="${this.height}" viewBox="0 0 ${this.width} ${this.height}">${this.parts.join("")}</svg>`;
  }
}
