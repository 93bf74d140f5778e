// -- layout.js: where boxes and edges of the graph lie --------------------------------------
//
// Two levels: operators within each open unit, then units. Each level is cut at the nodes that
// every path passes, as residual and Inception blocks end in one; dagre lays out what lies
// between two cuts, and the results are stacked. So its time grows with the blocks and not with
// the network, and opening a unit asks it for that unit's block alone.

const RANK = 30; // between ranks of operators, in pixels
const APART = 48; // between ranks of units
const LEAD = 12; // that an edge runs straight out of a unit
const SIDE = 18; // between nodes of a rank
const HEADER = 50;
const PAD = 12;
const OP = 40; // height of an operator
const MOST_SPANS = 600; // ranks that edges cross in a block, beyond which dagre takes seconds

const blocks = new Map();

/**
 * Coordinates of a graph: nodes are {key, w, h} in topological order, edges {a, b, weight} by
 * position, with the places of their ports beside the centres (out, into). Returns centres of nodes, points of edges, and the box around all.
 */
function arrange(nodes, edges, rank) {
  const starts = nodes.map(() => []);
  edges.forEach((edge, k) => starts[edge.a].push(k));
  const cuts = [];
  let far = 0;
  nodes.forEach((node, p) => {
    if (far <= p) cuts.push(p);
    for (const k of starts[p]) far = Math.max(far, edges[k].b);
  });
  if (cuts.at(-1) !== nodes.length - 1) cuts.push(nodes.length - 1);

  const places = [{ x: 0, y: 0 }];
  const routes = new Array(edges.length);
  for (let c = 0; c + 1 < cuts.length; c++) {
    const first = cuts[c];
    const inside = nodes.slice(first, cuts[c + 1] + 1);
    const own = inside.slice(0, -1).flatMap((node, k) => starts[first + k]);
    const block = arrangeBlock(
      inside,
      own.map((k) => ({ ...edges[k], a: edges[k].a - first, b: edges[k].b - first })),
      rank,
    );
    const { x, y } = places[first];
    const move = (point) => ({ x: point.x + x, y: point.y + y });
    block.places.forEach((place, k) => {
      if (k) places[first + k] = move(place);
    });
    own.forEach((k, n) => {
      routes[k] = block.routes[n].map(move);
    });
  }
  const xs = nodes.flatMap((node, k) => [places[k].x - node.w / 2, places[k].x + node.w / 2]);
  const ys = nodes.flatMap((node, k) => [places[k].y - node.h / 2, places[k].y + node.h / 2]);
  for (const point of routes.flat()) xs.push(point.x);
  const [left, top] = [least(xs), least(ys)];
  return { places, routes, left, top, width: most(xs) - left, height: most(ys) - top };
}

const least = (numbers) => numbers.reduce((a, b) => Math.min(a, b), Infinity);
const most = (numbers) => numbers.reduce((a, b) => Math.max(a, b), -Infinity);

/** The same of one block, around the centre of its first node; blocks alike are laid out once. */
function arrangeBlock(nodes, edges, rank) {
  if (nodes.length === 2) return arrangePair(nodes, edges, rank);
  const key = JSON.stringify([nodes.map(({ w, h }) => [w, h]), edges, rank]);
  if (!blocks.has(key)) {
    const ranks = nodes.map(() => 0);
    for (const { a, b } of [...edges].sort((one, other) => one.a - other.a)) {
      ranks[b] = Math.max(ranks[b], ranks[a] + 1);
    }
    const spans = sum(edges.map(({ a, b }) => ranks[b] - ranks[a]));
    blocks.set(key, (spans > MOST_SPANS ? arrangeColumn : arrangeLayers)(nodes, edges, rank));
  }
  return blocks.get(key);
}

