// Build elements. Text only ever becomes text: nothing in this page parses HTML.

/**
 * @template {keyof HTMLElementTagNameMap} K
 * @param {K} tag
 * @param {Record<string, string | number | boolean | EventListener | undefined>} [attributes] "on..." are listeners; true and false set or leave out
 * @param {...(Node | string)} children
 * @returns {HTMLElementTagNameMap[K]}
 */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== undefined) node.setAttribute(name, String(value));
  }
  node.append(...children);
  return node;
}

/**
 * @param {string} tag
 * @param {Record<string, string | number>} [attributes]
 * @param {...(Node | string)} children
 */
export function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, String(value));
  node.append(...children);
  return node;
}

/**
 * Return a token as an element: in the font of tokens, and apart from the direction of the text around it.
 * @param {string} text
 */
export function tokenElement(text) {
  return el("bdi", { class: "token" }, text);
}

/**
 * Return an element of the page.
 * @param {string} id
 */
export function byId(id) {
  const found = document.getElementById(id);
  if (!found) throw new Error(`The page has no element ${id}.`);
  return found;
}

/**
 * Return a row of choices of which one is taken: radio buttons, so that arrow keys work.
 * @param {string} name
 * @param {string} legend what is chosen, for screen readers
 * @param {{value: string, label: string, disabled?: boolean, title?: string}[]} options
 * @param {string} chosen
 * @param {(value: string) => void} onChange
 */
export function segments(name, legend, options, chosen, onChange) {
  const set = el("fieldset", { class: "segments" }, el("legend", { class: "unseen" }, legend));
  for (const { value, label, disabled, title } of options) {
    const input = el("input", { type: "radio", name, value, checked: value === chosen, disabled: Boolean(disabled), onchange: () => onChange(value) });
    set.append(el("label", { title }, input, el("span", {}, label)));
  }
  return set;
}
