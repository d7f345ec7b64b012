// The page of `ds-higgs report --blind`: one pair after another, votes by key or button, the names only at the end.

const VALUES = JSON.parse(document.getElementById("values").textContent);
const PLACE = `ds_higgs blind: ${VALUES.run}, ${VALUES.made}`; // of the votes in this browser
const CHOICES = { left: "1 is better", none: "No difference", right: "2 is better" };
const KEYS = { ArrowLeft: () => vote("left"), ArrowRight: () => vote("right"), ArrowDown: () => vote("none"), Backspace: back, 1: () => play("left"), 2: () => play("right") };
const heard = new Set(); // sides of the pair that is shown
let state = load() || drawn();
let kept = true;

// A number below `most`, without the small bias of a remainder.
function draw(most) {
  const [found] = crypto.getRandomValues(new Uint32Array(1));
  return found < most * Math.floor(2 ** 32 / most) ? found % most : draw(most);
}

// order: of the pairs; left: the model on the left of each pair; votes: by pair.
function drawn() {
  const order = VALUES.pairs.map((_, index) => index);
  for (let last = order.length - 1; last > 0; last -= 1) {
    const other = draw(last + 1);
    [order[last], order[other]] = [order[other], order[last]];
  }
  return { order, left: order.map(() => draw(2)), votes: order.map(() => null), at: 0 };
}

function load() {
  try {
    const found = JSON.parse(localStorage.getItem(PLACE));
    return found && found.order.length === VALUES.pairs.length ? found : null;
  } catch {
    return null; // nothing is kept here, or something else
  }
}

function keep() {
  try {
    localStorage.setItem(PLACE, JSON.stringify(state));
  } catch {
    kept = false;
  }
}

function pairNow() {
  return state.order[state.at];
}

// The model that is heard on a side of a pair.
function modelOn(side, pair) {
  return side === "left" ? state.left[pair] : 1 - state.left[pair];
}

function play(side) {
  document.querySelectorAll("audio").forEach((audio) => audio.pause());
  const audio = document.querySelector(`#${side} audio`);
  if (!audio) return;
  audio.currentTime = 0;
  audio.play().catch(() => {}); // the next key came before it began
}

function vote(choice) {
  if (state.at >= state.order.length) return;
  if (heard.size < 2) {
    document.getElementById("told").textContent = "Listen to both first.";
    return;
  }
  state.votes[pairNow()] = choice;
  go(state.at + 1);
}

function back() {
  if (state.at > 0) go(state.at - 1);
}

function go(place) {
  state.at = place;
  heard.clear();
  keep();
  show();
}

function again() {
  state = drawn();
  go(0);
}

// Preferences by model, votes for neither, and the second model's share of the preferences with Wilson's 95 % interval.
function count() {
  const wins = [0, 0];
  let neither = 0;
  state.votes.forEach((choice, pair) => {
    if (choice === "none") neither += 1;
    else if (choice) wins[modelOn(choice, pair)] += 1;
  });
  const decided = wins[0] + wins[1];
  if (!decided) return { wins, neither, share: null, interval: null };
  const share = wins[1] / decided;
  const z = 1.959964;
  const middle = share + z * z / (2 * decided);
  const half = z * Math.sqrt((share * (1 - share) + z * z / (4 * decided)) / decided);
  const interval = [(middle - half) / (1 + z * z / decided), (middle + half) / (1 + z * z / decided)];
  return { wins, neither, share, interval };
}

function resultText() {
  const votes = VALUES.pairs.map((pair, index) => {
    const choice = state.votes[index];
    const preferred = choice === "left" || choice === "right" ? VALUES.models[modelOn(choice, index)] : choice;
    return { number: pair.number, text: pair.text, left: VALUES.models[modelOn("left", index)], vote: choice, preferred };
  });
  return JSON.stringify({ run: VALUES.run, models: VALUES.models, ...count(), votes }, null, 2);
}

function save() {
  const link = element("a", { href: URL.createObjectURL(new Blob([resultText()], { type: "application/json" })), download: `blind-${VALUES.run}.json` });
  link.click();
  URL.revokeObjectURL(link.href);
}

function side(name, label, pair) {
  const box = player(pair.said[modelOn(name, pairNow())], element("b", {}, label));
  box.id = name;
  box.querySelector("audio").addEventListener("play", () => heard.add(name));
  return box;
}

function ballot() {
  const pair = VALUES.pairs[pairNow()];
  const button = (choice, key) => element("button", { type: "button", id: `vote-${choice}`, onclick: () => vote(choice) }, `${CHOICES[choice]} (${key})`);
  return element("article", { class: "card sample" },
    element("p", { class: "soft small" }, `Pair ${state.at + 1} of ${state.order.length}`),
    element("progress", { value: state.at, max: state.order.length, "aria-label": "Pairs voted on" }),
    element("p", { class: "said-text", dir: "auto" }, pair.text),
    pair.reference ? player(pair.reference, "the voice that was asked for") : null,
    element("div", { class: "pair votes" }, side("left", "1", pair), side("right", "2", pair)),
    element("div", { class: "pair votes" }, button("left", "←"), button("none", "↓"), button("right", "→")),
    element("div", { class: "sample-head" },
      element("button", { type: "button", disabled: state.at === 0, onclick: back }, "Back"),
      element("span", { class: "soft small" }, "Keys: 1 and 2 play, the arrows vote, Backspace goes back."),
      element("span", { id: "told", class: "bad small", role: "status" })));
}

function verdict({ wins, neither, share, interval }) {
  const [first, second] = VALUES.models;
  if (share === null) return `Nobody was preferred in any of ${neither} pairs.`;
  const better = share >= 0.5;
  const shown = better ? share : 1 - share;
  const [low, high] = better ? interval : [1 - interval[1], 1 - interval[0]];
  const sure = low > 0.5 ? "it is preferred, and not by chance alone" : "50 % is within it, so that no difference has been shown";
  return `${better ? second : first} was preferred in ${percent(shown)} of ${wins[0] + wins[1]} decided pairs; 95 % interval ${percent(low)} to ${percent(high)}: ${sure}.`;
}

function result() {
  const counted = count();
  const rows = [...VALUES.models.map((name, model) => [name, counted.wins[model]]), ["no difference", counted.neither]];
  return element("div", { class: "stack" },
    table({ caption: "What was preferred", head: ["", "pairs"], rows: rows.map(([name, found]) => [name, String(found)]) }),
    element("p", { id: "verdict" }, verdict(counted)),
    element("div", { class: "sample-head" },
      element("button", { type: "button", id: "save", onclick: save }, "Save as file"),
      element("button", { type: "button", onclick: back }, "Back"),
      element("button", { type: "button", id: "again", onclick: again }, "Start again")));
}

function show() {
  const done = state.at >= state.order.length;
  const notice = kept ? null : element("p", { class: "bad small" }, "This browser keeps nothing for this page: votes are lost when it is closed.");
  document.getElementById("shown").replaceChildren(...[done ? result() : ballot(), notice].filter(Boolean));
}

function build() {
  const intro = element("p", {}, "Two models said each text. Listen to both, then say which is better: nearer to the voice, clearer, more natural.");
  layOut("Which is better?", `${VALUES.pairs.length} pairs, without names`, intro,
    section("vote", "Listen and vote", element("div", { id: "shown" })), `Made by ds_higgs ${VALUES.version} on ${VALUES.made} from the run ${VALUES.run}.`);
  document.addEventListener("keydown", (event) => {
    if (!(event.key in KEYS) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    KEYS[event.key]();
  }, true);
  keep();
  show();
}

build();
