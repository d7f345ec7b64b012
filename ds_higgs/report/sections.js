// The page, section by section, from the values that are in it.

const REPORT = JSON.parse(document.getElementById("values").textContent);
const RUNS = REPORT.runs;
const CODEBOOK_COLOURS = ["#2c6fbb", "#2f8fa8", "#2fa37f", "#6aab4c", "#b3a136", "#d98a35", "#d9623f", "#b9476b"];

const FRAME_SECONDS = 0.04; // of the released audio tokenizer: 25 frames a second

function overview() {
  return RUNS.length === 1 ? overviewCards(RUNS[0].summary) : overviewTable();
}

function change(summary) {
  if (summary.first_audio_loss === null) return null;
  return summary.best_audio_loss / summary.first_audio_loss - 1;
}

function statusText(status) {
  return { done: "finished", stopped: "stopped, can go on", "no better": "ended early: nothing got better", "not ended": "running, or ended abruptly" }[status] || status;
}

function overviewCards(summary) {
  const stat = (label, value, note, classes = "") =>
    element("div", { class: `card stat ${classes}` }, element("div", { class: "label" }, label),
      element("div", { class: "value" }, value), element("div", { class: "note" }, note));
  const drop = change(summary);
  const loss = drop === null ? null : stat("Validation audio loss",
    [`${number(summary.first_audio_loss)} → ${number(summary.best_audio_loss)}`],
    element("span", { class: drop < 0 ? "good" : "bad" }, `${drop < 0 ? "−" : "+"}${number(Math.abs(100 * drop), 3)} % at its best`), "wide");
  return element("div", { class: "cards" }, loss,
    stat("Steps", summary.steps.toLocaleString("en"), `${summary.epochs} ${summary.epochs === 1 ? "epoch" : "epochs"}, ${statusText(summary.status)}`),
    stat("Speech learned", duration(summary.audio_targets / 8 * FRAME_SECONDS), `${summary.samples.toLocaleString("en")} samples, every pass counted`),
    stat("Throughput", number(summary.tokens_per_second, 3), "tokens a second, median"),
    stat("Time in steps", duration(summary.seconds), `${summary.tokens.toLocaleString("en")} tokens`),
    stat("Peak memory", `${number(summary.peak_memory_gib, 3)} GiB`, "of the first rank"));
}

function overviewTable() {
  const rows = [
    ["Status", (one) => statusText(one.status)],
    ["Steps", (one) => one.steps.toLocaleString("en")],
    ["Samples, every pass", (one) => one.samples.toLocaleString("en")],
    ["Audio loss at the start", (one) => number(one.first_audio_loss)],
    ["Audio loss at its best", (one) => number(one.best_audio_loss), (one) => one.best_audio_loss],
    ["Change", (one) => (change(one) === null ? "–" : `${change(one) < 0 ? "−" : "+"}${percent(Math.abs(change(one)))}`)],
    ["Time in steps", (one) => duration(one.seconds)],
    ["Tokens a second, median", (one) => number(one.tokens_per_second, 3)],
    ["Peak memory, GiB", (one) => number(one.peak_memory_gib, 3)],
  ];
  const summaries = RUNS.map((run) => run.summary);
  const body = rows.map(([label, show, rank]) => {
    const best = rank ? Math.min(...summaries.map(rank).filter((value) => value !== null)) : null;
    return [label, ...summaries.map((one) => ({ text: show(one), class: rank && rank(one) === best ? "best" : null }))];
  });
  return element("div", { style: "margin-top:18px" }, table({ head: ["", ...RUNS.map(runName)], rows: body }));
}

