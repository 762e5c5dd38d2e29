// Building and updating the page. Text of the router is only ever written as text.

export const byId = (id) => document.getElementById(id);

// Returns a new element. `properties` are set on it; a key with a hyphen, or `role`, is an attribute.
export function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name.includes("-") || name === "role") node.setAttribute(name, value);
    else if (name === "class") node.className = value;
    else node[name] = value;
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

// Returns a function that writes a text into a node, unless it is there already.
export function textWriter(node) {
  const text = document.createTextNode("");
  node.append(text);
  return (value) => { if (text.data !== value) text.data = value; };
}

export function setAttribute(node, name, value) {
  if (node.getAttribute(name) !== value) node.setAttribute(name, value);
}

export function setHidden(node, hidden) {
  if (node.hidden !== hidden) node.hidden = hidden;
}

// Makes the children of `parent` those of `keys`, in this order. Moves only what is out of place.
export function arrange(parent, nodes) {
  let next = parent.firstChild;
  for (const node of nodes) {
    if (node === next) next = next.nextSibling;
    else parent.insertBefore(node, next);
  }
  while (next) {
    const removed = next;
    next = next.nextSibling;
    removed.remove();
  }
}

// Tiles of a description list: a name, a value and a note each.
export class Tiles {
  constructor(list, names) {
    this.tiles = names.map(([name, title]) => {
      const value = el("dd", { class: "value" });
      const note = el("dd", { class: "note" });
      list.append(el("div", { class: "card tile", title }, el("dt", {}, name), value, note));
      return { value: textWriter(value), note: textWriter(note) };
    });
  }

  set(index, value, note = "") {
    this.tiles[index].value(value);
    this.tiles[index].note(note);
  }
}
