// The page: an image goes to the server, and what comes back is shown; asking back needs the server no more.

import { boxOn } from "./box.js";
import { colour, drawPicture, drawWeights, gridOf, layerOf, limitOf, openPicture, signed, total } from "./draw.js";
import { ALL, NOTHING, confidences, contributions, decode, fusedLogits, kept, map, shares } from "./evidence.js";
import { EXAMPLES } from "./examples.js";
import { Problem, ask, curlLine, key, predict } from "./server.js";

const element = (id) => document.getElementById(id);
const WHOLE = { left: 0, top: 0, right: 1, bottom: 1 };
const MOST_BARS = 7;

/** What is shown. `run` is one answered image: everything below it can change without the server. */
const state = {
  listed: false, // the models offered are those that the server has, as far as is known
  model: null, // {model: its name, version}, as queries have them
  card: null, // of that model: the two change together
  image: null, // {file, name}
  run: null, // {card, picture, answer, evidence, box: that the network saw, roundTrip, probabilities, ranking, rows}
  explained: 0, // class index
  reference: ALL, // class index, ALL or NOTHING
  view: "smooth", // smooth, cells or photo
  off: new Set(), // numbers of stages
  only: false, // the box alone counts
};
let asking = null; // AbortController of what is asked about the model selected, or of an image
const REPLACED = "model_replaced"; // code of a Problem that the page finds by itself

const box = boxOn(element("surface"), element("frame"), () => changed());

// --- asking the server ---

/** Show what belongs to the model that is selected, and ask it about the image that there is. */
async function chooseModel() {
  if (state.image) return look(state.image.file, state.image.name);
  const { signal } = askAnew();
  element("introduction").hidden = false;
  try {
    await withCurrentModel(() => loadModel(signal), signal);
  } catch (error) {
    if (!signal.aborted) showProblem(error, chooseModel);
  }
}

/** Ask the selected model about an image, and show it and the answer. */
async function look(file, name) {
  const own = askAnew();
  const { signal } = own;
  const started = performance.now();
  state.image = { file, name };
  document.body.classList.add("asking");
  showCurl();
  const answering = withCurrentModel((last) => answerOf(file, signal, last), signal);
  answering.catch(() => {}); // handled below; the picture may take longer
  try {
    const picture = await openPicture(file);
    if (signal.aborted) return;
    showPicture(picture, WHOLE, WHOLE);
    const { card, answer, evidence, roundTrip } = await answering;
    if (signal.aborted) return;
    state.run = { card, picture, answer, evidence, box: answer.maps.box, roundTrip, rows: {} };
    state.explained = answer.prediction.index;
    state.off.clear();
    if (typeof state.reference === "number") state.reference = ALL;
    showRun();
    performance.measure("first-answer", { start: started, end: performance.now() });
  } catch (error) {
    if (signal.aborted) return; // another image or model was chosen: what became of this one is of no interest
    state.run = null;
    showProblem(error, () => look(file, name));
  } finally {
    if (asking === own) document.body.classList.remove("asking");
  }
}

/** What was asked before is of no interest any more: neither its answer nor its problem. */
function askAnew() {
  asking?.abort();
  element("problem").hidden = true;
  return (asking = new AbortController());
}

/** The selected model's answer about an image, with the card that it is to be read by. */
async function answerOf(file, signal, last) {
  const { model, card } = await loadModel(signal);
  const started = performance.now();
  const answer = await withKey(() => predict(file, model, signal));
  const roundTrip = performance.now() - started;
  const evidence = decode(answer.maps);
  // a confidence is a hint, not an identity: a card that was just fetched is not refused for it
  if (!isOf(card, answer) || !(last || agrees(card, answer, evidence))) throw replaced();
  return { card, answer, evidence, roundTrip };
}

