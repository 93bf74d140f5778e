// -- graph.js: the operator graph, drawn in SVG ----------------------------------------------

const START_OPEN = 400; // operators up to which a graph starts with all its units open

/** The graph of a section: its element, and what the keyboard and the toolbar do with it. */
class Graph {
  constructor(section) {
    this.section = section;
    this.boxes = new Map();
    this.drawn = new Map(); // name -> element, of open and closed units, ends, edges and labels
    this.paths = new Map(); // element of an open unit -> the edges in it
    const many = section.ops.length > START_OPEN;
    this.open = new Set(many ? [] : section.units.filter((unit) => !unit.apart).map((unit) => unit.k));
    this.view = svg("g", {});
    this.edgeLayer = svg("g", { class: "edges" });
    this.unitLayer = svg("g", { class: "units" });
    this.view.append(this.edgeLayer, this.unitLayer);
    this.canvas = svg("svg", {
      class: "canvas",
      tabindex: 0,
      role: "application",
      "aria-label": "Operator graph. Arrow keys move, Enter opens or closes a unit.",
    }, arrowHeads(), this.view);
    this.map = el("canvas", { class: "minimap", "aria-hidden": "true" });
    this.tip = el("div", { class: "tip", role: "status", hidden: true });
    this.element = el("div", { class: "graph" }, this.canvas, this.map, this.tip);
    this.zoom = libraries.zoom()
      .scaleExtent([0.02, 3])
      .extent(() => [[0, 0], [this.size().width, this.size().height]])
      .filter((event) => (event.type === "wheel" ? event.ctrlKey || event.metaKey : !event.button))
      .on("zoom", ({ transform }) => this.moved(transform));
    this.transform = libraries.zoomIdentity;
    this.selection = libraries.select(this.canvas);
    this.selection.call(this.zoom).on("dblclick.zoom", null);
    this.seen = null;
    new ResizeObserver(() => {
      this.seen = null;
      this.drawMap();
    }).observe(this.element);
    this.listen();
    this.layout();
  }

  // -- layout and drawing --------------------------------------------------------------------

  /** Lay out and draw anew; what is drawn of units that stay as they are is kept. */
  layout() {
    const made = arrangeGraph(this.section, this.open, this.boxes);
    this.made = made;
    this.edges = new Map(); // tensor -> its paths
    const units = [];
    for (const [key, place] of made.places) {
      const element = typeof key === "number" ? this.unit(key) : this.end(key, place);
      element.setAttribute("transform", `translate(${place.x} ${place.y})`);
      units.push(element);
      for (const path of this.paths.get(element) ?? []) this.keep(path);
    }
    replace(this.unitLayer, units);
    const between = made.edges.map(({ tensor, points, to }) => {
      const path = this.once(`${tensor}:${to}`, () => this.edge(tensor, points, this.skips(tensor, to)));
      path.setAttribute("d", curve(points));
      this.keep(path);
      return path;
    });
    replace(this.edgeLayer, [...between, ...this.labels()]);
    this.mark();
    this.drawMap();
  }

  /** Shape and size beside the start of each edge that has room for them. */
  labels() {
    const starts = new Map(); // unit -> x of the edges that leave it
    for (const { from, points } of this.made.edges) {
      if (!starts.has(from)) starts.set(from, []);
      starts.get(from).push(points[0].x);
    }
    const done = new Set();
    return this.made.edges.flatMap(({ tensor: t, from, to, points: [{ x, y }, , next] }) => {
      if (from === null || to === null || done.has(t) || next.x - x > 12) return [];
      const tensor = this.section.tensors[t];
      const text = `${shape(tensor)}  ${bytes(tensor.bytes)}`;
      if (starts.get(from).some((other) => other > x && other - x < text.length * letter.small)) return [];
      done.add(t);
      const label = this.once(`label${t}`, () => svg("text", { class: `label ${tensor.place}` }, text));
      label.setAttribute("x", x + 5);
      label.setAttribute("y", y + 13);
      return [label];
    });
  }

  /** Whether an edge into a unit is a skip connection for each operator there that reads it. */
  skips(tensor, unit) {
    const readers = this.section.tensors[tensor].readers.map((k) => this.section.ops[k]);
    const own = readers.filter((op) => op.unit === unit);
    return own.length > 0 && own.every((op) => op.reads.find((read) => read.tensor === tensor).skip);
  }

  keep(path) {
    const tensor = Number(path.dataset.tensor);
    if (!this.edges.has(tensor)) this.edges.set(tensor, []);
    this.edges.get(tensor).push(path);
  }

