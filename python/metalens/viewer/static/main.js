// Start the page.

import { actions } from "./actions.js";
import { App } from "./app.js";
import { Doc } from "./document.js";
import { byId } from "./dom.js";
import { keyboard } from "./keyboard.js";
import { prompt } from "./prompt.js";
import { fromHash } from "./state.js";

/** @typedef {import("./document.js").DocumentJson} DocumentJson */

try {
  const json = /** @type {DocumentJson} */ (JSON.parse(byId("document").textContent ?? ""));
  const app = new App(new Doc(json), fromHash(location.hash, json.statistic ? { statistic: json.statistic } : {}));
  actions(byId("actions"), app);
  keyboard(app);
  app.update();
  if (json.live) prompt(app, json.live);
  document.documentElement.dataset.ready = "true";
} catch (error) {
  byId("message").hidden = false;
  byId("message").textContent = error instanceof Error ? error.message : String(error);
  throw error;
}