/** Whether an answer is by the weights that a card describes, and of its classes. */
const isOf = (card, { model, prediction, doubt }) =>
  model.sha256 === card.provenance.weights_sha256 &&
  card.classes[prediction.index] === prediction.label &&
  (typeof doubt !== "number" || Boolean(card.doubt));

/** Whether a card makes the confidence that was answered: the same weights may have been fitted or exported anew. */
function agrees(card, { prediction }, evidence) {
  if (evidence.classes.length < card.classes.length) return true; // the others' part is not known
  return Math.abs(confidences(fusedLogits(evidence), card)[prediction.index] - prediction.confidence) < 0.005;
}

const replaced = () =>
  new Problem({
    title: "Model replaced",
    detail: "The server has just put another model in the place of this one. Try again in a moment.",
    code: REPLACED,
  });
const isReplaced = ({ code }) => [REPLACED, "model_not_found"].includes(code);

/**
 * Do what asks the selected model; where the server has replaced that one, once more with what it has now.
 *
 * @param work called with whether it is the last time
 */
async function withCurrentModel(work, signal) {
  try {
    return await work(false);
  } catch (error) {
    signal.throwIfAborted();
    if (!isReplaced(error)) throw error;
    forgetModels();
    return work(true);
  }
}

const forgetModels = () => Object.assign(state, { listed: false, model: null, card: null });

/** The model that is selected and its card, asked for where they are not known; and show what belongs to them. */
async function loadModel(signal) {
  if (!state.listed) await listModels(signal);
  const id = element("model").value;
  if (idOf(state.model) !== id) {
    const model = JSON.parse(id);
    const card = await withKey(() => ask("model", model, { signal }));
    signal.throwIfAborted(); // another was selected meanwhile
    Object.assign(state, { model, card });
    showExamples();
    element("weights").replaceChildren();
    element("more").hidden = false;
    if (element("weights-details").open) showWeights(true);
    showCurl();
  }
  return { model: state.model, card: state.card };
}

/** Offer the models that there are. The one selected stays so: in its version, or else the newest of its name. */
async function listModels(signal) {
  const { models } = await withKey(() => ask("models", {}, { signal }));
  signal.throwIfAborted();
  const several = new Set(models.map(({ name }) => name)).size < models.length;
  const selected = JSON.parse(element("model").value || "{}");
  const ofName = models.filter(({ name }) => name === selected.model); // the newest is the last
  const best =
    ofName.find(({ version }) => version === selected.version) ??
    ofName.at(-1) ??
    models.find((model) => model.default) ??
    models[0];
  if (!best) throw new Problem({ title: "No model", detail: "The server has no model loaded." });
  const offer = ({ name, version }) => idOf({ model: name, version });
  element("model").replaceChildren(
    ...models.map((model) => new Option(several ? `${model.name} ${model.version}` : model.name, offer(model))),
  );
  element("model").value = offer(best);
  state.listed = true;
}

/** A model as the value of its option. */
const idOf = (model) => JSON.stringify(model);

/** Do what asks the server, with the key that it may want: asked for until it is right, or given up. */
async function withKey(work) {
  for (;;) {
    try {
      return await work();
    } catch (error) {
      if (error.status !== 401) throw error;
      if (!(await askForKey(key.get() !== null))) throw error;
    }
  }
}

let keyAsked = null;

/** One dialog at a time, whoever asks; true where a key was given. */
function askForKey(refused) {
  key.clear();
  keyAsked ??= new Promise((resolve) => {
    const dialog = element("key-dialog");
    element("key-note").textContent = refused ? "The server does not know that key." : "";
    element("key").value = "";
    dialog.addEventListener(
      "close",
      () => {
        keyAsked = null;
        resolve(key.get() !== null);
      },
      { once: true },
    );
    dialog.showModal();
  });
  return keyAsked;
}

// --- showing ---

