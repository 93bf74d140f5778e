// -- charts.js: DRAM access from unfused to the bound, and the buffer from unit to unit --------

const SHARES = [
  ["features", "features"],
  ["weights", "weights"],
  ["unfusable", "unfusable, at least"],
];

const legend = (entries) =>
  el("ul", { class: "legend" }, entries.map(([name, text]) => el("li", {}, el("i", { class: name }), text)));

/** Bars of DRAM access: unfused, what is saved of it, planned, the bound and the floor. */
function waterfall(section) {
  const { unfused, planned, bound, floor, proof, standing } = section.dram;
  const total = (parts) => sum(Object.values(parts));
  const whole = total(unfused);
  const most = Math.max(whole, total(planned)) || 1;
  const left = total(planned);
  const used = SHARES.filter(([part]) => unfused[part] || planned[part]);
  const row = (name, size, note, pieces, offset = 0) =>
    el("div", { class: "fall" },
      el("span", { class: "what" }, name),
      el("span", { class: "bar", role: "img", "aria-label": `${name}: ${bytes(size)}` },
        el("i", { class: "none", style: `width:${(100 * offset) / most}%` }),
        pieces.map(([part, amount, text]) =>
          el("i", { class: part, style: `width:${(100 * amount) / most}%`, title: `${text}: ${bytes(amount)}` }))),
      el("span", { class: "size" }, bytes(size)),
      el("span", { class: "note" }, note));
  const split = (parts) => used.map(([part, text]) => [part, parts[part], text]);
  const proved = proof === "optimal" ? `optimal, ${standing}` : `${proof ? standing : "no bound"}`;
  const above = bound ? (left > bound ? `plan at most ${percent(left - bound, bound)} above` : "the plan is at it") : "";
  return el("figure", { class: "waterfall" },
    row("unfused", whole, "every operator alone", split(unfused)),
    row("saved", whole - left, percent(whole - left, whole), [["saved", Math.max(0, whole - left), "saved"]], left),
    row("planned", left, `${percent(left, whole)} of unfused`, split(planned)),
    bound ? row("bound", bound, [proved, above].filter(Boolean).join("; "), [["bound", bound, "lower bound"]]) : null,
    row("floor", floor, "inputs, outputs, weights once", [["floor", floor, "floor"]]),
    el("figcaption", {}, legend(used)));
}

const TALL = 150; // pixels of a full buffer

/** What the buffer holds in each unit, as columns against its limit, and below the tensors that stay. */
function occupancy(section) {
  const units = section.units;
  const step = Math.max(7, Math.min(64, Math.floor(1080 / units.length)));
  const wide = Math.max(1, step - (step > 12 ? 4 : 2));
  const margin = { left: 62, top: 22, right: 14 };
  const lanes = lanesOf(section);
  const lane = 11;
  const base = margin.top + TALL;
  const height = base + 24 + (lanes.length ? lanes.length * lane + 22 : 0);
  const width = Math.max(360, margin.left + units.length * step + margin.right);
  const right = margin.left + units.length * step;
  const scale = (size) => (TALL * size) / section.buffer;
  const columns = units.map((unit, k) => {
    const x = margin.left + k * step;
    let y = base;
    const pieces = PARTS.map(([part]) => {
      const tall = scale(unit.parts[part]);
      y -= tall;
      return svg("rect", { class: part, x, y, width: wide, height: tall });
    });
    const label = `${unit.title}: ${unit.fusable ? `${bytes(unit.buffer)}, ${percent(unit.buffer, section.buffer)}` : "unfusable"}`;
    if (!unit.fusable) pieces.push(svg("rect", { class: "unknown", x, y: base - TALL, width: wide, height: TALL }));
    const every = Math.ceil(30 / step);
    const number = unit.number !== null && unit.number % every === 0;
    return svg("g", { class: "column", "data-unit": k },
      svg("rect", { class: "hit", x: x - (step - wide) / 2, y: margin.top, width: step, height: TALL + 20 }, svg("title", {}, label)),
      pieces,
      number ? svg("text", { x: x + wide / 2, y: base + 14, "text-anchor": "middle" }, unit.number) : null);
  });
  const limits = [[1, bytes(section.buffer)], [0.5, bytes(section.buffer / 2)], [0, "0 B"]].flatMap(([share, text]) => {
    const y = base - TALL * share;
    return [
      svg("line", { class: share === 1 ? "limit" : "grid", x1: margin.left - 4, x2: right, y1: y, y2: y }),
      svg("text", { x: margin.left - 8, y: y + 4, "text-anchor": "end" }, text),
    ];
  });
  const residents = lanes.flatMap((tensors, row) => tensors.map((t) => {
    const [first, last] = section.tensors[t].stay;
    const y = base + 38 + row * lane;
    return svg("rect", { class: "residents stay", "data-tensor": t, x: margin.left + first * step, y, width: (last - first + 1) * step - (step - wide), height: lane - 3, rx: 2 },
      svg("title", {}, `${section.tensors[t].name}: ${bytes(section.tensors[t].bytes)}, steps ${first} to ${last}`));
  }));
  const chart = svg("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, width, height, role: "group", tabindex: 0,
    "aria-label": `Buffer use of each ${section.noun}; arrow keys move` },
    svg("text", { class: "caption", x: margin.left, y: 13 }, `limit ${bytes(section.buffer)}: a ${section.noun} must stay below it`),
    limits.slice(2), columns, limits.slice(0, 2),
    lanes.length ? svg("text", { class: "caption", x: margin.left, y: base + 33 }, "tensors that stay on chip") : null,
    residents);
  chart.addEventListener("click", ({ target }) => {
    const stay = target.closest("[data-tensor]");
    const unit = target.closest("[data-unit]");
    if (stay) picked.set("tensor", Number(stay.dataset.tensor), { show: true });
    else if (unit) picked.set("unit", Number(unit.dataset.unit), { show: true });
  });
  chart.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move) return;
    event.preventDefault();
    const now = picked.kind === "unit" ? picked.id : move > 0 ? -1 : units.length;
    picked.set("unit", Math.min(units.length - 1, Math.max(0, now + move)), { show: true });
  });
  picked.watchers.push((kind, id) => {
    for (const element of chart.querySelectorAll(".picked")) element.classList.remove("picked");
    if (kind === "op") chart.querySelector(`[data-unit="${section.ops[id].unit}"]`)?.classList.add("picked");
    if (kind === "unit" || kind === "tensor") chart.querySelector(`[data-${kind}="${id}"]`)?.classList.add("picked");
  });
  const parts = PARTS.filter(([part]) => units.some((unit) => unit.parts[part]));
  if (units.some((unit) => !unit.fusable)) parts.push(["unknown", "unfusable: run by other means"]);
  return el("figure", { class: "occupancy" }, el("div", { class: "scroll" }, chart), el("figcaption", {}, legend(parts)));
}

/** The tensors that stay, in as few rows as hold them without overlap. */
function lanesOf(section) {
  const lanes = [];
  const order = [...section.staying].sort((a, b) => section.tensors[a].stay[0] - section.tensors[b].stay[0]);
  for (const t of order) {
    const free = lanes.find((row) => section.tensors[row.at(-1)].stay[1] < section.tensors[t].stay[0]);
    if (free) free.push(t);
    else lanes.push([t]);
  }
  return lanes;
}
