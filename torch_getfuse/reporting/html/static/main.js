// -- main.js: the page ---------------------------------------------------------------------------

const sections = figures.sections.map((form) => new Section(form));

function cards(section) {
  const total = (parts) => sum(Object.values(parts));
  const [unfused, planned] = [total(section.dram.unfused), total(section.dram.planned)];
  const fusable = section.units.filter((unit) => unit.fusable);
  const fullest = Math.max(0, ...fusable.map((unit) => unit.buffer));
  const apart = section.ops.filter((op) => op.unfusable).length;
  const card = (value, name, note) => el("li", {}, el("b", {}, value), el("span", {}, name), el("small", {}, note));
  return el("ul", { class: "cards" },
    card(bytes(planned), "DRAM access planned", `of ${bytes(unfused)} unfused`),
    card(percent(unfused - planned, unfused), "saved", bytes(unfused - planned)),
    card(String(fusable.length), section.noun === "step" ? "fused steps" : "fusion groups", `of ${counted(section.ops.length, "operator")}`),
    card(percent(fullest, section.buffer), "fullest buffer", `${bytes(fullest)} of ${bytes(section.buffer)}`),
    card(String(apart), "unfusable", apart ? `move ${bytes(section.dram.planned.unfusable)} at least` : "every operator fits"),
    section.staying.length ? card(String(section.staying.length), "tensors stay", "on chip between steps") : null);
}

/** Search in the graph: operators whose name, kind or module holds the text; Enter goes on. */
function finder(section) {
  let at = -1;
  const count = el("span", { class: "count", role: "status" });
  const input = el("input", { type: "search", id: "find", placeholder: "find operator  ( / )", "aria-label": "find an operator in the graph" });
  const found = () => {
    const word = input.value.trim().toLowerCase();
    return word ? section.ops.flatMap((op, k) => (`${op.name} ${op.kind} ${op.module}`.toLowerCase().includes(word) ? [k] : [])) : [];
  };
  input.addEventListener("input", () => {
    at = -1;
    const matches = found().length;
    count.textContent = input.value.trim() ? `${matches} found` : "";
  });
  input.addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    const matches = found();
    if (!matches.length) return;
    at = (at + (event.shiftKey ? -1 : 1) + matches.length) % matches.length;
    count.textContent = `${at + 1} of ${matches.length}`;
    picked.set("op", matches[at], { show: true });
  });
  return el("span", { class: "finder" }, input, count);
}

function graphPart(section) {
  const graph = new Graph(section);
  const button = (name, title, act) => el("button", { type: "button", title, onclick: act }, name);
  const marks = [
    ["mark group", section.noun === "step" ? "step" : "fusion group"],
    section.ops.some((op) => op.unfusable) ? ["mark unfusable", "unfusable"] : null,
    ["mark dram", "through DRAM"],
    ["mark chip", `within a ${section.noun}`],
    section.ops.some((op) => op.reads.some((read) => read.skip)) ? ["mark skip", "skip"] : null,
    section.staying.length ? ["mark stays", "stays on chip"] : null,
    section.blame.size ? ["mark blamed", "blamed by the explainers"] : null,
    [...section.blame.values()].some((entry) => entry.cut) ? ["mark cut", "cut"] : null,
  ].filter(Boolean);
  const element = el("section", { class: "plan", "aria-label": "Operator graph" },
    el("div", { class: "tools" },
      finder(section),
      el("span", { class: "buttons" },
        button("open all", "open every unit (e)", () => graph.all(true)),
        button("close all", "close every unit (c)", () => graph.all(false)),
        button("fit", "the whole graph (f)", () => graph.fit()),
        button("top", "back to the start", () => graph.start()),
        button("+", "zoom in (+)", () => graph.by(1.3)),
        button("−", "zoom out (-)", () => graph.by(1 / 1.3)))),
    legend(marks),
    el("div", { class: "sides" }, graph.element, details(section)));
  picked.watchers.push((kind, id, { show }) => {
    if (show && kind !== null) graph.show(kind, id);
    graph.mark();
  });
  return { element, graph };
}

function themeButton() {
  const order = ["light dark", "light", "dark"];
  const names = { "light dark": "theme: system", light: "theme: light", dark: "theme: dark" };
  let now = 0;
  const button = el("button", { type: "button", class: "theme" }, names[order[0]]);
  button.addEventListener("click", () => {
    now = (now + 1) % order.length;
    document.documentElement.style.colorScheme = order[now];
    button.textContent = names[order[now]];
    shown.drawMap(); // in the colours of the theme
  });
  return button;
}

function masthead() {
  const { about } = figures;
  const options = Object.entries(about.options).map(([name, value]) => `${name}=${value}`);
  return el("header", { class: "mast" },
    el("div", {},
      el("h1", {}, about.model || "Fusion report"),
      el("p", {}, `torch-getfuse ${about.version} · ${about.date}`)),
    themeButton(),
    about.command ? el("pre", {}, about.command) : null,
    options.length && !about.command ? el("pre", {}, options.join("  ")) : null);
}

let shown = null;

function showSection(k) {
  const section = sections[k];
  picked.watchers.length = 0;
  picked.kind = picked.id = null;
  const plan = graphPart(section);
  shown = plan.graph;
  const assumptions = el("p", { class: "assumptions" }, section.assumptions.map((one) => el("span", {}, one)));
  const drawn = el("section", { class: "block" }, el("h2", {}, "Operator graph"), plan.element);
  const traffic = el("section", { class: "block" }, el("h2", {}, "DRAM access per sample"), waterfall(section));
  const parts = section.why
    ? [assumptions, answer(section), drawn, el("h2", {}, "The plan of the whole model"), cards(section), traffic]
    : [assumptions, cards(section), traffic, drawn];
  document.getElementById("section").replaceChildren(
    ...parts,
    el("section", { class: "block" }, el("h2", {}, section.noun === "step" ? "On chip, step by step" : "Buffer of each group"), occupancy(section)),
    el("section", { class: "block" }, el("h2", {}, "Tables"), tabs(section)),
  );
  plan.graph.start();
  if (section.why) plan.graph.show("op", section.opNamed.get(section.why.operators[0]));
}

function start() {
  if (!sections.length) return; // the text says why there is nothing to show
  const app = el("div", { id: "app" }, masthead());
  app.append(...figures.remarks.map((remark) => el("p", { class: "remark" }, remark)));
  if (sections.length > 1) {
    const choice = el("select", { "aria-label": "graph", onchange: () => showSection(Number(choice.value)) },
      sections.map(({ name }, k) => el("option", { value: k }, name)));
    app.append(el("p", { class: "choice" }, "shown: ", choice));
  }
  app.append(el("div", { id: "section" }));
  const plain = document.getElementById("plain");
  plain.before(app);
  const folded = el("details", { class: "plain" }, el("summary", {}, "All figures as plain tables"));
  plain.before(folded);
  folded.append(plain);
  showSection(0);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => shown.drawMap());
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.target.closest("input, select")) return;
    event.preventDefault();
    document.getElementById("find").focus();
  });
}

start();
