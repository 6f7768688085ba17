// The page's side of `metalens view`: one job at a time, whose results arrive line by line.

/** @typedef {import("./trajectory.js").TrajectoryJson} TrajectoryJson */
/** @typedef {import("./trajectory.js").ComparisonJson} ComparisonJson */
/**
 * A line of the answer.
 * @typedef {{type: "progress", done: number, total: number, what: string}
 *   | {type: "part", text: number, lens: number, reading: string, trajectory: TrajectoryJson}
 *   | {type: "chosen", text: number, lens: number, start: number, total: number, chosen: TrajectoryJson["chosen"], vocabulary: TrajectoryJson["vocabulary"]}
 *   | {type: "comparison", start: number, comparison: ComparisonJson}
 *   | {type: "done"}
 *   | {type: "error", message: string}} Line
 */

/** An answer that says what was wrong, in words for people. */
export class Refused extends Error {}

/**
 * Ask the server for something, and return its answer line by line.
 * @param {string} path
 * @param {object} body
 * @param {AbortSignal} signal
 * @returns {AsyncGenerator<Line>}
 */
export async function* ask(path, body, signal) {
  /** @type {Response} */
  let response;
  try {
    response = await fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal });
  } catch (error) {
    if (signal.aborted) throw error;
    throw new Refused("The server does not answer. Is `metalens view` still running?");
  }
  if (!response.ok || !response.body) throw new Refused(await response.text());
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  while (true) {
    const { done, value } = await reader.read();
    const lines = (rest + (value ?? "")).split("\n");
    rest = done ? "" : (lines.pop() ?? "");
    for (const line of lines) {
      if (!line) continue;
      const found = /** @type {Line} */ (JSON.parse(line));
      if (found.type === "error") throw new Refused(found.message);
      yield found;
    }
    if (done) return;
  }
}
