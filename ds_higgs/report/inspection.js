// The page of `ds-higgs inspect`: search, kinds and speakers narrow the list; a click on a name copies it.

const VALUES = JSON.parse(document.getElementById("values").textContent);
const KINDS = Object.fromEntries(VALUES.kinds.map((kind) => [kind.name, kind]));
const STEP = 30; // samples drawn at once
const chosen = new Set();
const filter = { text: "", kind: "", speaker: "", order: "worst", shown: STEP };

function stat(label, value, note) {
  return element("div", { class: "card stat" }, element("div", { class: "label" }, label),
    element("div", { class: "value" }, value), element("div", { class: "note" }, note));
}

function overview() {
  const doubtful = VALUES.samples.filter((sample) => sample.score > 0).length;
  const more = VALUES.num_samples > VALUES.samples.length ? `, the ${VALUES.samples.length} worst are here` : "";
  return element("div", { class: "cards" },
    stat("Samples", VALUES.num_samples.toLocaleString("en"), `in ${VALUES.manifests.length === 1 ? "one manifest" : "two manifests"}${more}`),
    stat("Speech to learn", duration(VALUES.seconds), "all targets"),
    stat("Speakers", VALUES.speakers.length.toLocaleString("en"), VALUES.speakers.length ? "named by samples" : "no sample names one"),
    stat("Samples with warnings", doubtful.toLocaleString("en"), doubtful ? "worst first below" : "nothing to tell"),
    VALUES.num_excluded ? stat("Left out", VALUES.num_excluded.toLocaleString("en"), "by data.exclude") : null,
    VALUES.num_problems ? stat("Problems", VALUES.num_problems.toLocaleString("en"), "would stop training") : null);
}

function kinds() {
  if (!VALUES.kinds.length) return section("warnings", "Warnings", element("div", { class: "card" }, "None: nothing looks like a mistake."));
  const rows = VALUES.kinds.map((kind) => [
    element("button", { type: "button", class: `badge weight${kind.weight}`, onclick: () => choose("kind", kind.name) }, kind.title),
    kind.count.toLocaleString("en"), { text: kind.advice, class: "left" }]);
  const general = VALUES.general.map((warning) => element("p", {}, `${warning.sample}: ${warning.message}`));
  return section("warnings", "Warnings", table({ head: ["what", "how often", "what to do"], rows }),
    general.length ? element("div", { class: "card", style: "margin-top:12px" }, general) : null);
}

function problems() {
  if (!VALUES.num_problems) return [];
  const more = VALUES.num_problems - VALUES.problems.length;
  return section("problems", "Problems", element("div", { class: "card" }, element("ul", { class: "small" },
    VALUES.problems.map((problem) => element("li", {}, problem)), more ? element("li", {}, `and ${more} more: ds-higgs validate lists them`) : null)));
}

function speakers() {
  if (!VALUES.speakers.length) return [];
  const most = VALUES.speakers.slice(0, 40);
  const more = VALUES.speakers.length - most.length;
  return section("speakers", "Speakers", element("div", { class: "card" }, bars(most),
    more ? element("p", { class: "soft small" }, `and ${more} more`) : null));
}

function controls() {
  const field = (name, label, options) => element("label", {}, label, element("select", { id: name, onchange: (event) => choose(name, event.target.value) },
    options.map(([value, text]) => element("option", { value }, text))));
  const search = element("input", { id: "text", type: "search", placeholder: "words, a name or a file", oninput: (event) => choose("text", event.target.value) });
  return element("div", { class: "controls" }, element("label", {}, "Search", search),
    field("kind", "Warning", [["", "all samples"], ["any", "with a warning"], ...VALUES.kinds.map((kind) => [kind.name, kind.title])]),
    field("speaker", "Speaker", [["", "all"], ...VALUES.speakers.map(([name]) => [name, name])]),
    field("order", "Order", [["worst", "worst first"], ["longest", "longest first"], ["name", "by name"]]));
}

function choose(name, value) {
  filter[name] = value;
  filter.shown = STEP;
  document.getElementById(name).value = value;
  draw();
  if (name === "kind") document.getElementById("samples").scrollIntoView({ block: "start" });
}

function matching() {
  const words = filter.text.toLocaleLowerCase().split(/\s+/).filter(Boolean);
  const found = VALUES.samples.filter((sample) => {
    const text = [sample.name, sample.speaker, sample.text, ...sample.clips.map((clip) => clip.file)].join(" ").toLocaleLowerCase();
    return words.every((word) => text.includes(word)) && (!filter.speaker || sample.speaker === filter.speaker) &&
      (!filter.kind || (filter.kind === "any" ? sample.score > 0 : sample.warnings.some((warning) => warning.kind === filter.kind)));
  });
  const length = (sample) => Math.max(0, ...sample.clips.map((clip) => clip.seconds));
  if (filter.order === "longest") found.sort((one, other) => length(other) - length(one));
  if (filter.order === "name") found.sort((one, other) => one.name.localeCompare(other.name, "en", { numeric: true }));
  return found;
}