/** The large picture: see `drawPicture`. */
function showPicture(picture, seen, area, label = "The image", layer = null, smooth = true) {
  const { width, height } = picture ?? { width: 1, height: 1 };
  const ratio = (width * (area.right - area.left)) / (height * (area.bottom - area.top));
  element("scene").classList.remove("empty");
  element("scene").style.setProperty("--ratio", ratio);
  element("invitation").hidden = true;
  const canvas = element("picture");
  canvas.hidden = false;
  canvas.setAttribute("aria-label", label);
  drawPicture(canvas, picture, { area, seen, layer, smooth });
}

/** All that an answer brings; what follows from it is shown by `changed`. */
function showRun() {
  const { answer, evidence } = state.run;
  const { card } = state.run;
  const { classes } = card;
  state.run.probabilities = confidences(fusedLogits(evidence), card);
  state.run.ranking = evidence.classes
    .map((index, place) => ({ index, place }))
    .sort((one, other) => state.run.probabilities[other.place] - state.run.probabilities[one.place]);
  const options = () => state.run.ranking.map(({ index }) => new Option(classes[index], index));
  element("explained").replaceChildren(...options());
  const another = make("optgroup", { label: "another class" }, ...options());
  element("reference").replaceChildren(new Option("any other", ALL), new Option("(raw, alone)", NOTHING), another);
  element("introduction").hidden = true;
  element("result").hidden = false;
  element("reading-controls").hidden = false;
  element("stages-section").hidden = false;
  element("surface").hidden = false;
  box.enabled = true;
  element("verdict").textContent = answer.prediction.label;
  element("confidence").textContent = percent(answer.prediction.confidence);
  const others = answer.stages.filter((stage) => !stage.agrees);
  const agreeing = `${answer.stages.length - others.length} of ${answer.stages.length} stages agree`;
  const aside =
    others.length > 2 ? "" : others.map((stage) => `, ${stage.name} reads ${stage.prediction.label}`).join("");
  element("agreement").textContent = others.length ? agreeing + aside : "all stages agree";
  element("agreement").classList.toggle("split", others.length > 0);
  element("doubt").hidden = typeof answer.doubt !== "number"; // of older models there is none
  if (!element("doubt").hidden) {
    element("doubt").textContent = `${percent(answer.doubt)} doubt`;
    element("doubt").classList.toggle("split", answer.doubt > card.doubt.threshold);
  }
  const { timing_ms: timing } = answer;
  element("timing").textContent =
    `Server ${timing.total.toFixed(1)} ms (decoding ${timing.decode.toFixed(1)}, network ` +
    `${timing.inference.toFixed(1)}), round trip ${state.run.roundTrip.toFixed(0)} ms`;
  element("said").textContent =
    `${answer.prediction.label}, ${percent(answer.prediction.confidence)}; ${element("agreement").textContent}.`;
  element("bars-note").hidden = evidence.classes.length === classes.length;
  element("bars-note").textContent =
    `Of ${classes.length} classes these were sent; their probabilities here are among themselves.`;
  makeStages();
  box.set(null);
  showChoices();
}

function makeStages() {
  const { answer, evidence } = state.run;
  const { depth } = state.run.card.backbone;
  element("stages").replaceChildren(
    ...answer.stages.map((stage, number) => {
      const { height, width } = evidence.stages[number];
      const item = make("li", { className: stage.agrees ? "stage" : "stage disagrees" });
      const canvas = make("canvas", { id: `stage-map-${number}` });
      canvas.setAttribute("role", "img");
      const toggle = make("input", { type: "checkbox", checked: true, id: `stage-${number}` });
      toggle.addEventListener("change", () => {
        toggle.checked ? state.off.delete(number) : state.off.add(number);
        changed();
      });
      const label = make(
        "label",
        { className: "switch" },
        toggle,
        make("span", { className: "unseen" }, `${stage.name} counts`),
      );
      const says = make(
        "p",
        { className: "says" },
        make("span", { className: "unseen" }, "reads "),
        make("strong", {}, stage.prediction.label),
        ` ${percent(stage.prediction.confidence)} `,
        make("span", { className: "mark" }, stage.agrees ? "✓ agrees" : "≠ disagrees"),
      );
      says.title = stage.top_k.map((reading) => `${reading.label} ${percent(reading.confidence)}`).join("\n");
      const numbers = make("dl", { id: `stage-numbers-${number}` });
      const heading = make("h3", {}, stage.name, make("small", {}, `layer ${stage.depth} of ${depth}`));
      const cells = make("p", { className: "cells" }, `${height} × ${width} cells`);
      item.append(
        canvas,
        cells,
        make("div", { className: "facts" }, make("div", { className: "top" }, heading, label), says, numbers),
      );
      return item;
    }),
  );
}