/** One above the other, their ports in line as far as they can be. */
function arrangePair([one, other], edges, rank) {
  const y = one.h / 2 + rank + other.h / 2;
  const ports = edges.map(({ out, into }) => [out ?? 0, into ?? 0]);
  const x = sum(ports.map(([out, into]) => out - into)) / Math.max(1, ports.length);
  const routes = ports.map(([out, into]) => [{ x: out, y: one.h / 2 }, { x: x + into, y: y - other.h / 2 }]);
  return { places: [{ x: 0, y: 0 }, { x, y }], routes };
}

/** In layers, by dagre; the first node stands alone above all others, the last one below. */
function arrangeLayers(nodes, edges, rank) {
  const graph = new libraries.graphlib.Graph({ multigraph: true });
  graph.setGraph({ ranksep: rank, nodesep: SIDE, edgesep: SIDE });
  nodes.forEach(({ w, h }, k) => graph.setNode(String(k), { width: w, height: h }));
  const last = nodes.length - 1;
  edges.forEach(({ a, b, weight }, k) => {
    graph.setEdge(String(a), String(b), { weight: weight ?? 1 }, `e${k}`);
  });
  const fed = new Set(edges.map((edge) => edge.b));
  const feeding = new Set(edges.map((edge) => edge.a));
  nodes.forEach((node, k) => {
    if (k && !fed.has(k)) graph.setEdge("0", String(k), { weight: 0 }, `top${k}`);
    if (k !== last && !feeding.has(k)) graph.setEdge(String(k), String(last), { weight: 0 }, `end${k}`);
  });
  libraries.layout(graph);
  const origin = graph.node("0");
  const move = ({ x, y }) => ({ x: x - origin.x, y: y - origin.y });
  return {
    places: nodes.map((node, k) => move(graph.node(String(k)))),
    routes: edges.map(({ a, b }, k) => graph.edge(String(a), String(b), `e${k}`).points.map(move)),
  };
}

/** One below the other, edges that skip some in lanes at their left: for dense blocks. */
function arrangeColumn(nodes, edges, rank) {
  const places = [];
  let y = -nodes[0].h / 2;
  for (const { h } of nodes) {
    places.push({ x: 0, y: y + h / 2 });
    y += h + rank;
  }
  const left = -most(nodes.map(({ w }) => w)) / 2;
  const routes = edges.map(({ a, b }) => {
    const [from, to] = [places[a].y + nodes[a].h / 2, places[b].y - nodes[b].h / 2];
    if (b === a + 1) return [{ x: 0, y: from }, { x: 0, y: to }];
    const lane = left - SIDE - 3 * Math.min(b - a, 60);
    return [[0, from], [lane, from + rank / 2], [lane, (from + to) / 2], [lane, to - rank / 2], [0, to]]
      .map(([x, at]) => ({ x, y: at }));
  });
  return { places, routes };
}

// -- units ---------------------------------------------------------------------------------

const NAME = 30; // characters of a name in a box
const letter = { title: 7.8, name: 7.1, small: 6.1 }; // pixels of a letter

const opText = (section, op) => {
  const tensor = section.tensors[op.writes];
  return [short(op.name, NAME), `${op.kind}  ${shape(tensor)}`];
};

function opWidth(section, op) {
  const [name, small] = opText(section, op);
  return Math.max(84, 20 + Math.max(name.length * letter.name, small.length * letter.small));
}

/** Tensors that a unit reads from outside, and those that it hands on. */
function unitPorts(section, unit) {
  const ins = new Set();
  const outs = new Set();
  for (const k of unit.ops) {
    const op = section.ops[k];
    for (const { tensor } of op.reads) {
      if (section.makers[tensor] !== unit.k) ins.add(tensor);
    }
    const outside = section.tensors[op.writes].readers.some((r) => section.ops[r].unit !== unit.k);
    if (outside || section.outputs.includes(op.writes)) outs.add(op.writes);
  }
  return { ins: [...ins], outs: [...outs] };
}

/** A closed unit: a box of fixed height, whose edges have no ports of their own. */
function closedUnit(section, unit) {
  const text = unitText(section, unit);
  const [title, ...rest] = text.map((line) => line.length);
  const w = Math.max(190, 24 + title * letter.title, 40 + Math.max(...rest) * letter.small);
  return { w, h: unit.apart ? 50 : 60, ins: new Map(), outs: new Map(), ops: null, edges: [] };
}

