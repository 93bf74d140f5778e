// -- details.js: everything that is known of what is picked ------------------------------------

/** A panel that follows what is picked in a section. */
function details(section) {
  const panel = el("aside", { class: "details", "aria-live": "polite", "aria-label": "Details" });
  const show = (kind, id) => {
    const made = { op: opDetails, tensor: tensorDetails, unit: unitDetails }[kind];
    panel.replaceChildren(...(made ? made(section, id) : overview(section)).filter(Boolean));
    panel.scrollTop = 0;
  };
  picked.watchers.push(show);
  show(null);
  return panel;
}

const facts = (rows) =>
  el("dl", {}, rows.filter((row) => row && row[1] !== "" && row[1] !== null).flatMap(([name, ...value]) =>
    [el("dt", {}, name), el("dd", {}, ...value)]));

const titled = (kind, title, hue) =>
  el("h3", { style: hue === undefined ? null : `--hue:${hue}`, class: hue === undefined ? "" : "hued" }, el("small", {}, kind), title);

function overview(section) {
  return [
    el("h3", {}, "The plan"),
    facts(section.facts),
    ...Object.entries(section.unsupported).map(([target, number]) =>
      el("p", { class: "remark" }, `no rule for ${target} (${number}): priced as reading everything at once`)),
    ...section.notes.map((note) => el("p", { class: "remark" }, note)),
    el("p", { class: "hint" }, "Pick an operator, an edge or a group for its details."),
  ];
}

function opDetails(section, k) {
  const op = section.ops[k];
  const unit = section.units[op.unit];
  const own = unit.terms.filter((term) => term.name === op.name || term.name === section.tensors[op.writes].name);
  const [read, write, weight] = op.alone;
  return [
    titled(op.kind, op.name, unit.fusable ? unit.hue : undefined),
    op.unfusable ? el("p", { class: "alert" }, op.needs === null
      ? "Unfusable: the scheme has no schedule for it at any buffer size."
      : `Unfusable: alone it needs ${bytes(op.needs)}, the buffer is ${bytes(section.buffer)}.`) : null,
    facts([
      op.module && op.module !== op.name ? ["module", op.module] : null,
      [section.noun, link("unit", op.unit, unit.title)],
      ["reads", tensorList(section, op.reads.map((r) => [r.tensor, `${r.window}${r.skip ? ", skip connection" : ""}`]))],
      ["writes", tensorList(section, [[op.writes, ""]])],
      ["weights", op.weights ? `${thousands(op.weights)} elements, ${bytes(op.weight_bytes)}` : "none"],
      ["MACs", op.macs === null ? "not known" : thousands(op.macs)],
      ["DRAM alone", `${bytes(read + write + weight)}: read ${bytes(read)}, written ${bytes(write)}, weights ${bytes(weight)}`],
      ["priced as", op.held_whole ? `holding whole maps: ${op.held_whole}` : ""],
      ...section.again.filter((entry) => entry.op === k).map((entry) =>
        ["read again", `${entry.what}, ${entry.times} times: ${bytes(entry.extra)} more; step ${entry.step} lacks ${bytes(entry.lacks)} to hold the weights`]),
    ]),
    own.length ? el("h4", {}, `In the buffer of ${unit.title.toLowerCase()}`) : null,
    own.length ? termBars(section, own) : null,
  ];
}

function tensorDetails(section, t) {
  const tensor = section.tensors[t];
  const blames = [...section.blame.values()].filter(({ edge }) => edge.tensor === tensor.name);
  const term = section.units.flatMap((unit) => unit.terms.filter((one) => one.name === tensor.name).map((one) => [unit, one]));
  return [
    titled("tensor", tensor.name),
    facts([
      ["shape", `${tensor.shape.join("×")} (${thousands(tensor.shape.reduce((a, b) => a * b, 1))} elements)`],
      ["size", `${bytes(tensor.bytes)} (${percent(tensor.bytes, section.buffer)} of the buffer)`],
      ["where", placeText(section, tensor)],
      ["made by", tensor.maker === null ? "input of the graph" : link("op", tensor.maker, section.ops[tensor.maker].name)],
      ["read by", tensor.readers.length ? el("ul", {}, tensor.readers.map((k) => el("li", {}, link("op", k, section.ops[k].name)))) : "nobody"],
      ["output", section.outputs.includes(t) ? "of the graph" : ""],
      ...term.map(([unit, one]) => [`held in ${unit.title.toLowerCase()}`, `${one.text}: ${bytes(one.bytes)}`]),
      ...blames.map(({ edge, scores, cut }) => ["blamed", `${edge.producer} → ${edge.consumer}: ${Object.entries(scores).map(([name, score]) => `${name} ${score.toFixed(2)}`).join(", ")}${cut ? "; cut here" : ""}`]),
    ]),
  ];
}

function unitDetails(section, k) {
  const unit = section.units[k];
  const [read, write, weight] = unit.dram;
  const alone = sum(unit.ops.map((op) => sum(section.ops[op].alone)));
  return [
    titled(unit.name || "unfusable operator", unit.title, unit.fusable ? unit.hue : undefined),
    facts([
      unit.fusable ? ["buffer", `${bytes(unit.buffer)} of ${bytes(section.buffer)} (${percent(unit.buffer, section.buffer)})`] : null,
      ["runs", unit.way],
      ["DRAM", `${bytes(unit.total)}: read ${bytes(read)}, written ${bytes(write)}, weights ${bytes(weight)}`],
      unit.ops.length > 1 ? ["unfused", `${bytes(alone)}, ${bytes(alone - unit.total)} saved`] : null,
      [section.noun === "step" ? "hands on" : "ends", unit.ends],
      unit.needs === null ? null : ["needs", unit.fusable ? `${bytes(unit.needs)} with what is over its border` : bytes(unit.needs)],
    ]),
    unit.terms.length ? el("h4", {}, "What fills the buffer") : null,
    unit.terms.length ? termBars(section, unit.terms) : null,
    el("h4", {}, counted(unit.ops.length, "operator")),
    el("ul", { class: "ops" }, unit.ops.map((op) => el("li", {}, link("op", op, section.ops[op].name), el("small", {}, section.ops[op].kind)))),
  ];
}

function tensorList(section, entries) {
  return el("ul", {}, entries.map(([t, text]) => {
    const tensor = section.tensors[t];
    return el("li", {}, link("tensor", t, tensor.name), el("small", {}, [shape(tensor), bytes(tensor.bytes), text].filter(Boolean).join(", ")));
  }));
}

/** Terms as bars against the buffer, largest first. */
function termBars(section, terms) {
  return el("ul", { class: "terms" }, terms.map((term) =>
    el("li", {},
      el("span", {}, term.text),
      el("span", { class: "size" }, `${bytes(term.bytes)} · ${percent(term.bytes, section.buffer)}`),
      el("span", { class: "bar" }, el("i", { class: term.part, style: `width:${Math.min(100, (100 * term.bytes) / section.buffer)}%` })))));
}