let drawing = 0;
let saying = 0;

/** Show again what follows from the choices, at most once a frame; what was asked back is said aloud when it rests. */
function changed() {
  if (!state.run) return;
  drawing ||= requestAnimationFrame(() => {
    drawing = 0;
    showChoices();
  });
  clearTimeout(saying);
  if (isAsked()) saying = setTimeout(() => (element("said").textContent = element("changed").textContent), 500);
}

const isAsked = () => state.off.size > 0 || box.get() !== null;

function showChoices() {
  const { run, explained, view } = state;
  const { card, evidence } = run;
  const { classes } = card;
  if (state.reference === explained) state.reference = ALL;
  const { reference } = state;
  const smooth = view !== "cells";
  const parts = kept(evidence, state.off, box.get(), state.only);
  const asked = isAsked();

  // the answer
  const now = confidences(fusedLogits(evidence, parts), card);
  showBars(now, asked);
  showChange(now, asked);

  // the class to explain, and what with
  element("explained").value = explained;
  for (const option of element("reference").options) option.disabled = option.value === String(explained);
  element("reference").value = reference;

  // maps: what counts is drawn, but the scale is that of everything
  const whole = evidence.stages.map((stage, number) =>
    gridOf(stage, map(evidence, number, explained, reference), smooth),
  );
  const grids = asked
    ? evidence.stages.map((stage, number) =>
        gridOf(stage, map(evidence, number, explained, reference, parts[number]), smooth),
      )
    : whole;
  const stageLimit = limitOf(...whole);
  const fusedLimit = limitOf(total(whole));
  const added = contributions(evidence, explained, reference, parts);
  const before = contributions(evidence, explained, reference);
  const raw = contributions(evidence, explained, NOTHING);
  const share = shares(evidence, explained);
  const subject = describe(explained, reference);
  const area = {
    left: Math.min(0, run.box.left),
    top: Math.min(0, run.box.top),
    right: Math.max(1, run.box.right),
    bottom: Math.max(1, run.box.bottom),
  };
  const photo = view === "photo";
  const fused = sum(added);
  const label = photo ? "The image" : `Fused map over the image, ${subject}: sum ${signed(fused)}`;
  showPicture(run.picture, run.box, area, label, photo ? null : layerOf(grids, fusedLimit), smooth);
  const surface = element("surface").style;
  surface.left = `${(100 * (run.box.left - area.left)) / (area.right - area.left)}%`;
  surface.top = `${(100 * (run.box.top - area.top)) / (area.bottom - area.top)}%`;
  surface.width = `${(100 * (run.box.right - run.box.left)) / (area.right - area.left)}%`;
  surface.height = `${(100 * (run.box.bottom - run.box.top)) / (area.bottom - area.top)}%`;
  element("frame").classList.toggle("only", state.only);

  run.answer.stages.forEach((stage, number) => {
    const canvas = element(`stage-map-${number}`);
    const off = state.off.has(number);
    drawPicture(canvas, run.picture, {
      area: run.box,
      seen: run.box,
      smooth,
      longest: 288,
      layer: photo ? null : layerOf([grids[number]], stageLimit),
    });
    canvas.setAttribute("aria-label", `Map of ${stage.name}, ${subject}: sum ${signed(added[number])}`);
    canvas.closest("li").classList.toggle("off", off);
    element(`stage-${number}`).checked = !off;
    const value = before[number];
    const shown = make("dd", { className: value < 0 ? "value against" : "value for" }, signed(value));
    if (signed(added[number]) !== signed(value) && !off)
      shown.replaceChildren(make("small", {}, `${signed(value)}→`), signed(added[number]));
    element(`stage-numbers-${number}`).replaceChildren(
      make(
        "div",
        { className: "evidence" },
        make("dt", {}, reference === NOTHING ? "raw" : reference === ALL ? "evidence" : "margin"),
        shown,
      ),
      make("div", { className: "evidence" }, make("dt", {}, "share"), make("dd", {}, percent(share[number], 0))),
      make("div", {}, make("dt", {}, "weight"), make("dd", {}, signed(card.branch_weights[number][explained]))),
      make("div", {}, make("dt", {}, "contribution"), make("dd", {}, signed(raw[number]))),
    );
  });
  showLegend(element("fused-legend"), fusedLimit, `fused, ${subject}`, signed(fused), photo);
  showLegend(element("stage-legend"), stageLimit, "each stage", null, photo);
  element("draw").setAttribute("aria-pressed", String(element("surface").classList.contains("drawing")));
  element("reset").disabled = !asked;
}

