// Bundles libraries.mjs into one file for the HTML report, with the licences of what is in it.
import { readFileSync, writeFileSync } from "node:fs";
import { buildSync } from "esbuild";

const target = new URL("../../torch_getfuse/reporting/html/static/", import.meta.url);
const built = buildSync({
  entryPoints: ["libraries.mjs"],
  bundle: true,
  minify: true,
  format: "iife",
  globalName: "libraries",
  target: "es2020",
  charset: "ascii",
  legalComments: "none",
  metafile: true,
  write: false,
});

const names = new Set(
  Object.keys(built.metafile.inputs)
    .map((path) => path.match(/node_modules\/((?:@[^/]+\/)?[^/]+)\//)?.[1])
    .filter(Boolean),
);
const licences = [...names].sort().map((name) => {
  const { version, license } = JSON.parse(readFileSync(`node_modules/${name}/package.json`));
  const text = readFileSync(`node_modules/${name}/LICENSE`, "utf-8").trim();
  return { name: `${name} ${version}`, license, text };
});
const named = licences.map(({ name, license }) => `${name} (${license})`).join(", ");
// Every report is a copy of the libraries, so the licences go with the code.
const texts = licences.map(({ name, text }) => `${name}\n\n${text}\n`);
if (texts.some((text) => text.includes("*/"))) throw new Error("a licence would end its comment");
const banner = `/*\n${named}\n\n${texts.join(`\n${"-".repeat(78)}\n\n`)}*/\n`;
// A report is printable text throughout; dagre joins names by a control character.
const code = built.outputFiles[0].text.replaceAll("\x01", "\\x01");
writeFileSync(new URL("libraries.min.js", target), banner + code);
console.log(named);
