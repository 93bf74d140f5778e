// -- tables.js: tables to sort and to search ---------------------------------------------------

/**
 * A table: columns are {name, cell(row), value(row), right}; a click on a header sorts by value.
 * Each row may pick something, and is marked while that is picked.
 */
function table(label, columns, rows, pick) {
  const body = el("tbody");
  const count = el("span", { class: "count", role: "status" });
  const search = el("input", { type: "search", placeholder: `search ${label}`, "aria-label": `search ${label}` });
  let sorted = null;
  const built = rows.map((row) => {
    const [kind, id] = pick ? pick(row) : [null, null];
    const cells = columns.map((column) => {
      const content = column.cell(row);
      return el("td", { class: column.right ? "right" : null }, content ?? "");
    });
    const element = el("tr", kind ? { "data-of": `${kind}:${id}` } : {}, cells);
    if (kind) {
      element.addEventListener("click", ({ target }) => {
        if (!target.closest("button")) picked.set(kind, id, { show: true });
      });
    }
    return { row, element, text: element.textContent.toLowerCase() };
  });
  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const { element, text } of built) {
      element.hidden = !words.every((word) => text.includes(word));
      if (!element.hidden) shown += 1;
    }
    count.textContent = words.length ? `${shown} of ${built.length}` : `${built.length}`;
  };
  search.addEventListener("input", filter);
  const heads = columns.map((column, k) => {
    const button = el("button", { type: "button" }, column.name);
    const head = el("th", { scope: "col", class: column.right ? "right" : null, "aria-sort": "none" }, button);
    button.addEventListener("click", () => {
      const down = sorted === k ? head.getAttribute("aria-sort") === "ascending" : Boolean(column.right);
      for (const other of heads) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      sorted = k;
      const value = (entry) => column.value(entry.row);
      const order = (a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === null || y === null) return (x === null) - (y === null); // unknown goes last
        const less = typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y;
        return down ? -less : less;
      };
      body.append(...[...built].sort(order).map(({ element }) => element));
    });
    return head;
  });
  body.append(...built.map(({ element }) => element));
  filter();
  picked.watchers.push((kind, id) => {
    for (const element of body.querySelectorAll(".picked")) element.classList.remove("picked");
    for (const element of body.querySelectorAll(`[data-of="${kind}:${id}"]`)) element.classList.add("picked");
  });
  return el("div", { class: "table" },
    el("div", { class: "tools" }, search, count),
    el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, heads)), body)));
}

const text = (name, of) => ({ name, cell: of, value: of });
const size = (name, of) => ({
  name,
  right: true,
  value: of,
  cell: (row) => (of(row) === null ? "" : bytes(of(row))),
});
const number = (name, of) => ({ name, right: true, value: of, cell: (row) => String(of(row)) });

function unitTable(section) {
  const step = section.units.some((unit) => unit.way);
  return table(`${section.noun}s`, [
    { name: section.noun, value: (u) => u.number ?? Infinity, cell: (u) => [el("i", { class: u.fusable ? "swatch" : "swatch unfusable", style: `--hue:${u.hue}` }), link("unit", u.k, u.apart ? "–" : String(u.number))] },
    text("first operator", (u) => section.ops[u.ops[0]].name),
    text("last operator", (u) => section.ops[u.ops.at(-1)].name),
    number("operators", (u) => u.ops.length),
    ...(step ? [text("way", (u) => u.way)] : []),
    { ...size("buffer", (u) => (u.fusable ? u.buffer : null)), cell: (u) => (u.fusable ? [el("span", { class: "bar" }, PARTS.map(([part]) => el("i", { class: part, style: `width:${(100 * u.parts[part]) / section.buffer}%` }))), el("span", { class: "number" }, bytes(u.buffer))] : "unfusable") },
    size("read", (u) => u.dram[0]),
    size("written", (u) => u.dram[1]),
    size("weights", (u) => u.dram[2]),
    size("DRAM", (u) => u.total),
    text(step ? "what it hands on" : "why it ends", (u) => u.ends),
  ], section.units.filter((unit) => !unit.apart || section.units.length < 2000), (u) => ["unit", u.k]);
}

function opTable(section) {
  const rows = section.ops.map((op, k) => ({ ...op, k }));
  return table("operators", [
    { name: "operator", value: (op) => op.k, cell: (op) => link("op", op.k, op.name) },
    text("kind", (op) => op.kind),
    { name: section.noun, right: true, value: (op) => op.unit, cell: (op) => section.units[op.unit].number ?? "unfusable" },
    { name: "output", right: true, value: (op) => section.tensors[op.writes].bytes, cell: (op) => shape(section.tensors[op.writes]) },
    size("output size", (op) => section.tensors[op.writes].bytes),
    size("weights", (op) => op.weight_bytes),
    { name: "MACs", right: true, value: (op) => op.macs, cell: (op) => (op.macs === null ? "" : thousands(op.macs)) },
    size("DRAM alone", (op) => sum(op.alone)),
    size("needs alone", (op) => op.needs),
  ], rows, (op) => ["op", op.k]);
}

function tensorTable(section) {
  const rows = section.tensors.map((tensor, k) => ({ ...tensor, k }));
  const name = (k) => (k === null ? "input" : section.ops[k].name);
  return table("tensors", [
    { name: "tensor", value: (t) => t.k, cell: (t) => link("tensor", t.k, t.name) },
    { name: "shape", right: true, value: (t) => t.bytes, cell: (t) => shape(t) },
    size("size", (t) => t.bytes),
    text("made by", (t) => name(t.maker)),
    number("readers", (t) => t.readers.length),
    text("where", (t) => placeText(section, t)),
  ], rows, (t) => ["tensor", t.k]);
}

/** Tabs of tables; each is made when it is first opened. */
function tabs(section) {
  const entries = [
    [section.units.some((unit) => unit.way) ? "Steps" : "Groups", unitTable],
    ["Operators", opTable],
    ["Tensors", tensorTable],
  ];
  const panels = entries.map(([name], k) =>
    el("div", { role: "tabpanel", id: `panel${k}`, "aria-labelledby": `tab${k}`, hidden: k > 0 }));
  const open = (k, focus) => {
    buttons.forEach((button, n) => {
      button.setAttribute("aria-selected", n === k);
      button.tabIndex = n === k ? 0 : -1;
      panels[n].hidden = n !== k;
    });
    if (!panels[k].firstChild) {
      panels[k].append(entries[k][1](section));
      for (const watcher of picked.watchers.slice(-1)) watcher(picked.kind, picked.id, {});
    }
    if (focus) buttons[k].focus();
  };
  const buttons = entries.map(([name], k) =>
    el("button", { type: "button", role: "tab", id: `tab${k}`, "aria-controls": `panel${k}`, onclick: () => open(k) }, name));
  const list = el("div", { role: "tablist", class: "tabs", onkeydown: (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (move) open((buttons.indexOf(document.activeElement) + move + buttons.length) % buttons.length, true);
  } }, buttons);
  open(0);
  return el("section", { class: "tables" }, list, panels);
}