function curves() {
  const one = RUNS.length === 1;
  const perRun = (build) => RUNS.flatMap((run, index) => build(run.curves, one ? "" : `${run.name} `, runColour(index), index));
  const losses = (key) => perRun((curve, name, colour) => [
    { name: `${name}training`, colour, points: curve[`train/${key}`], smooth: true },
    { name: `${name}validation`, colour: one ? "var(--run1)" : colour, points: curve[`val/${key}`], dots: true, dashed: !one },
  ]);
  const plain = (key, options = {}) => perRun((curve, name, colour) => [{ name: name || key, colour, points: curve[key], ...options }]);
  const charts = [
    lineChart({ title: "Audio loss", series: losses("audio_loss"), note: "nats per code" }),
    lineChart({ title: "Text loss", series: losses("text_loss"), note: "nats per token" }),
    ...RUNS.flatMap(sourceCharts),
    ...RUNS.flatMap(codebookCharts),
    ...RUNS.flatMap(endCharts),
    lineChart({ title: "Loss", series: losses("loss"), note: "weighted sum" }),
    lineChart({ title: "Learning rate", series: plain("train/learning_rate") }),
    lineChart({ title: "Gradient norm", series: plain("train/grad_norm", { smooth: true }), log: true, note: "before clipping" }),
    lineChart({ title: "Throughput", series: plain("train/tokens_per_second", { smooth: true }), note: "tokens a second" }),
    lineChart({ title: "Peak memory", series: plain("train/peak_memory_gib"), note: "GiB" }),
  ].filter(Boolean);
  return charts.length ? section("curves", "Curves", element("div", { class: "charts" }, charts)) : [];
}

function sourceCharts(run) {
  const title = (what) => `Audio loss by source, ${what}${RUNS.length > 1 ? `: ${run.name}` : ""}`;
  return [["val", "validation"], ["train", "training"]].map(([kind, what]) => {
    const prefix = `${kind}/audio_loss/`;
    const series = Object.keys(run.curves).filter((key) => key.startsWith(prefix)).map((key, index) => ({
      name: key.slice(prefix.length),
      colour: CODEBOOK_COLOURS[index % CODEBOOK_COLOURS.length],
      points: run.curves[key],
      dots: kind === "val",
      smooth: kind === "train",
    }));
    return series.length ? lineChart({ title: title(what), series, note: "nats per code" }) : null;
  });
}

function codebookCharts(run) {
  const title = (what) => `Codebooks, ${what}${RUNS.length > 1 ? `: ${run.name}` : ""}`;
  return [["val", "validation"], ["train", "training"]].map(([source, what]) => {
    const numbers = Object.keys(run.curves).filter((key) => key.startsWith(`${source}/codebook_`)).length;
    const series = Array.from({ length: numbers }, (_, index) => ({
      name: String(index + 1),
      colour: CODEBOOK_COLOURS[index % CODEBOOK_COLOURS.length],
      points: run.curves[`${source}/codebook_${index}`],
      dots: source === "val",
      smooth: source === "train",
    }));
    return lineChart({ title: title(what), series, note: "nats per code" });
  });
}

// What validation knows of ends and onsets, beyond the losses.
const END_CHARTS = [
  { what: "Ends of speech", note: "validation, teacher-forced", format: percent,
    keys: { eos_probability: "P(EOS) at the true end", false_eos_rate: "EOS likeliest before it" } },
  { what: "Audio loss, onset and rest", note: "validation, nats per code", format: number,
    keys: { onset_audio_loss: "first 2 s", later_audio_loss: "the rest" } },
  { what: "Text loss by kind", note: "validation, nats per token", format: number,
    keys: { words_loss: "words", audio_start_loss: "<|audio_out_bos|>", end_tokens_loss: "end tokens" } },
];

function endCharts(run) {
  return END_CHARTS.map(({ what, note, format, keys }) => lineChart({
    title: `${what}${RUNS.length > 1 ? `: ${run.name}` : ""}`, note, format,
    series: Object.entries(keys).map(([key, name], index) => ({
      name, colour: CODEBOOK_COLOURS[3 * index], points: run.curves[`val/${key}`], dots: true,
    })),
  }));
}