/** The lines in the header of a unit. */
function unitText(section, unit) {
  const first = section.ops[unit.ops[0]].name;
  const last = section.ops[unit.ops.at(-1)].name;
  if (unit.apart) return [short(first, NAME), `${section.ops[unit.ops[0]].kind}, unfusable`];
  const what = unit.fusable
    ? `${counted(unit.ops.length, "operator")}, ${percent(unit.buffer, section.buffer)} of the buffer`
    : "unfusable";
  const range = first === last ? short(first, 48) : `${short(first, 24)} … ${short(last, 24)}`;
  return [unit.title, what, range];
}

/** An open unit: its operators in a box below a header, edges and ports around its centre. */
function openUnit(section, unit) {
  const { ins, outs } = unitPorts(section, unit);
  const port = { w: 2, h: 2 };
  const at = new Map();
  const nodes = [{ ...port, key: "top" }];
  const add = (key, node) => {
    at.set(key, nodes.length);
    nodes.push({ ...node, key });
  };
  for (const tensor of ins) add(`in${tensor}`, port);
  for (const k of unit.ops) add(k, { w: opWidth(section, section.ops[k]), h: OP });
  for (const tensor of outs) add(`out${tensor}`, port);
  nodes.push({ ...port, key: "end" });

  const edges = [];
  const join = (a, b, tensor, op) => edges.push({ a, b, weight: tensor === null ? 50 : 1, tensor, op });
  for (const tensor of ins) join(0, at.get(`in${tensor}`), null);
  for (const k of unit.ops) {
    for (const { tensor } of section.ops[k].reads) {
      const maker = section.tensors[tensor].maker;
      join(at.has(`in${tensor}`) ? at.get(`in${tensor}`) : at.get(maker), at.get(k), tensor, k);
    }
  }
  for (const tensor of outs) {
    join(at.get(section.tensors[tensor].maker), at.get(`out${tensor}`), tensor, null);
    join(at.get(`out${tensor}`), nodes.length - 1, null);
  }
  edges.sort((one, other) => one.a - other.a);
  const made = arrange(nodes, edges.map(({ a, b, weight }) => ({ a, b, weight })), RANK);

  // From the header's lower edge to the box's: what the ports' own ranks take is left out.
  const opsAt = unit.ops.map((k) => made.places[at.get(k)]);
  const straight = ins.length === 1 && edges.filter(({ a, tensor }) => tensor !== null && a === 1).length === 1;
  const top = least(opsAt.map((place) => place.y)) - OP / 2 - (straight ? 16 : RANK);
  const bottom = most(opsAt.map((place) => place.y)) + OP / 2 + (outs.length > 1 ? RANK : 16);
  const w = Math.max(230, made.width + 2 * PAD);
  const h = HEADER + bottom - top;
  const middle = made.left + made.width / 2;
  const inside = ({ x, y }) => ({
    x: x - middle,
    y: Math.min(Math.max(y, top), bottom) - top + HEADER - h / 2,
  });
  const ports = (list, word) =>
    new Map(list.map((t) => [t, inside(made.places[at.get(word + t)]).x]));
  const found = { w, h, ins: ports(ins, "in"), outs: ports(outs, "out"), ops: new Map(), edges: [] };
  for (const k of unit.ops) {
    found.ops.set(k, { ...inside(made.places[at.get(k)]), w: nodes[at.get(k)].w });
  }
  edges.forEach(({ tensor, op }, k) => {
    if (tensor === null) return;
    const points = made.routes[k].map(inside);
    if (found.ins.has(tensor)) points[0] = { x: found.ins.get(tensor), y: HEADER - h / 2 };
    if (op === null) points[points.length - 1] = { x: found.outs.get(tensor), y: h / 2 };
    found.edges.push({ tensor, op, points });
  });
  return found;
}

// -- the whole graph -----------------------------------------------------------------------

