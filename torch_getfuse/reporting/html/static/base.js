// -- base.js: figures, elements, numbers in words, and what is picked -----------------------

const figures = JSON.parse(document.getElementById("figures").textContent);

/** An HTML element; attributes that start with "on" are listeners, null ones are left out. */
function el(tag, attributes, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same of an SVG element. */
function svg(tag, attributes, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

/** As torch_getfuse.accelerator.format_size: 1024-based, at least three figures. */
function bytes(size) {
  if (Math.abs(size) < 1024) return `${size} B`;
  const [value, unit] = Math.abs(size) < 1048576 ? [size / 1024, "KB"] : [size / 1048576, "MB"];
  if (Number.isInteger(value)) return `${value} ${unit}`;
  const digits = String(Math.trunc(Math.abs(value))).length;
  const places = Math.max(0, 3 - digits);
  // Python rounds 62.25 to the even digit, toFixed away from zero.
  const scaled = Math.abs(value) * 10 ** places;
  const even = scaled % 2 === 0.5 ? Math.sign(value) * Math.floor(scaled) / 10 ** places : value;
  return `${even.toFixed(places)} ${unit}`;
}

const percent = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(1)}%` : "0%");
const counted = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;
const thousands = (number) => String(number).replace(/\B(?=(\d{3})+$)/g, ",");
const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);

/** A shape without the batch axis, which is one sample. */
const shape = (tensor) => (tensor.shape.length > 1 ? tensor.shape.slice(1) : tensor.shape).join("×");

/** A name that fits so many characters, shortened in its middle. */
function short(name, most) {
  if (name.length <= most) return name;
  const tail = Math.ceil((most - 1) / 2);
  return `${name.slice(0, most - 1 - tail)}…${name.slice(name.length - tail)}`;
}

/** The parts of a bar, from the bottom up. */
const PARTS = [
  ["weights", "weights"],
  ["lines", "lines of tensors"],
  ["residents", "tensors that stay"],
];

/** What the scripts know of a section beside its figures. */
class Section {
  constructor(form) {
    Object.assign(this, form);
    let shown = 0;
    this.units.forEach((unit, k) => {
      unit.k = k;
      unit.apart = unit.number === null;
      unit.title = unit.apart ? this.ops[unit.ops[0]].name : `${this.Noun} ${unit.number}`;
      unit.hue = Math.round(215 + shown * 137.508) % 360; // the golden angle: neighbours differ
      if (unit.fusable) shown += 1;
      unit.parts = Object.fromEntries(PARTS.map(([part]) => [part, 0]));
      for (const term of unit.terms) unit.parts[term.part] += term.bytes;
      unit.total = sum(unit.dram);
    });
    // Per tensor, the unit that makes it (null: an input of the graph) and those that read it.
    this.makers = this.tensors.map(({ maker }) => (maker === null ? null : this.ops[maker].unit));
    this.readers = this.tensors.map(({ readers }) => [...new Set(readers.map((op) => this.ops[op].unit))]);
    this.staying = this.tensors.map((t, k) => k).filter((k) => this.tensors[k].stay);
    this.opNamed = new Map(this.ops.map(({ name }, k) => [name, k]));
    const why = figures.explanation;
    this.why = why && why.fingerprint === this.fingerprint ? why : null;
    this.blame = this.why ? blameOf(this, this.why) : new Map();
  }

  get Noun() {
    return this.noun[0].toUpperCase() + this.noun.slice(1);
  }
}

/** "tensor:reader" -> scores of an edge by explainer, their mean, that as a share of the highest, cut. */
function blameOf(section, why) {
  const op = section.opNamed;
  const key = (edge) => `${section.ops[op.get(edge.producer)].writes}:${op.get(edge.consumer)}`;
  const found = new Map();
  for (const { explainer, edges } of why.explainers) {
    for (const edge of edges) {
      if (!found.has(key(edge))) found.set(key(edge), { edge, scores: {}, cut: false });
      found.get(key(edge)).scores[explainer] = edge.score;
    }
  }
  for (const edge of why.cut?.edges ?? []) {
    if (!found.has(key(edge))) found.set(key(edge), { edge, scores: {}, cut: false });
    found.get(key(edge)).cut = true;
  }
  const means = new Map(why.means.map(([producer, consumer, mean]) => [`${producer} ${consumer}`, mean]));
  const most = Math.max(...means.values(), 0) || 1;
  for (const entry of found.values()) {
    entry.mean = means.get(`${entry.edge.producer} ${entry.edge.consumer}`);
    entry.share = entry.mean / most;
  }
  return found;
}

// -- what is picked ------------------------------------------------------------------------

/** Operator, tensor or unit that all views show; each watcher is told of a change. */
const picked = {
  kind: null,
  id: null,
  watchers: [],
  set(kind, id, options = {}) {
    this.kind = kind;
    this.id = id;
    for (const watcher of this.watchers) watcher(kind, id, options);
  },
};

/** A button that looks like a link and picks something. */
function link(kind, id, text) {
  return el("button", {
    type: "button",
    class: "link",
    "data-pick": `${kind}:${id}`,
    onclick: () => picked.set(kind, id, { show: true }),
  }, text);
}