function evaluations() {
  const tables = RUNS.flatMap((run) => [validationTable(run), ...choiceOfSteps(run), comparisonTable(run)]).filter(Boolean);
  return tables.length ? section("evaluation", "Evaluation", element("div", { class: "stack" }, tables)) : [];
}

function validationTable(run) {
  const lines = run.evaluations;
  if (!lines.length) return null;
  const keys = ["loss", "text_loss", "audio_loss"];
  const best = Object.fromEntries(keys.map((key) => [key, Math.min(...lines.map((line) => line[key]).filter((value) => value !== null))]));
  const most = Math.max(...lines.map((line) => line.audio_loss_per_codebook.length));
  const numbers = Array.from({ length: most }, (_, index) => index);
  return table({
    caption: `Validation losses${RUNS.length > 1 ? ` of ${run.name}` : ""}`,
    head: ["step", "loss", "text", "audio", ...numbers.map((index) => `codebook ${index + 1}`)],
    rows: lines.map((line) => [
      line.step.toLocaleString("en"),
      ...keys.map((key) => ({ text: number(line[key]), class: line[key] === best[key] ? "best" : null })),
      ...numbers.map((index) => number(line.audio_loss_per_codebook[index])),
    ]),
  });
}

// Every adapter of a run, each measure with its interval, and which one to take.
function choiceOfSteps(run) {
  if (!run.comparison || !run.comparison.choice) return [];
  const { columns, choice, manifest } = run.comparison;
  const measures = REPORT.measures.filter(({ key }) => columns.some((column) => column.intervals[key]));
  const cell = (column, key) => {
    const interval = column.intervals[key];
    const text = number(column.values[key]);
    return interval ? [text, element("div", { class: "soft small" }, `${number(interval[0])} to ${number(interval[1])}`)] : text;
  };
  return [
    element("div", { class: "card" }, choiceLines(choice).map((line) => element("p", {}, line))),
    table({
      caption: `All steps, with 95 % intervals over samples, on ${manifest}${RUNS.length > 1 ? `: ${run.name}` : ""}`,
      head: ["", ...measures.map(({ label }) => label)],
      rows: columns.map((column) => [column.name === choice.name ? element("span", { class: "good" }, column.name) : column.name, ...measures.map(({ key }) => cell(column, key))]),
    }),
  ];
}

function choiceLines(choice) {
  const measure = REPORT.measures.find(({ key }) => key === choice.by);
  const signed = (value) => (value < 0 ? `−${number(-value)}` : `+${number(value)}`);
  const lines = [[`Best by ${measure ? measure.label : choice.by}, on ${choice.num_samples} ${choice.num_samples === 1 ? "sample" : "samples"}: `,
    element("b", {}, choice.name), `, ${number(choice.value)}`]];
  if (!choice.undecided.length) return [...lines, "Every other one is worse, sample by sample: the 95 % intervals of the differences leave out 0."];
  const open = choice.undecided.map((one) => `${one.name} (${signed(one.difference)}${one.low === null ? "" : `, ${signed(one.low)} to ${signed(one.high)}`})`);
  return [...lines, `Not decided against ${open.join(", ")}: differences sample by sample, with 95 % intervals. More samples decide more.`];
}

function comparisonTable(run) {
  if (!run.comparison) return null;
  const { columns, manifest } = run.comparison;
  const rows = REPORT.measures.filter(({ key }) => columns.some((column) => key in column.values)).map(({ key, label, better }) => {
    const values = columns.map((column) => column.values[key]);
    const known = (value) => value !== null && value !== undefined;
    const worth = values.map((value) => (!known(value) ? NaN : better === null ? -Math.abs(value - 1) : better ? value : -value));
    const best = columns.length > 1 ? Math.max(...worth.filter((value) => !Number.isNaN(value))) : null;
    return [label, ...values.map((value, index) => ({ text: number(value), class: worth[index] === best ? "best" : null }))];
  });
  return table({
    caption: `Against the base, on ${manifest}${RUNS.length > 1 ? `: ${run.name}` : ""}`,
    head: ["", ...columns.map((column) => column.name)],
    rows,
  });
}

