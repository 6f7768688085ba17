// The text at the top of a served page: read it, let the model go on, compare it with another, and stop.

import { byId, el } from "./dom.js";
import { Refused, ask } from "./live.js";
import { MOST_FOLLOWED } from "./state.js";

/** @typedef {import("./app.js").App} App */
/** @typedef {import("./live.js").Line} Line */
/** @typedef {import("./document.js").LiveJson} LiveJson */

/**
 * Build the form, and connect it to the page.
 * @param {App} app
 * @param {LiveJson} live
 */
export function prompt(app, live) {
  const form = /** @type {HTMLFormElement} */ (byId("prompt"));
  const message = byId("message");
  const text = (/** @type {number} */ n) => el("textarea", { rows: 1, name: "AB"[n], "aria-label": `Text ${"AB"[n]}`, placeholder: n ? "a second text, to compare" : "Type a text for the model", spellcheck: "false" });
  const [a, b] = [text(0), text(1)];
  const read = el("button", { type: "submit", class: "first" }, "Read");
  const count = el("input", { type: "number", min: 1, max: live.max_new_tokens, value: Math.min(20, live.max_new_tokens), "aria-label": "Tokens to generate", title: "tokens to generate" });
  const generate = el("button", { type: "button", onclick: () => start("generate") }, "Generate");
  const second = el("button", { type: "button", "aria-pressed": "false", title: "Read a second text beside it", onclick: () => compare(b.hidden) }, "Compare");
  const cancel = el("button", { type: "button", onclick: () => running?.abort() }, "Cancel");
  const progress = el("progress", { max: 1, value: 0, "aria-label": "Progress" });
  const state = el("p", { class: "state", role: "status" });
  /** @type {AbortController | null} */
  let running = null;

  const compare = (/** @type {boolean} */ on) => {
    b.hidden = !on;
    second.setAttribute("aria-pressed", String(on));
    generate.disabled = on || Boolean(running);
    if (on) b.focus();
  };

  const fail = (/** @type {unknown} */ error) => {
    message.hidden = false;
    message.textContent = error instanceof Error ? error.message : String(error);
  };

  /**
   * Run a job; show its lines as they arrive.
   * @param {string} path
   * @param {object} body
   * @param {(line: Line) => void} take
   * @param {() => void} [then] is called if all of it has arrived
   */
  const job = async (path, body, take, then) => {
    if (running) return;
    running = new AbortController();
    message.hidden = true;
    [read.disabled, generate.disabled, cancel.hidden, progress.hidden] = [true, true, false, false];
    const began = performance.now();
    let complete = false;
    try {
      state.textContent = "Waiting for the model …";
      progress.removeAttribute("value");
      for await (const line of ask(path, body, running.signal)) {
        if (line.type === "progress") {
          progress.value = line.total ? line.done / line.total : 0;
          state.textContent = `${line.what}: ${line.done} of ${line.total}`;
        } else take(line);
      }
      complete = true;
      state.textContent = `Done in ${((performance.now() - began) / 1000).toFixed(1)} s.`;
    } catch (error) {
      if (running.signal.aborted) state.textContent = "Cancelled. What had arrived is shown.";
      else {
        running.abort(); // the server need not go on with what the page does not take
        state.textContent = "";
        fail(error);
        if (!(error instanceof Refused)) throw error;
      }
    } finally {
      running = null;
      [read.disabled, generate.disabled, cancel.hidden, progress.hidden] = [false, !b.hidden, true, true];
    }
    if (complete) then?.();
  };

  let waiting = false;
  const drawSoon = () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      app.update();
    });
  };

  /** @type {(() => void) | null} what makes room for a new text, when the first of it arrives: a refused job leaves the old one */
  let makeRoom = null;
  const take = (/** @type {Line} */ line) => {
    makeRoom?.();
    makeRoom = null;
    if (line.type === "part") {
      app.doc.reading = line.reading;
      app.doc.add(line.text, line.lens, line.trajectory);
    } else if (line.type === "comparison") app.doc.compare(line.comparison, line.start);
    else if (line.type === "chosen") {
      const trajectory = app.doc.texts[line.text]?.[line.lens];
      // The server follows tokens in all of the text, also where a cancelled job has not read it.
      if (trajectory?.length !== line.total) throw new Refused("Not all of this text has been read, so no token can be followed in it. Read it again.");
      app.doc.vocabulary.add(line.vocabulary);
      if (!line.start) line.chosen.ids.forEach((id) => trajectory.followed.delete(id));
      trajectory.addFollowed(line.chosen, line.start, line.chosen.ranks.shape[2]);
    }
    drawSoon();
  };

  /** @type {string[]} the texts of the link, while they have not been read: its view is kept for them */
  let linked = [];
  const start = (/** @type {"read" | "generate"} */ what) => {
    const texts = b.hidden ? [a.value] : [a.value, b.value];
    if (running) return;
    if (texts.some((each) => !each)) return fail(new Refused("There is no text to read. Type one first."));
    const follow = app.state.follow ?? [];
    const keep = what === "read" && linked.length === texts.length && linked.every((each, n) => each === texts[n]);
    linked = [];
    makeRoom = () => {
      app.doc.clear();
      app.arranged = null;
      app.state.prompts = texts;
      if (!keep) Object.assign(app.state, { cursor: null, follow: null, zoom: null, text: texts.length > 1 ? "compare" : "0", x: 0, y: 0 });
    };
    const body = { texts, tokens: keep ? follow : [], ...(what === "generate" ? { new_tokens: Number(count.value) } : {}) };
    void job(what === "generate" ? "api/generate" : "api/read", body, take, () => {
      app.update();
      app.complete();
    });
  };

  app.askFor = (tokens, follow) => {
    if (running || !app.doc.texts.length) return;
    const found = (/** @type {Line} */ line) => {
      take(line);
      if (line.type === "chosen" && follow) app.state.follow = [...new Set([...app.followed, ...line.chosen.ids])].slice(-MOST_FOLLOWED);
    };
    void job("api/follow", { tokens, reading: app.doc.reading, shown: app.shown().map(({ of }) => of) }, found, () => app.complete());
  };
  app.askToCompare = (of) => {
    if (!running) void job("api/compare", { reading: app.doc.reading, of }, take, () => app.complete());
  };

  form.append(el("div", { class: "texts" }, a, b), el("div", { class: "doing" }, read, second, generate, count, cancel), progress, state);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    start("read");
  });
  for (const area of [a, b]) {
    area.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      start("read");
    });
  }
  [form.hidden, b.hidden, cancel.hidden, progress.hidden] = [false, true, true, true];
  const [first, other] = app.state.prompts;
  if (other !== undefined) {
    compare(true);
    b.value = other;
  }
  a.focus();
  if (first !== undefined) {
    a.value = first;
    linked = app.state.prompts;
    // A page from elsewhere can open any link. What it holds runs when the reader wants it, or wants it again.
    const [opened] = performance.getEntriesByType("navigation");
    if (opened instanceof PerformanceNavigationTiming && opened.type === "reload") start("read");
    else state.textContent = "This link holds a text. Press Enter to read it.";
  }
}
