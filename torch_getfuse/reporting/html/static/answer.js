// -- answer.js: the explanation, before the plan that it is beside ---------------------------

/** What fills the buffer, where the split cuts, and the edges to blame. */
function answer(section) {
  const { why } = section;
  return el("section", { class: "block answer", "aria-label": "Explanation" },
    el("h2", {}, why.headline),
    facts([
      ["operators", asked(section)],
      ["added", why.added.length ? `${why.added.join(", ")}: on a path between the others` : ""],
      ["demand", why.demand_bytes === null ? `none: ${why.scheme} has no schedule for this group`
        : `${bytes(why.demand_bytes)} of ${bytes(why.buffer_bytes)} (${percent(why.demand_bytes, why.buffer_bytes)}); a group must stay below the buffer`],
      why.predicted_probability === null ? null : ["GNN", `valid with probability ${why.predicted_probability.toFixed(3)}`],
      ...why.obstacles.map((obstacle) => ["obstacle", obstacle]),
    ]),
    el("div", { class: "answers" },
      why.terms.length ? el("div", {},
        el("h3", {}, "What fills the buffer"),
        termBars({ buffer: why.buffer_bytes }, why.terms)) : null,
      why.cut ? el("div", {},
        el("h3", {}, `Where the recursive split cuts (edges: ${why.cut.by})`),
        el("p", {}, `The parts move ${bytes(why.cut.added_feature_bytes)} more of features to and from DRAM than the group would.`),
        cutTable(section)) : null),
    section.blame.size ? el("div", {},
      el("h3", {}, "Edges to blame (0 or blank: the explainer's least, 1: its best)"),
      blameTable(section)) : null);
}

/** Names of the operators asked about, the first and the last of many. */
function asked({ opNamed, why }) {
  const one = (name) => link("op", opNamed.get(name), name);
  const { operators } = why;
  if (operators.length <= 6) return operators.flatMap((name, k) => [k ? ", " : "", one(name)]);
  return [one(operators[0]), " to ", one(operators.at(-1)), `, ${operators.length} in all`];
}

function cutTable(section) {
  const { parts } = section.why.cut;
  return table("parts", [
    { name: "part", value: ({ k }) => k, cell: ({ k, operators }) => link("op", section.opNamed.get(operators[0]), String(k)) },
    text("first operator", ({ operators }) => operators[0]),
    number("operators", ({ operators }) => operators.length),
    { ...size("buffer", (part) => part.buffer_bytes), cell: (part) => (part.fits ? bytes(part.buffer_bytes) : "unfusable") },
    size("DRAM", (part) => part.dram_bytes),
  ], parts.map((part, k) => ({ ...part, k })));
}

function blameTable(section) {
  const names = section.why.explainers.map(({ explainer }) => explainer);
  const at = new Map(section.tensors.map((tensor, k) => [tensor.name, k]));
  const rows = [...section.blame.values()].sort((a, b) => b.share - a.share);
  return table("edges", [
    { name: "edge", value: ({ edge }) => `${edge.producer} → ${edge.consumer}`, cell: ({ edge }) => link("tensor", at.get(edge.tensor), `${edge.producer} → ${edge.consumer}`) },
    size("tensor", ({ edge }) => edge.tensor_bytes),
    size("held", ({ edge }) => edge.held_bytes),
    ...names.map((name) => ({ name, right: true, value: ({ scores }) => scores[name] ?? null, cell: ({ scores }) => scores[name]?.toFixed(2) ?? "" })),
    ...(names.length > 1 ? [{ name: "mean", right: true, value: ({ mean }) => mean, cell: ({ mean }) => mean.toFixed(2) }] : []),
    text("cut", (row) => (row.cut ? "cut" : "")),
  ], rows, ({ edge }) => ["tensor", at.get(edge.tensor)]);
}