  edge(tensor, points, skip, op = null) {
    const { place } = this.section.tensors[tensor];
    const blame = op === null ? null : this.section.blame.get(`${tensor}:${op}`);
    const names = ["edge", place, skip && "skip", blame && "blamed", blame?.cut && "cut"];
    const path = svg("path", {
      d: curve(points),
      class: names.filter(Boolean).join(" "),
      "data-tensor": tensor,
      "marker-end": `url(#head-${place})`,
      style: blame ? `--blame:${blame.share.toFixed(3)}` : null,
    });
    return path;
  }

  /** What was drawn before under a name, or what is drawn now. */
  once(name, draw) {
    if (!this.drawn.has(name)) this.drawn.set(name, draw());
    return this.drawn.get(name);
  }

  /** The element of a unit as it is now, open or closed. */
  unit(k) {
    const open = this.open.has(k);
    return this.once(`${k}${open ? "+" : "-"}`, () => this.drawUnit(this.section.units[k], this.made.box(k), open));
  }

  drawUnit(unit, box, open) {
    const { w, h } = box;
    const [left, top] = [-w / 2, -h / 2];
    const text = unitText(this.section, unit);
    const names = ["unit", open ? "open" : "closed", unit.fusable ? "" : "unfusable"];
    const element = svg("g", { class: names.join(" "), "data-unit": unit.k, style: `--hue:${unit.hue}` },
      svg("rect", { class: "body", x: left, y: top, width: w, height: h, rx: 8 }));
    if (unit.apart) {
      element.append(
        svg("text", { class: "title", x: 0, y: top + 20, "text-anchor": "middle" }, text[0]),
        svg("text", { class: "small", x: 0, y: top + 37, "text-anchor": "middle" }, text[1]));
      return element;
    }
    const share = Math.min(1, unit.buffer / this.section.buffer);
    element.append(
      svg("path", { class: "header", d: header(left, top, w, open ? HEADER - 5 : h, open ? 0 : 8) }),
      svg("text", { class: "title", x: left + 12, y: top + 19 }, text[0]),
      svg("text", { class: "small", x: left + 12, y: top + 34 }, text[1]),
      svg("text", { class: "fold", x: left + w - 18, y: top + 20, "data-fold": unit.k }, open ? "−" : "+"),
      svg("rect", { class: "foldhit", x: left + w - 34, y: top + 2, width: 32, height: 30, rx: 6, "data-fold": unit.k },
        svg("title", {}, open ? "close" : "open")));
    if (!open) element.append(svg("text", { class: "small", x: left + 12, y: top + 48 }, text[2]));
    if (unit.fusable) {
      const y = open ? top + HEADER - 11 : top + h - 6;
      element.append(
        svg("rect", { class: "gauge", x: left + 8, y, width: w - 16, height: 3, rx: 1.5 }),
        svg("rect", { class: "used", x: left + 8, y, width: (w - 16) * share, height: 3, rx: 1.5 }));
    }
    if (!open) return element;
    const paths = box.edges.map(({ tensor, points, op }) => {
      const skip = op !== null && this.section.ops[op].reads.find((read) => read.tensor === tensor).skip;
      return this.edge(tensor, points, skip, op);
    });
    this.paths.set(element, paths);
    element.append(...paths);
    for (const [k, place] of box.ops) element.append(this.drawOp(k, place));
    return element;
  }

  drawOp(k, { x, y, w }) {
    const [name, small] = opText(this.section, this.section.ops[k]);
    const op = this.section.ops[k];
    return svg("g", { class: `op ${op.unfusable ? "unfusable" : ""}`, "data-op": k, transform: `translate(${x} ${y})` },
      svg("rect", { x: -w / 2, y: -OP / 2, width: w, height: OP, rx: 5 }),
      svg("text", { class: "name", y: -4, "text-anchor": "middle" }, name),
      svg("text", { class: "small", y: 12, "text-anchor": "middle" }, small));
  }

  /** An input or output of the graph. */
  end(key, { w, h }) {
    return this.once(key, () => {
      const tensor = Number(key.replace(/\D+/, ""));
      const { name } = this.section.tensors[tensor];
      return svg("g", { class: "end", "data-tensor": tensor },
        svg("rect", { x: -w / 2, y: -h / 2, width: w, height: h, rx: h / 2 }),
        svg("text", { class: "small", y: 4, "text-anchor": "middle" }, `${short(name, 24)}  ${shape(this.section.tensors[tensor])}`));
    });
  }

  // -- what is picked --------------------------------------------------------------------------

