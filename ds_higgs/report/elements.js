// Elements and numbers. Text is always set as text: nothing in the data is ever read as HTML.

const SVG = "http://www.w3.org/2000/svg";

function element(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

function svg(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}

// Four significant digits, thousands and very small numbers in a form that people read.
function number(value, digits = 4) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (typeof value === "string") return value;
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3) return value.toExponential(1).replace("e-", "e−");
  if (size >= 10000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(digits)));
}

function percent(share) {
  return share === null || share === undefined ? "–" : `${number(100 * share, 3)} %`;
}

function duration(seconds) {
  if (seconds < 90) return `${number(seconds, 2)} s`;
  if (seconds < 5400) return `${number(seconds / 60, 2)} min`;
  return `${number(seconds / 3600, 3)} h`;
}

function runColour(index) {
  return `var(--run${index % 6})`;
}

function runName(run, index) {
  return element("span", { class: "run-name" }, element("span", { class: "dot", style: `background:${runColour(index)}` }), run.name);
}

// rows: arrays of cells (text, nodes, or {text, class}); the first cell of a row is its heading.
function table({ caption, head, rows }) {
  const cell = (tag, content) =>
    content !== null && typeof content === "object" && "text" in content
      ? element(tag, { class: content.class }, content.text)
      : element(tag, {}, content);
  const headings = head.map((content) => element("th", { scope: "col" }, content));
  const body = rows.map(([first, ...others]) =>
    element("tr", {}, element("th", { scope: "row" }, first), others.map((content) => cell("td", content))));
  return element("div", { class: "scroll", tabindex: "0" },
    element("table", {}, caption ? element("caption", {}, caption) : null,
      element("thead", {}, element("tr", {}, headings)), element("tbody", {}, body)));
}

function player(source, label) {
  const audio = source ? element("audio", { controls: true, preload: "metadata", src: source }) : element("div", { class: "soft small" }, "no player here");
  return element("div", { class: "player" }, element("div", { class: "label" }, label), audio);
}

function bars(rows) {
  const most = Math.max(...rows.map(([, count]) => count));
  return element("div", { class: "bars" }, rows.map(([label, count]) => element("div", { class: "bar" },
    element("span", {}, label), element("i", { style: `width:${(100 * count) / most}%`, class: count ? null : "none" }), element("span", {}, count.toLocaleString("en")))));
}

function section(id, title, ...content) {
  return [element("section", { id }, element("h2", {}, title), content)];
}

function header(title, subtitle) {
  const next = () => (document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  const toggle = (event) => {
    document.documentElement.dataset.theme = next();
    event.currentTarget.textContent = next() === "dark" ? "Dark" : "Light";
  };
  return element("header", {},
    element("div", {}, element("h1", {}, title), element("p", { class: "soft" }, subtitle)),
    element("button", { type: "button", "aria-label": "Switch between light and dark", onclick: toggle }, next() === "dark" ? "Dark" : "Light"));
}

// A whole page: a heading, links to the sections, what stands above them, the sections, a foot.
function layOut(title, subtitle, overview, sections, foot) {
  document.documentElement.dataset.theme = window.matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  const links = sections.map((one) => element("a", { href: `#${one.id}` }, one.querySelector("h2").textContent));
  document.getElementById("page").replaceChildren(header(title, subtitle),
    element("nav", { "aria-label": "Sections" }, links), overview, ...sections, element("footer", {}, foot));
}