const describe = (index, reference) => {
  const { classes } = state.run.card;
  const label = classes[index];
  if (reference === NOTHING) return `for ${label}, raw`;
  return reference === ALL ? `for ${label}` : `for ${label}, against ${classes[reference]}`;
};

function showBars(now, asked) {
  const { run, explained } = state;
  const { card } = run;
  const best = run.ranking.slice(0, 5);
  const risen = run.ranking
    .slice(5)
    .filter(({ place, index }) => index === explained || index === state.reference || now[place] >= 0.05)
    .sort((one, other) => now[other.place] - now[one.place]);
  const shown = [...best, ...risen.slice(0, MOST_BARS - best.length)];
  const rows = shown.map(({ index }) => (run.rows[index] ??= makeBar(index)));
  const body = element("bars");
  if (rows.length !== body.rows.length || rows.some((row, number) => row !== body.rows[number]))
    body.replaceChildren(...rows);
  shown.forEach(({ index, place }, number) => {
    const row = rows[number];
    row.classList.toggle("explained", index === explained);
    row.querySelector("button").setAttribute("aria-pressed", String(index === explained));
    row.querySelector(".then").style.width = `${100 * run.probabilities[place]}%`;
    row.querySelector(".current").style.width = `${100 * now[place]}%`;
    row.cells[2].textContent = percent(run.probabilities[place]);
    row.cells[3].textContent = asked ? percent(now[place]) : "";
  });
  body.closest("table").classList.toggle("asked", asked);
}

function makeBar(index) {
  const label = state.run.card.classes[index];
  const button = make("button", { type: "button", title: `Explain ${label}` }, label);
  button.addEventListener("click", () => {
    state.explained = index;
    changed();
  });
  const track = make(
    "div",
    { className: "track" },
    make("i", { className: "then" }),
    make("i", { className: "current" }),
  );
  const [then, now] = ["number", "number now"].map((className) => make("td", { className }));
  return make("tr", {}, make("th", { scope: "row" }, button), make("td", {}, track), then, now);
}