function samples() {
  const runs = RUNS.filter((run) => run.players.prompts.length);
  if (!runs.length) return [];
  const leftOut = runs.reduce((sum, run) => sum + run.players.left_out, 0);
  const charts = [
    ["samples/word_error_rate", "Word error rate", "by the recogniser", percent],
    ["samples/character_error_rate", "Character error rate", "by the recogniser", percent],
    ["samples/speaker_similarity", "Similarity of the voices", "cosine, 1 is the same", number],
    ["samples/code_accuracy", "Code accuracy", "teacher-forced", percent],
    ["samples/stop_rate", "Stop rate", "ended by the model", percent],
    ["samples/duration_ratio", "Duration ratio", "1 is the target's length", number],
    ["samples/mel_cepstral_distance", "Mel-cepstral distance", "dB, lower is nearer", number],
    ["samples/silence_share", "Silence share", "of the frames", percent],
  ].map(([key, title, note, format]) => lineChart({
    title, note, format,
    series: runs.map((run) => ({ name: run.name, colour: runColour(RUNS.indexOf(run)), points: run.curves[key], dots: true })),
  }));
  return section("samples", "Samples",
    leftOut ? element("p", { class: "soft small" }, `${leftOut} samples have no player here, to keep the page small; they are in the runs' samples folders.`) : null,
    element("div", { class: "stack" }, promptIds(runs).map((id) => promptCard(runs, id))),
    element("div", { class: "charts", style: "margin-top:12px" }, charts.filter(Boolean)));
}

function promptIds(runs) {
  return [...new Set(runs.flatMap((run) => run.players.prompts.map((prompt) => prompt.sample_id)))];
}

function promptCard(runs, id) {
  const found = runs.map((run) => [run, run.players.prompts.find((prompt) => prompt.sample_id === id)]).filter(([, prompt]) => prompt);
  const first = found[0][1];
  return element("article", { class: "card" },
    element("div", { class: "soft small" }, [first.sample_id, first.speaker].filter(Boolean).join(" · ")),
    first.text ? element("p", { class: "said-text", dir: "auto" }, first.text) : null,
    element("div", { class: "pair" },
      first.reference ? player(first.reference, [element("b", {}, "Reference voice")]) : null,
      first.target ? player(first.target, [element("b", {}, "Target")]) : null),
    found.map(([run, prompt]) => element("div", { class: "said" }, prompt.said.map((said) => saidPlayer(run, said)))));
}

function saidPlayer(run, said) {
  const facts = [
    `${number(said.duration_ratio, 3)} × the target's length`,
    said.mel_cepstral_distance === null || said.mel_cepstral_distance === undefined ? null : `${number(said.mel_cepstral_distance, 3)} dB away`,
    said.code_accuracy === null || said.code_accuracy === undefined ? null : `${percent(said.code_accuracy)} of codes right`,
    said.word_error_rate === undefined ? null : `${percent(said.word_error_rate)} of words wrong`,
    said.speaker_similarity === null || said.speaker_similarity === undefined ? null : `voice ${number(said.speaker_similarity, 3)}`,
  ].filter(Boolean).join(", ");
  const label = [
    element("b", {}, `Step ${said.step.toLocaleString("en")}`),
    RUNS.length > 1 ? runName(run, RUNS.indexOf(run)) : null,
    said.stopped_by === "eos" ? null : element("span", { class: "bad" }, "did not end"),
    element("span", {}, facts),
    said.heard ? element("span", { class: "heard", dir: "auto" }, `heard: ${said.heard}`) : null,
  ];
  return player(said.audio, label);
}

function dataStatistics() {
  const cards = RUNS.flatMap((run) => [["train", "Training"], ["val", "Validation"]].map(([key, title]) => dataCard(run, run.data[key], title))).filter(Boolean);
  return cards.length ? section("data", "Data", element("div", { class: "charts" }, cards)) : [];
}