/** Boxes of units, inputs and outputs, and the edges between them, for a set of open units. */
function arrangeGraph(section, open, boxes) {
  const nodes = [];
  const at = new Map();
  const add = (key, node) => {
    at.set(key, nodes.length);
    nodes.push({ ...node, key });
  };
  const ends = (tensor) => ({ w: endWidth(section.tensors[tensor]), h: 30 });
  const waiting = new Set(section.inputs);
  for (const unit of section.units) {
    for (const tensor of [...waiting]) {
      if (section.readers[tensor].includes(unit.k)) {
        add(`in${tensor}`, ends(tensor));
        waiting.delete(tensor);
      }
    }
    const name = `${unit.k}${open.has(unit.k) ? "+" : "-"}`;
    if (!boxes.has(name)) {
      boxes.set(name, (open.has(unit.k) ? openUnit : closedUnit)(section, unit));
    }
    const box = boxes.get(name);
    add(unit.k, { w: box.w, h: box.h });
    for (const tensor of section.outputs) {
      if (section.makers[tensor] === unit.k) add(`out${tensor}`, ends(tensor));
    }
  }
  const box = (k) => boxes.get(`${k}${open.has(k) ? "+" : "-"}`);
  const edges = [];
  section.tensors.forEach((tensor, t) => {
    const made = section.makers[t];
    const from = made === null ? `in${t}` : made;
    if (!at.has(from)) return; // an input that nobody reads
    for (const reader of section.readers[t]) {
      if (reader !== made) edges.push({ a: at.get(from), b: at.get(reader), tensor: t, from: made, to: reader });
    }
    if (at.has(`out${t}`)) edges.push({ a: at.get(from), b: at.get(`out${t}`), tensor: t, from: made, to: null });
  });
  edges.sort((one, other) => one.a - other.a || one.b - other.b);
  const made = arrange(nodes, edges.map(({ a, b, tensor, from, to }) => ({
    a,
    b,
    out: (from !== null && box(from).outs.get(tensor)) || 0,
    into: (to !== null && box(to).ins.get(tensor)) || 0,
  })), APART);
  const shift = ({ x, y }) => ({ x: x - made.left, y: y - made.top });
  const placed = edges.map((edge, k) => ({ ...edge, points: made.routes[k].map(shift) }));
  const places = new Map(nodes.map(({ key, w, h }, k) => [key, { ...shift(made.places[k]), w, h }]));
  const byUnit = { from: new Map(), to: new Map() };
  for (const edge of placed) {
    for (const side of ["from", "to"]) {
      if (edge[side] === null) continue;
      if (!byUnit[side].has(edge[side])) byUnit[side].set(edge[side], []);
      byUnit[side].get(edge[side]).push(edge);
    }
  }
  for (const [k, own] of byUnit.from) joinPorts(places.get(k), box(k).outs, own, 0, 1);
  for (const [k, own] of byUnit.to) joinPorts(places.get(k), box(k).ins, own, -1, -2);
  return { width: made.width, height: made.height, places, box, edges: placed };
}

/**
 * End edges at the ports of a unit; where it is closed, side by side in the order they come.
 * The end of an edge is its point `end`, its neighbour `near`: from the front, or from behind.
 * There it runs straight for a while.
 */
function joinPorts(place, ports, edges, end, near) {
  const order = [...edges].sort((one, other) => one.points.at(near).x - other.points.at(near).x);
  const step = Math.min(16, (place.w - 40) / edges.length);
  order.forEach(({ tensor, points }, n) => {
    const point = points.at(end);
    const free = order.length > 1 ? (n - (order.length - 1) / 2) * step : point.x - place.x;
    point.x = place.x + (ports.get(tensor) ?? free);
    point.y = place.y + ((end ? -1 : 1) * place.h) / 2;
    points.splice(end || 1, 0, { x: point.x, y: point.y + (end ? -LEAD : LEAD) });
  });
}

const endWidth = (tensor) => 24 + (short(tensor.name, 24).length + shape(tensor).length + 2) * letter.small;
