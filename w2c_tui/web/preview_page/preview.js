"use strict";
// The shell around the page: asks the server for what is new, hands it to the frame, and lays
// screenshot and page out beside or over each other. It never looks at the page itself.

const widths = { desktop: 1280, tablet: 768, phone: 390 };
const patience_ms = 4000;
const element = Object.fromEntries(
  [...document.querySelectorAll("[id]")].map((found) => [found.id, found]),
);
const frame = element.frame;

let state = null; // what the server last said
let picked = null; // the version that the user picked; null follows what is newest
let layout = null; // null until the user or the first picture decides
let width = "desktop";
let cover = 0.5; // how much of the page the screenshot covers
let scrolled = { top: 0, height: 0 };
let quirks = false;
let frameReady = null;
let placed = null;
let busy = false;
let again = false;

// ── bringing the page ────────────────────────────────────────────────────────────────────────

function shownVersion() {
  if (picked !== null) return picked;
  return state.live ? null : state.current;
}

async function refresh() {
  again = true;
  if (busy) return;
  busy = true;
  while (again) {
    again = false;
    try {
      await bring();
    } catch {
      // The server is gone; the event stream says so.
      break;
    }
  }
  busy = false;
}

async function bring() {
  const version = shownVersion();
  const reply = await fetch(version === null ? "page" : `page?version=${version}`);
  if (!reply.ok) return;
  const page = await reply.json();
  if (version !== shownVersion()) return;
  element.empty.hidden = page.html !== "";
  await place(page.html);
  element.notes.textContent = page.notes.join(" ");
  document.body.dataset.revision = page.revision;
}

async function place(html) {
  // A page that keeps the frame busy must not keep the shell waiting for ever.
  for (let attempt = 0; attempt < 3; attempt++) {
    await within(frameReady.promise);
    placed = Promise.withResolvers();
    frame.contentWindow.postMessage({ page: html }, "*");
    if ((await within(placed.promise)) !== "again") return;
  }
}

function within(promise) {
  return Promise.race([promise, new Promise((done) => setTimeout(done, patience_ms))]);
}

function loadFrame() {
  frameReady = Promise.withResolvers();
  frame.src = quirks ? "frame?quirks" : "frame";
}

addEventListener("message", (event) => {
  if (event.source !== frame.contentWindow) return;
  const said = event.data;
  if (said.ready) frameReady.resolve();
  if (said.quirks !== undefined) {
    quirks = said.quirks;
    loadFrame();
    placed?.resolve("again");
  }
  if (typeof said.height === "number") scrolled.height = said.height;
  if (said.placed) placed?.resolve();
  if (typeof said.scroll === "number") {
    scrolled.top = said.scroll;
    followPage();
  }
});

// ── what the server says ─────────────────────────────────────────────────────────────────────

function listen() {
  const events = new EventSource("events");
  events.onmessage = (event) => {
    const before = state;
    state = JSON.parse(event.data);
    document.title = `${state.title} – preview`;
    element.title.textContent = state.title;
    showStatus(state.writing ? "Writing" : "");
    if (before && before.versions_of !== state.versions_of) picked = null;
    if (picked !== null && !state.versions.some((version) => version.number === picked))
      picked = null;
    showVersions();
    showOriginal();
    if (!before || before.revision !== state.revision || before.current !== state.current) refresh();
  };
  events.onerror = () => showStatus("Not connected");
}

function showStatus(text) {
  element.status.textContent = text;
  element.status.dataset.kind = text === "Writing" ? "writing" : text ? "lost" : "";
}

function showVersions() {
  const entries = state.versions.map(({ number, name, origin, score }) => {
    const measured = score === null ? "" : ` · ${score.toFixed(2)}`;
    const kind = origin === "answer" || origin === "unknown" ? "" : ` · ${origin}`;
    return new Option(`${name}${kind}${measured}`, number);
  });
  if (state.live) entries.push(new Option(state.writing ? "being written" : "newest", ""));
  const chosen = String(shownVersion() ?? "");
  element.version.replaceChildren(...entries);
  element.version.value = chosen;
  element.versions.hidden = state.versions.length === 0;
  element.older.disabled = element.version.selectedIndex <= 0;
  element.newer.disabled = element.version.selectedIndex >= entries.length - 1;
  const version = state.versions.find(({ number }) => number === shownVersion());
  element.facts.textContent = version ? describe(version) : "";
}

function describe({ name, origin, parent, model, prompt, created_at: created, complete, score }) {
  const from = parent === null ? "" : ` from v${String(parent).padStart(3, "0")}`;
  const how = { answer: "", unknown: "" }[origin] ?? origin;
  const facts = [
    `${name}${from}`,
    how,
    model,
    new Date(created * 1000).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" }),
    complete ? "" : "cut off",
    score === null ? "" : `score ${score.toFixed(3)}`,
    prompt.length > 90 ? `“${prompt.slice(0, 90)}…”` : prompt && `“${prompt}”`,
  ];
  return facts.filter(Boolean).join(" · ");
}

function pick(value) {
  const number = value === "" ? null : Number(value);
  picked = number === state.current && !state.live ? null : number;
  showVersions();
  showOriginal();
  refresh();
}

function step(by) {
  const option = element.version.options[element.version.selectedIndex + by];
  if (option) pick(option.value);
}

// ── the screenshot ───────────────────────────────────────────────────────────────────────────

let originalSource = "";

function showOriginal() {
  const number = shownVersion();
  const version = state.versions.find((entry) => entry.number === number);
  let source = "";
  if (version ? version.original : state.original)
    source = version ? `original?version=${number}&of=${state.versions_of}` : `original?${state.original.key}`;
  if (source === originalSource) return;
  originalSource = source;
  for (const image of [element.original, element["cover-image"]])
    if (source) image.src = source;
    else image.removeAttribute("src");
  if (!source) arrange();
}