function draw() {
  const found = matching();
  const more = found.length - filter.shown;
  document.getElementById("found").textContent = `${found.length.toLocaleString("en")} samples`;
  document.getElementById("list").replaceChildren(...found.slice(0, filter.shown).map(card),
    ...(more > 0 ? [element("button", { type: "button", class: "more", onclick: () => { filter.shown += STEP; draw(); } }, `${Math.min(more, STEP)} more of ${more}`)] : []));
}

function card(sample) {
  const name = element("button", { type: "button", class: "name", "aria-pressed": String(chosen.has(sample.name)), title: "copy the name, and put it on the list",
    onclick: (event) => toggle(sample.name, event.currentTarget) }, sample.name);
  return element("article", { class: "card sample" },
    element("div", { class: "sample-head" }, name, sample.speaker ? element("span", { class: "soft small" }, sample.speaker) : null),
    sample.warnings.length ? element("ul", { class: "doubts" }, sample.warnings.map((warning) => element("li", {},
      element("span", { class: `badge weight${KINDS[warning.kind].weight}` }, KINDS[warning.kind].title), " ", element("span", { dir: "auto" }, warning.message)))) : null,
    sample.text ? element("p", { class: "said-text", dir: "auto" }, sample.text) : null,
    element("div", { class: "pair" }, sample.clips.map(clipPlayer)));
}

function clipPlayer(clip) {
  const facts = `${number(clip.seconds, 3)} s, ${number(clip.level, 3)} dBFS, ${number(clip.noise, 2)} dB above noise, ${number(clip.rate / 1000, 3)} kHz`;
  const made = player(VALUES.audio[clip.audio], [element("b", {}, clip.what), element("span", {}, facts)]);
  made.insertBefore(outline(clip), made.lastChild);
  if (clip.file) made.append(element("div", { class: "soft file", title: clip.file }, clip.file.split("/").slice(-2).join("/")));
  return made;
}

function outline(clip) {
  const points = clip.outline.map((peak, index) => `M${index + 0.5} ${50 - Math.max(peak, 1) / 2}V${50 + Math.max(peak, 1) / 2}`).join("");
  return svg("svg", { class: "outline", viewBox: `0 0 ${clip.outline.length} 100`, preserveAspectRatio: "none", role: "img", "aria-label": "outline of the sound" }, svg("path", { d: points }));
}

async function toggle(name, button) {
  if (chosen.has(name)) chosen.delete(name);
  else chosen.add(name);
  button.setAttribute("aria-pressed", String(chosen.has(name)));
  tellChosen("");
  if (chosen.has(name)) tellChosen(await copied(name, name));
}

function tellChosen(what) {
  const bar = document.getElementById("chosen");
  bar.hidden = chosen.size === 0;
  document.getElementById("exclude").value = [...chosen].map((name) => `${name}\n`).join("");
  document.getElementById("copied").textContent = what;
}

async function copied(text, what) {
  return (await copy(text)) ? `copied ${what}` : "the browser does not let this page copy: mark the lines above";
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Not allowed from a file in some browsers: the older way.
    const field = element("textarea", {});
    document.body.append(field);
    field.value = text;
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    return done;
  }
}

function excludeBar() {
  const copyAll = async () => tellChosen(await copied(document.getElementById("exclude").value, `${chosen.size} names`));
  const clear = () => { chosen.clear(); tellChosen(""); draw(); };
  return element("aside", { id: "chosen", class: "card", hidden: true, "aria-label": "Samples to leave out" },
    element("div", { class: "small" }, element("b", {}, "To leave out: "), "save these lines as exclude.txt, and set ", element("code", {}, "data.exclude: exclude.txt")),
    element("textarea", { id: "exclude", rows: 3, readonly: true, "aria-label": "Names to leave out" }),
    element("div", { class: "sample-head" }, element("button", { type: "button", onclick: copyAll }, "Copy all"),
      element("button", { type: "button", onclick: clear }, "Clear"), element("span", { id: "copied", class: "soft small", role: "status" })));
}

function build() {
  const sections = [kinds(), problems(), speakers(),
    section("samples", "Samples", controls(), element("p", { id: "found", class: "soft small" }), element("div", { id: "list", class: "stack" }))].flat();
  const names = VALUES.manifests.map((path) => path.split("/").pop()).join(", ");
  layOut(names, "Samples and what is doubtful about them", overview(), sections,
    `Made by ds_higgs ${VALUES.version} on ${VALUES.made} from ${VALUES.manifests.join(", ")}.`);
  document.getElementById("page").append(excludeBar());
  draw();
}

build();