function showChange(now, asked) {
  const { run } = state;
  const { card } = run;
  if (!asked) {
    element("changed").textContent = "What if evidence were missing? Switch a stage off, or draw a box over the image.";
    return;
  }
  const names = run.answer.stages.filter((_, number) => state.off.has(number)).map((stage) => stage.name);
  const left = [...names, ...(box.get() && !state.only ? ["the box"] : [])];
  const list = left.length > 1 ? `${left.slice(0, -1).join(", ")} and ${left.at(-1)}` : left[0];
  const only = box.get() && state.only;
  const what = only ? `From the box alone${list ? `, without ${list}` : ""}` : `Without ${list}`;
  if (names.length === run.answer.stages.length) {
    element("changed").textContent = `${what} there is no evidence left: every class is as likely.`;
    return;
  }
  const place = now.indexOf(Math.max(...now));
  const label = card.classes[run.evidence.classes[place]];
  const same = run.evidence.classes[place] === run.answer.prediction.index;
  const result = make("strong", {}, `${label} ${percent(now[place])}`);
  element("changed").replaceChildren(
    `${what}: `,
    result,
    same ? ` (was ${percent(run.probabilities[place])})` : ` instead of ${run.answer.prediction.label}`,
  );
}

function showLegend(legend, limit, of, number, off) {
  const bar = make("span", { className: "scale" });
  const stops = [-1, -0.5, 0, 0.5, 1].map((part) => colour(part, 1));
  bar.style.backgroundImage = `linear-gradient(to right, ${stops.join(", ")})`;
  const text = number === null ? of : make("span", {}, `${of}: `, make("b", {}, number));
  legend.replaceChildren(
    make("span", { className: "of" }, text),
    make("span", {}, signed(-limit, limit < 10 ? 1 : 0)),
    bar,
    make("span", {}, signed(limit, limit < 10 ? 1 : 0)),
  );
  legend.setAttribute(
    "aria-label",
    `Colours of the maps ${of}: blue ${signed(-limit)} is against, red ${signed(limit)} for, none is zero`,
  );
  legend.classList.toggle("idle", off);
}

function showExamples() {
  const { classes } = state.card;
  const suitable = EXAMPLES.filter((example) => classes.includes(example.label));
  element("examples").replaceChildren(
    ...suitable.map(({ file, alt }) => {
      const address = `static/examples/${file}`;
      const button = make(
        "button",
        { type: "button", title: alt },
        make("img", { src: address, alt, width: 44, height: 44 }),
      );
      button.addEventListener("click", async () => {
        const image = await fetch(address).then((answer) => answer.blob());
        look(image, file);
      });
      return make("li", {}, button);
    }),
  );
}

/** The weights of the model that is shown; where it was replaced, everything is asked anew, unless it just was. */
async function showWeights(last = false) {
  const { model, card } = state;
  try {
    const weights = await withKey(() => ask("model/branch-weights", model));
    if (model !== state.model) return;
    if (weights.model.sha256 !== card.provenance.weights_sha256) throw replaced();
    element("weights").replaceChildren(drawWeights(weights));
    element("weights-note").textContent = `${weights.how_to_read} Importance was measured on ${weights.fitted_on}.`;
  } catch (error) {
    if (model !== state.model) return;
    if (last || !isReplaced(error)) return showProblem(error, showWeights);
    forgetModels();
    chooseModel();
  }
}

function showCurl() {
  element("curl").textContent = curlLine(state.image?.name ?? "image.jpg", state.model);
}

function showProblem(error, again) {
  if (!(error instanceof Problem)) console.error(error);
  const said =
    error instanceof Problem ? error : { title: "This went wrong", detail: error.message, code: "", requestId: "" };
  const retry = make("button", { type: "button" }, "Try again");
  retry.addEventListener("click", () => {
    element("problem").hidden = true;
    again();
  });
  const detail = said.detail.charAt(0).toUpperCase() + said.detail.slice(1);
  const small = [said.status && `${said.status} ${said.code}`, said.requestId && `request ${said.requestId}`]
    .filter(Boolean)
    .join(" · ");
  element("problem").replaceChildren(
    make("h3", {}, said.title),
    make("p", {}, detail),
    make("p", { className: "note" }, small),
    retry,
  );
  element("problem").hidden = false;
  for (const id of ["result", "introduction", "stages-section", "reading-controls", "surface"])
    element(id).hidden = true;
}