  /** Mark what is picked, and the edges that touch it. */
  mark() {
    for (const element of this.view.querySelectorAll(".picked, .near")) element.classList.remove("picked", "near");
    const { kind, id } = picked;
    if (kind === null) return;
    const { section } = this;
    const unit = kind === "op" && !this.open.has(section.ops[id].unit) ? section.ops[id].unit : null;
    const chosen = unit === null ? `[data-${kind}="${id}"]` : `[data-unit="${unit}"]`;
    for (const element of this.view.querySelectorAll(chosen)) element.classList.add("picked");
    let near = [];
    if (kind === "op") near = [...section.ops[id].reads.map((read) => read.tensor), section.ops[id].writes];
    if (kind === "unit") {
      const { ins, outs } = unitPorts(section, section.units[id]);
      near = [...ins, ...outs];
    }
    for (const tensor of near) for (const path of this.edges.get(tensor) ?? []) path.classList.add("near");
  }

  /** Centre of an operator, tensor or unit on the drawing; a closed unit stands for its operators. */
  centre(kind, id) {
    if (kind === "unit") return this.made.places.get(id);
    if (kind === "tensor") {
      const { maker, readers } = this.section.tensors[id];
      if (maker === null) return this.made.places.get(`in${id}`) ?? this.centre("op", readers[0] ?? 0);
      return this.centre("op", maker);
    }
    const unit = this.section.ops[id].unit;
    const place = this.made.places.get(unit);
    const inside = this.made.box(unit).ops?.get(id);
    return inside ? { x: place.x + inside.x, y: place.y + inside.y } : place;
  }

  /** Bring what is picked into sight, at a scale at which it can be read. */
  show(kind, id) {
    const { x, y } = this.centre(kind, id);
    const { width, height } = this.size();
    const scale = Math.max(this.transform.k, Math.min(1, width / 420));
    const tall = kind === "unit" ? Math.min(this.made.places.get(id).h / 2, height / scale / 2 - 20) : 0;
    const top = kind === "unit" ? y - this.made.places.get(id).h / 2 + tall : y;
    this.to(libraries.zoomIdentity.translate(width / 2 - scale * x, height / 2 - scale * top).scale(scale));
  }

  toggle(k, open = !this.open.has(k)) {
    if (this.section.units[k].apart || open === this.open.has(k)) return;
    const before = this.made.places.get(k);
    if (open) this.open.add(k);
    else this.open.delete(k);
    this.layout();
    const after = this.made.places.get(k);
    // The header stays where it was, under the pointer.
    const { k: scale, x, y } = this.transform;
    this.to(libraries.zoomIdentity.translate(
      x + scale * (before.x - after.x),
      y + scale * (before.y - before.h / 2 - after.y + after.h / 2),
    ).scale(scale));
  }

  all(open) {
    this.open = new Set(open ? this.section.units.filter((unit) => !unit.apart).map((unit) => unit.k) : []);
    this.layout();
    this.start();
  }

  // -- moving ------------------------------------------------------------------------------------

  /** Width and height of the canvas; what the map covers of its width is left out. */
  size() {
    this.seen ??= {
      width: this.element.clientWidth - this.map.offsetWidth - 8,
      height: this.element.clientHeight,
    };
    return this.seen;
  }

  to(transform) {
    this.selection.call(this.zoom.transform, transform);
  }

  moved(transform) {
    this.transform = transform;
    this.hint(null);
    this.view.setAttribute("transform", transform.toString());
    this.drawMap();
  }

  /** The top of the graph at a scale at which it can be read. */
  start() {
    const { width } = this.size();
    const scale = Math.min(1, Math.max(0.55, (width - 40) / this.made.width));
    // A wide graph is centred on its first box.
    const centre = this.made.width * scale > width ? [...this.made.places.values()][0].x : this.made.width / 2;
    this.to(libraries.zoomIdentity.translate(width / 2 - scale * centre, 16).scale(scale));
  }

  fit() {
    const { width, height } = this.size();
    const scale = Math.min(1, (width - 40) / this.made.width, (height - 32) / this.made.height);
    this.to(libraries.zoomIdentity.translate(width / 2 - scale * this.made.width / 2, 16).scale(scale));
  }

  by(factor) {
    this.selection.call(this.zoom.scaleBy, factor);
  }

  // -- the map at the side -------------------------------------------------------------------

  drawMap() {
    if (this.mapped) return;
    this.mapped = true;
    requestAnimationFrame(() => {
      this.mapped = false;
      this.paintMap();
    });
  }

