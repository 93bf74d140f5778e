// What the page uses of its libraries, as the global `libraries`.
export { graphlib, layout } from "@dagrejs/dagre";
export { select } from "d3-selection";
export { curveBasis, line } from "d3-shape";
export { zoom, zoomIdentity } from "d3-zoom";