function dataCard(run, data, title) {
  if (!data) return null;
  const facts = `${data.samples.toLocaleString("en")} samples` +
    (data.num_speakers ? `, ${data.num_speakers} speakers` : "") + `; texts of ${number(data.text_mean, 3)} characters on average, ${data.text_max} at most`;
  return element("div", { class: "card" }, element("h3", {}, `${title}: ${data.file}${RUNS.length > 1 ? ` (${run.name})` : ""}`),
    element("p", { class: "soft small" }, facts),
    data.speakers.length ? bars(data.speakers) : null,
    element("p", { class: "soft small" }, "Characters in a text"),
    bars(data.text_histogram.map(([low, high, count]) => [`${low} to ${high}`, count])));
}

function trouble() {
  return section("trouble", "What went wrong", element("div", { class: "stack" }, RUNS.map(troubleCard)));
}

function troubleCard(run, index) {
  const { num_rejected, rejected, resumes, skipped_steps, save_errors, non_finite, failure, mended_failure } = run.trouble;
  const items = [
    failure ? element("li", { class: "bad" }, `The run failed: ${failure}`) : null,
    mended_failure ? element("li", {}, `An earlier start failed, and the run went on after it: ${mended_failure}`) : null,
    num_rejected ? element("li", {}, `${num_rejected} ${num_rejected === 1 ? "sample was" : "samples were"} left out`,
      element("ul", { class: "small" }, rejected.map((row) => element("li", {}, `${row.sample}: ${row.reasons.join("; ")}`)),
        num_rejected > rejected.length ? element("li", {}, `and ${num_rejected - rejected.length} more, in rejected.jsonl`) : null)) : null,
    resumes.length ? element("li", {}, `Resumed ${resumes.length === 1 ? "once" : `${resumes.length} times`}, at step ${resumes.join(", ")}`) : null,
    skipped_steps.length ? element("li", { class: "bad" }, `No update was made at step ${skipped_steps.join(", ")}: the loss or a gradient was not finite`) : null,
    ...save_errors.map((error) => element("li", { class: "bad" }, `Step ${error.step} was not saved: ${error.message}`)),
    ...non_finite.map((message) => element("li", { class: "bad" }, message)),
  ].filter(Boolean);
  const content = items.length ? element("ul", {}, items) : element("p", {}, "Nothing: no sample left out, no resume, no step without an update.");
  return element("div", { class: "card" }, RUNS.length > 1 ? element("h3", {}, runName(run, index)) : null, content);
}

function configuration() {
  const differences = RUNS.length > 1 ? differenceTable() : null;
  const texts = RUNS.map((run, index) => element("details", {},
    element("summary", {}, RUNS.length > 1 ? runName(run, index) : "config.yaml"), element("pre", {}, run.config)));
  return section("config", "Configuration", differences, element("div", { style: differences ? "margin-top:12px" : "" }, texts));
}

function differenceTable() {
  const keys = [...new Set(RUNS.flatMap((run) => Object.keys(run.settings)))];
  const rows = keys.filter((key) => new Set(RUNS.map((run) => run.settings[key])).size > 1 && key !== "run.output_dir")
    .map((key) => [element("code", {}, key), ...RUNS.map((run) => run.settings[key] ?? "–")]);
  return rows.length ? table({ caption: "What differs", head: ["key", ...RUNS.map(runName)], rows }) : null;
}

function build() {
  const sections = [curves(), evaluations(), samples(), dataStatistics(), trouble(), configuration()].flat();
  const title = RUNS.length === 1 ? RUNS[0].name : `${RUNS.length} runs`;
  layOut(title, "LoRA fine-tuning of Higgs Audio v2", overview(), sections,
    `Made by ds_higgs ${REPORT.version} on ${REPORT.made} from ${RUNS.map((run) => run.path).join(", ")}.`);
}

build();