  paintMap() {
    const { clientWidth: width, clientHeight: height } = this.map;
    if (!width) return;
    const ratio = devicePixelRatio || 1;
    if (this.map.width !== width * ratio) this.map.width = width * ratio;
    if (this.map.height !== height * ratio) this.map.height = height * ratio;
    const pen = this.map.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    const scale = Math.min((width - 8) / this.made.width, (height - 8) / this.made.height);
    // Long graphs are narrow on the map: their boxes are drawn wider than they are.
    const wide = Math.min(scale * 6, (width - 8) / this.made.width);
    const left = (width - wide * this.made.width) / 2;
    this.scaled = { scale, wide, left };
    for (const [key, { x, y, w, h }] of this.made.places) {
      const unit = typeof key === "number" ? this.section.units[key] : null;
      pen.fillStyle = unit ? (unit.fusable ? `hsl(${unit.hue} 50% 55%)` : "#d4483b") : "#8a8f98";
      pen.fillRect(left + wide * (x - w / 2), 4 + scale * (y - h / 2), Math.max(1, wide * w), Math.max(1, scale * h - 0.5));
    }
    const { k, x, y } = this.transform;
    const seen = this.size();
    pen.strokeStyle = getComputedStyle(this.map).color;
    pen.lineWidth = 1.5;
    pen.strokeRect(
      left + wide * (-x / k), 4 + scale * (-y / k), wide * (seen.width / k), Math.max(4, scale * (seen.height / k)),
    );
  }

  // -- pointer and keyboard --------------------------------------------------------------------

  listen() {
    const what = (target) => {
      for (const kind of ["fold", "op", "tensor", "unit"]) {
        const found = target.closest?.(`[data-${kind}]`);
        if (found) return [kind, Number(found.dataset[kind])];
      }
      return [null, null];
    };
    this.canvas.addEventListener("click", ({ target }) => {
      const [kind, id] = what(target);
      if (kind === "fold") this.toggle(id);
      else if (kind === "unit" && picked.kind === "unit" && picked.id === id && !this.open.has(id)) this.toggle(id);
      else picked.set(kind, id);
    });
    this.canvas.addEventListener("dblclick", ({ target }) => {
      const [kind, id] = what(target);
      if (kind === "unit") this.toggle(id);
    });
    this.canvas.addEventListener("pointermove", (event) => {
      const [kind, id] = what(event.target);
      this.hint(event.pointerType === "mouse" && kind !== "fold" ? kind : null, id, event);
    });
    this.canvas.addEventListener("pointerleave", () => this.hint(null));
    this.canvas.addEventListener("wheel", (event) => {
      if (event.ctrlKey || event.metaKey) return;
      const { height } = this.size();
      const { k, y } = this.transform;
      const ends = event.deltaY > 0 ? y + k * this.made.height <= height - 16 : y >= 16;
      if (ends && Math.abs(event.deltaY) > Math.abs(event.deltaX)) return; // the page scrolls on
      event.preventDefault();
      this.selection.call(this.zoom.translateBy, -event.deltaX / k, -event.deltaY / k);
    }, { passive: false });
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    const jump = (event) => {
      if (!event.buttons || !this.scaled) return;
      const { left, top } = this.map.getBoundingClientRect();
      const { scale, wide, left: start } = this.scaled;
      const { width, height } = this.size();
      const { k } = this.transform;
      const x = (event.clientX - left - start) / wide;
      const y = (event.clientY - top - 4) / scale;
      this.to(libraries.zoomIdentity.translate(width / 2 - k * x, height / 2 - k * y).scale(k));
    };
    this.map.addEventListener("pointerdown", (event) => {
      this.map.setPointerCapture(event.pointerId);
      jump(event);
    });
    this.map.addEventListener("pointermove", jump);
  }