const percent = (fraction, digits = 1) => `${(100 * fraction).toFixed(digits)} %`;
const sum = (values) => values.reduce((one, other) => one + other, 0);

function make(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

// --- what people do ---

element("model").addEventListener("change", chooseModel);
element("explained").addEventListener("change", ({ target }) => {
  state.explained = Number(target.value);
  changed();
});
element("reference").addEventListener("change", ({ target }) => {
  state.reference = [ALL, NOTHING].includes(target.value) ? target.value : Number(target.value);
  changed();
});
for (const input of document.querySelectorAll("input[name=view]")) {
  input.addEventListener("change", () => {
    state.view = input.value;
    changed();
  });
}
for (const input of document.querySelectorAll("input[name=rule]")) {
  input.addEventListener("change", () => {
    state.only = input.value === "only";
    changed();
  });
}
element("draw").addEventListener("click", () => {
  const surface = element("surface");
  surface.classList.toggle("drawing");
  if (surface.classList.contains("drawing")) {
    if (!box.get()) surface.dispatchEvent(new KeyboardEvent("keydown", { key: "Enter" }));
    surface.focus();
  }
  changed();
});
element("reset").addEventListener("click", () => {
  state.off.clear();
  element("surface").classList.remove("drawing");
  box.set(null);
  element("draw").focus();
});
element("weights-details").addEventListener("toggle", ({ target }) => {
  if (target.open && !element("weights").firstChild && state.model) showWeights();
});
element("copy").addEventListener("click", async () => {
  const line = element("curl");
  try {
    await navigator.clipboard.writeText(line.textContent);
    element("copy").textContent = "Copied";
    setTimeout(() => (element("copy").textContent = "Copy"), 2000);
  } catch {
    getSelection().selectAllChildren(line); // no clipboard without TLS: it is selected for Ctrl-C
  }
});

element("choose").addEventListener("click", () => element("file").click());
for (const id of ["file", "capture"]) {
  element(id).addEventListener("change", ({ target }) => {
    take(target.files[0]);
    target.value = ""; // the same file may be chosen again
  });
}
addEventListener("paste", (event) => take(event.clipboardData.files[0]));
let over = 0;
addEventListener("dragenter", () => document.body.classList.toggle("dropping", ++over > 0));
addEventListener("dragleave", () => document.body.classList.toggle("dropping", --over > 0));
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  over = 0;
  document.body.classList.remove("dropping");
  take(event.dataTransfer.files[0]);
});

function take(file) {
  if (file) look(file, file.name);
}

element("key-form").addEventListener("submit", (event) => {
  if (key.set(element("key").value.trim())) return;
  event.preventDefault(); // the dialog stays
  element("key-note").textContent =
    "That is no key: one has only letters without accents, digits and ASCII signs, and no spaces.";
  element("key").select();
});
element("key-cancel").addEventListener("click", () => element("key-dialog").close());

let stream = null;
element("photograph").addEventListener("click", async () => {
  if (!navigator.mediaDevices) return element("capture").click(); // no TLS: the phone's own camera program
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch (error) {
    return element("capture").click();
  }
  element("video").srcObject = stream;
  element("camera-dialog").showModal();
});
element("shoot").addEventListener("click", () => {
  const video = element("video");
  const canvas = make("canvas", { width: video.videoWidth, height: video.videoHeight });
  canvas.getContext("2d").drawImage(video, 0, 0);
  canvas.toBlob((file) => look(file, "photograph.jpg"), "image/jpeg", 0.92);
  element("camera-dialog").close();
});
element("camera-cancel").addEventListener("click", () => element("camera-dialog").close());
element("camera-dialog").addEventListener("close", () => {
  for (const track of stream?.getTracks() ?? []) track.stop();
});

chooseModel();