element.original.addEventListener("load", arrange);
element.original.addEventListener("error", () => {
  originalSource = "";
  arrange();
});

// ── laying out ───────────────────────────────────────────────────────────────────────────────

function shownLayout() {
  if (!originalSource) return "page";
  return layout ?? "beside";
}

function pageWidth() {
  const natural = element.original.naturalWidth;
  const fits = originalSource && natural >= 900;
  return width === "desktop" && fits ? natural : widths[width];
}

function arrange() {
  const now = shownLayout();
  element.stage.dataset.layout = now;
  element.layouts.hidden = !originalSource;
  element["page-label"].textContent = now === "overlay" ? "Screenshot over page" : "Page";
  press(element.layouts, "layout", now);
  press(element.widths, "width", width);
  const { clientWidth: room, clientHeight: height } = element["page-view"];
  const wide = pageWidth();
  const zoom = Math.min(1, room / wide);
  const left = (room - wide * zoom) / 2;
  frame.style.width = `${wide}px`;
  frame.style.height = `${height / zoom}px`;
  frame.style.transform = `translateX(${left}px) scale(${zoom})`;
  element.cover.style.left = `${left}px`;
  element.cover.style.width = `${wide * zoom}px`;
  element["page-size"].textContent = `${wide} px${zoom < 1 ? `, at ${Math.round(zoom * 100)}%` : ""}`;
  const { naturalWidth, naturalHeight } = element.original;
  element["original-size"].textContent = originalSource ? `${naturalWidth} × ${naturalHeight} px` : "";
  element.stage.style.setProperty("--cover", cover);
  element.handle.style.left = `${left + wide * zoom * cover}px`;
  element.handle.setAttribute("aria-valuenow", Math.round(cover * 100));
  followPage();
}

function press(group, key, value) {
  for (const button of group.querySelectorAll("button"))
    button.setAttribute("aria-pressed", button.dataset[key] === value);
}

function zoomOf(view, natural) {
  return Math.min(1, view.clientWidth / natural);
}

// Screenshot and page scroll together: by pixels where both are as wide, else by shares.
function followPage() {
  const wide = pageWidth();
  const zoom = zoomOf(element["page-view"], wide);
  element["cover-image"].style.transform = `translateY(${-scrolled.top * zoom}px)`;
  const view = element["original-view"];
  const natural = element.original.naturalWidth || 1;
  const range = scrolled.height - frame.clientHeight;
  const target =
    natural === wide
      ? scrolled.top * zoomOf(view, natural)
      : (range > 0 ? scrolled.top / range : 0) * (view.scrollHeight - view.clientHeight);
  if (Math.abs(view.scrollTop - target) > 1) {
    followed = Math.round(target);
    view.scrollTop = target;
  }
}

let followed = -1;

element["original-view"].addEventListener("scroll", () => {
  const view = element["original-view"];
  if (Math.abs(view.scrollTop - followed) <= 1) return;
  followed = -1;
  const natural = element.original.naturalWidth || 1;
  const wide = pageWidth();
  const range = view.scrollHeight - view.clientHeight;
  const target =
    natural === wide
      ? view.scrollTop / zoomOf(view, natural)
      : (range > 0 ? view.scrollTop / range : 0) * (scrolled.height - frame.clientHeight);
  frame.contentWindow.postMessage({ scroll: target }, "*");
});

// ── the slider of the overlay ────────────────────────────────────────────────────────────────

function setCover(value) {
  cover = Math.min(1, Math.max(0, value));
  arrange();
}

element.handle.addEventListener("pointerdown", (event) => {
  element.handle.setPointerCapture(event.pointerId);
  element.stage.classList.add("dragging");
  event.preventDefault();
  element.handle.focus();
});
element.handle.addEventListener("pointermove", (event) => {
  if (!element.handle.hasPointerCapture(event.pointerId)) return;
  const box = element.cover.getBoundingClientRect();
  setCover((event.clientX - box.left) / box.width);
});
for (const end of ["pointerup", "pointercancel"])
  element.handle.addEventListener(end, () => element.stage.classList.remove("dragging"));
element.handle.addEventListener("keydown", (event) => {
  const by = { ArrowLeft: -0.02, ArrowRight: 0.02, Home: -1, End: 1 }[event.key];
  if (by === undefined) return;
  setCover(cover + by);
  event.preventDefault();
});

// ── buttons and keys ─────────────────────────────────────────────────────────────────────────

function setLayout(value) {
  layout = value;
  arrange();
}

function setWidth(value) {
  width = value;
  arrange();
}

element.layouts.addEventListener("click", (event) => {
  if (event.target.dataset.layout) setLayout(event.target.dataset.layout);
});
element.widths.addEventListener("click", (event) => {
  if (event.target.dataset.width) setWidth(event.target.dataset.width);
});
element.version.addEventListener("change", () => pick(element.version.value));
element.older.addEventListener("click", () => step(-1));
element.newer.addEventListener("click", () => step(1));

const keys = {
  s: () => setLayout("beside"),
  o: () => setLayout("overlay"),
  p: () => setLayout("page"),
  1: () => setWidth("desktop"),
  2: () => setWidth("tablet"),
  3: () => setWidth("phone"),
  "[": () => step(-1),
  "]": () => step(1),
};
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("select")) return;
  keys[event.key]?.();
});

new ResizeObserver(arrange).observe(element["page-view"]);
loadFrame();
listen();