  key(event) {
    const pan = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] }[event.key];
    if (pan && event.shiftKey) this.selection.call(this.zoom.translateBy, (-60 * pan[0]) / this.transform.k, (-60 * pan[1]) / this.transform.k);
    else if (pan) this.step(...pan);
    else if (event.key === "Enter" && picked.kind !== null) {
      if (picked.kind === "unit") this.toggle(picked.id);
      if (picked.kind === "op") this.toggle(this.section.ops[picked.id].unit);
    } else if (event.key === "+" || event.key === "=") this.by(1.3);
    else if (event.key === "-") this.by(1 / 1.3);
    else if (event.key === "f") this.fit();
    else if (event.key === "e") this.all(true);
    else if (event.key === "c") this.all(false);
    else if (event.key === "Escape") picked.set(null, null);
    else return;
    event.preventDefault();
  }

  /** Pick the nearest box in a direction: operators of open units, and closed units. */
  step(dx, dy) {
    const boxes = [];
    for (const unit of this.section.units) {
      if (this.open.has(unit.k)) for (const k of unit.ops) boxes.push(["op", k]);
      else boxes.push(["unit", unit.k]);
    }
    const standsFor = picked.kind === "op" && !this.open.has(this.section.ops[picked.id].unit);
    const now = standsFor ? ["unit", this.section.ops[picked.id].unit] : [picked.kind, picked.id];
    if (now[0] === null) {
      picked.set(...boxes[0], { show: true });
      return;
    }
    const from = this.centre(...now);
    let best = null;
    let least = Infinity;
    for (const [kind, id] of boxes) {
      if (kind === now[0] && id === now[1]) continue;
      const to = this.centre(kind, id);
      const ahead = (to.x - from.x) * dx + (to.y - from.y) * dy;
      const aside = Math.abs((to.x - from.x) * dy) + Math.abs((to.y - from.y) * dx);
      const far = ahead + 2 * aside;
      if (ahead > 1 && far < least && (dy || aside < ahead)) [best, least] = [[kind, id], far];
    }
    if (best) picked.set(...best, { show: true });
  }

  /** The tip beside the pointer. */
  hint(kind, id, event) {
    this.tip.hidden = kind === null;
    if (kind === null) return;
    if (this.tip.dataset.of !== `${kind}${id}`) {
      this.tip.dataset.of = `${kind}${id}`;
      this.tip.replaceChildren(...tipOf(this.section, kind, id));
    }
    const box = this.element.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    const flip = x > box.width - this.tip.offsetWidth - 24;
    this.tip.style.left = `${flip ? Math.max(4, x - this.tip.offsetWidth - 12) : x + 14}px`;
    this.tip.style.top = `${Math.min(y + 14, box.height - this.tip.offsetHeight - 6)}px`;
  }
}

const curve = libraries.line((point) => point.x, (point) => point.y).curve(libraries.curveBasis);

/** Make elements the children of a parent; those that stay are not touched. */
function replace(parent, elements) {
  const wanted = new Set(elements);
  for (const child of [...parent.children]) if (!wanted.has(child)) child.remove();
  parent.append(...elements.filter((element) => element.parentNode !== parent));
}

/** A header: rounded above, and below by r. */
const header = (x, y, w, h, r) =>
  `M${x} ${y + 8}a8 8 0 0 1 8 -8h${w - 16}a8 8 0 0 1 8 8v${h - 8 - r}a${r} ${r} 0 0 1 ${-r} ${r}h${2 * r - w}a${r} ${r} 0 0 1 ${-r} ${-r}z`;

const arrowHeads = () =>
  svg("defs", {}, ["dram", "chip", "stays"].map((place) =>
    svg("marker", { id: `head-${place}`, class: `head ${place}`, viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 7, markerHeight: 7, markerUnits: "userSpaceOnUse", orient: "auto" },
      svg("path", { d: "M0 0.5L8 4L0 7.5z" }))));

/** Lines of a tip: name first. */
function tipOf(section, kind, id) {
  const lines = [];
  if (kind === "op") {
    const op = section.ops[id];
    lines.push(op.name, `${op.kind}, ${op.reads.map((read) => `${shape(section.tensors[read.tensor])} ${read.window}`).join(" + ")} → ${shape(section.tensors[op.writes])}`);
    if (op.weights) lines.push(`${thousands(op.weights)} weights, ${bytes(op.weight_bytes)}`);
    lines.push(`${bytes(sum(op.alone))} of DRAM access alone`);
    if (op.unfusable) lines.push("unfusable: alone it does not fit the buffer");
  } else if (kind === "tensor") {
    const tensor = section.tensors[id];
    lines.push(tensor.name, `${shape(tensor)}, ${bytes(tensor.bytes)}`, placeText(section, tensor));
  } else {
    const unit = section.units[id];
    lines.push(unit.title, counted(unit.ops.length, "operator"));
    if (unit.fusable) lines.push(`${bytes(unit.buffer)} of ${bytes(section.buffer)} (${percent(unit.buffer, section.buffer)})`);
    lines.push(`${bytes(unit.total)} of DRAM access`);
    if (unit.ends) lines.push(`${section.noun === "step" ? "hands on" : "ends"}: ${unit.ends}`);
  }
  return lines.map((text, k) => el(k ? "div" : "strong", {}, text));
}

/** Where a tensor is between its maker and its readers. */
function placeText(section, tensor) {
  if (tensor.stay) return `stays on chip from step ${tensor.stay[0]} to ${tensor.stay[1]}`;
  if (tensor.place === "chip") return `within one ${section.noun}, on chip`;
  return tensor.why ? `through DRAM: ${tensor.why}` : "through DRAM";
}
