// One heat map on the page: a canvas as large as its window, in a box that scrolls. Only what is seen is drawn, however long the text is.

import { el } from "./dom.js";
import { legend } from "./legend.js";
import { BOTTOM, LEFT, paint } from "./painter.js";
import { CanvasSurface } from "./surfaces.js";

/** @typedef {import("./painter.js").Cell} Cell */
/** @typedef {import("./painter.js").Look} Look */
/** @typedef {import("./panel.js").Panel} Panel */
/** @typedef {import("./painter.js").View} View */
/**
 * @typedef {{
 *   look(): Look, zoom(): {cell: number, row: number},
 *   pointed(cell: Cell | null, map: HeatMap, x: number, y: number): void, pinned(cell: Cell): void,
 *   scrolled(from: HeatMap): void, zoomBy(factor: number, map: HeatMap, x: number, y: number, only: "both" | "cell" | "row"): void,
 * }} Host
 */

/** A panel in its scrolling box. */
export class HeatMap {
  /**
   * @param {Panel} panel
   * @param {Host} host
   */
  constructor(panel, host) {
    this.panel = panel;
    this.host = host;
    this.canvas = el("canvas", { "aria-hidden": "true" });
    this.extent = el("div", { class: "extent" }, this.canvas);
    this.box = el("div", { class: "box" }, this.extent);
    this.caption = el("figcaption");
    this.element = el("figure", { class: "map" }, this.caption, this.box);
    this.box.addEventListener("scroll", () => {
      host.scrolled(this);
      this.draw();
    }, { passive: true });
    this.box.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
    this.canvas.addEventListener("pointermove", (event) => host.pointed(this.cellAt(event.offsetX, event.offsetY), this, event.clientX, event.clientY));
    this.canvas.addEventListener("pointerleave", () => host.pointed(null, this, 0, 0));
    this.canvas.addEventListener("click", (event) => {
      const cell = this.cellAt(event.offsetX, event.offsetY);
      if (cell) host.pinned(cell);
    });
    this.observer = new ResizeObserver(() => this.draw());
    this.observer.observe(this.box);
    this.waiting = false;
    /** @type {HTMLCanvasElement | null} */
    this.picture = null;
    this.drawn = ""; // palette and ground of the picture
  }

  /** @param {WheelEvent} event */
  #wheel(event) {
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    this.host.zoomBy(Math.exp(-event.deltaY * 0.0025), this, event.clientX, event.clientY, event.altKey ? "row" : event.shiftKey ? "cell" : "both");
  }

  /**
   * Return the cell at a point of the canvas.
   * @param {number} x
   * @param {number} y
   * @returns {Cell | null}
   */
  cellAt(x, y) {
    const { cell, row } = this.host.zoom();
    if (x < LEFT || y > this.box.clientHeight - BOTTOM) return null;
    const position = Math.floor((x - LEFT + this.box.scrollLeft) / cell);
    const above = Math.floor((y + this.box.scrollTop) / row);
    if (position < 0 || position >= this.panel.length || above < 0 || above >= this.panel.rows.length) return null;
    return { row: this.panel.rows.length - 1 - above, position };
  }

  /** Return the window on the cells. @returns {View} */
  view() {
    return { x: this.box.scrollLeft, y: this.box.scrollTop, width: this.box.clientWidth, height: this.box.clientHeight, ...this.host.zoom() };
  }

  /** Take over that values, colors or the zoom have changed. */
  refresh() {
    const { cell, row } = this.host.zoom();
    this.picture = null;
    const { palette, dark } = this.host.look();
    this.caption.replaceChildren(el("span", {}, this.panel.title), legend(this.panel, palette, dark));
    this.extent.style.width = `${LEFT + Math.ceil(this.panel.length * cell) + 1}px`;
    this.extent.style.height = `${Math.ceil(this.panel.rows.length * row) + BOTTOM}px`;
    this.draw();
  }

  /** Draw with the next frame. */
  draw() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => {
      this.waiting = false;
      if (this.element.isConnected) this.#draw();
    });
  }

  #draw() {
    const look = this.host.look();
    const view = this.view();
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = [Math.round(view.width * ratio), Math.round(view.height * ratio)];
    if (this.canvas.width !== width || this.canvas.height !== height) {
      [this.canvas.width, this.canvas.height] = [width, height];
      [this.canvas.style.width, this.canvas.style.height] = [`${view.width}px`, `${view.height}px`];
    }
    const context = this.canvas.getContext("2d", { alpha: false });
    if (!context) return;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    const key = `${look.palette} ${look.dark}`;
    if (!this.picture || this.drawn !== key) this.picture = this.panel.picture(look.palette, look.dark);
    this.drawn = key;
    paint(new CanvasSurface(context), this.panel, this.picture, view, look);
  }

  /**
   * Scroll so that a cell is seen.
   * @param {Cell} at
   */
  reveal({ row, position }) {
    const { cell, row: height } = this.host.zoom();
    const [width, tall] = [this.box.clientWidth - LEFT, this.box.clientHeight - BOTTOM];
    const [x, y] = [position * cell, (this.panel.rows.length - 1 - row) * height];
    if (x < this.box.scrollLeft) this.box.scrollLeft = x;
    else if (x + cell > this.box.scrollLeft + width) this.box.scrollLeft = x + cell - width;
    if (y < this.box.scrollTop) this.box.scrollTop = y;
    else if (y + height > this.box.scrollTop + tall) this.box.scrollTop = y + height - tall;
  }

  /** Stop watching. */
  remove() {
    this.observer.disconnect();
    this.element.remove();
  }
}
