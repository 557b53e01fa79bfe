// Behaviour of every t2iprobe page: tree, tables, pictures on demand, one synset in detail. No library, no network.
(() => {
"use strict";
const $ = (query, root = document) => root.querySelector(query);
const $$ = (query, root = document) => [...root.querySelectorAll(query)];
const data = JSON.parse($("#data").textContent);
let strips = null; // parsed when the first picture is wanted
const sheet = $("#sheet");

// ---- building elements: text is always set as text, so nothing in the data can become markup
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined) continue;
    if (name === "class") element.className = value;
    else if (name in element && typeof value !== "string") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

// ---- numbers, written as the page writes them
const score = (value, digits = 4) => (value === null || value === undefined ? "–" : value.toFixed(digits));
const interval = (pair) => (pair && pair[0] !== null ? `${score(pair[0])} to ${score(pair[1])}` : "–");
const asP = (value) => (value === null || value === undefined ? "–" : value < 0.001 ? "< 0.001" : value.toFixed(3));
const step = (value) => data.scale.filter((end) => value >= end).length;
const isp = (value) => make("span", { class: `isp k${step(value)}` }, score(value));
const signed = (value) => (value > 0 ? "+" : "") + score(value).replace("-", "−");

// ---- pictures: one strip a synset and run, cut into squares by object-position
function stripOf(name, run = 0) {
  const inline = $$("img[data-strip-of]").find((img) => img.dataset.stripOf === name && Number(img.dataset.run || 0) === run);
  if (inline) return { uri: inline.src, count: Number(inline.dataset.count) };
  strips ??= JSON.parse($("#strips").textContent);
  return strips[run]?.[name] ?? null;
}
function square(strip, index, alt) {
  const position = strip.count > 1 ? (100 * index) / (strip.count - 1) : 0;
  const img = make("img", { src: strip.uri, alt, decoding: "async" });
  img.style.objectPosition = `${position}% 0`;
  return img;
}
function fillStrip(place) {
  if (place.childElementCount) return;
  const strip = stripOf(place.dataset.strip, Number(place.dataset.run || 0));
  if (!strip) return;
  const most = Math.min(strip.count, Number(place.dataset.most || 4));
  const lemma = data.synsets[place.dataset.strip].lemmas[0];
  for (let i = 0; i < most; i++) place.append(square(strip, i, `picture ${i + 1} drawn for “${lemma}”`));
}
const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) { watcher.unobserve(entry.target); fillStrip(entry.target); }
}, { rootMargin: "300px" });
for (const place of $$("[data-strip]")) watcher.observe(place);
for (const place of $$("[data-whole]")) {
  const strip = stripOf(place.dataset.whole, Number(place.dataset.run || 0));
  if (strip) place.append(make("img", { src: strip.uri, alt: `${strip.count} pictures drawn for “${data.synsets[place.dataset.whole].lemmas[0]}”` }));
}

// ---- the tree: a disclosure button and a link on every row
function setOpen(item, open) {
  const button = $(":scope > .row > button.toggle", item);
  if (!button) return;
  item.classList.toggle("closed", !open);
  button.setAttribute("aria-expanded", String(open));
}
for (const tree of $$(".tree")) {
  tree.addEventListener("click", (event) => {
    const button = event.target.closest("button.toggle");
    if (button) setOpen(button.closest("li"), button.getAttribute("aria-expanded") === "false");
  });
  tree.addEventListener("keydown", (event) => {
    const item = event.target.closest("li");
    if (!item || event.altKey || event.ctrlKey || event.metaKey) return;
    const closed = item.classList.contains("closed");
    const focusable = event.target.matches("button") ? "button.toggle" : ".name";
    const visible = () => $$(`.row ${focusable}`, tree).filter((element) => element.offsetParent !== null);
    const move = (by) => { const all = visible(); all[all.indexOf(event.target) + by]?.focus(); };
    if (event.key === "ArrowRight" && closed) setOpen(item, true);
    else if (event.key === "ArrowRight") move(1);
    else if (event.key === "ArrowLeft" && !closed && $(":scope > ul", item)) setOpen(item, false);
    else if (event.key === "ArrowLeft") $(":scope > .row " + focusable, item.parentElement.closest("li") ?? item)?.focus();
    else if (event.key === "ArrowDown") move(1);
    else if (event.key === "ArrowUp") move(-1);
    else return;
    event.preventDefault();
  });
}
for (const button of $$("[data-tree]"))
  button.addEventListener("click", () => { for (const item of $$(".tree li")) setOpen(item, button.dataset.tree === "open"); });
function showInTree(name) {
  const link = $$(".tree .name").find((a) => a.hash === "#" + name && a.closest("li"));
  if (!link) return;
  for (let item = link.closest("li").parentElement.closest("li"); item; item = item.parentElement.closest("li")) setOpen(item, true);
  closeSheet();
  link.scrollIntoView({ block: "center" });
  link.focus();
}

// ---- tables: sorting keeps the rows, filtering hides them
function cellValue(row, column) {
  const value = row.cells[column].dataset.v ?? row.cells[column].textContent;
  const number = Number(value);
  return value === "" || value === "None" ? null : Number.isNaN(number) ? value : number;
}
function sortTable(table, column, direction) {
  const rows = [...table.tBodies[0].rows].map((row) => [cellValue(row, column), row]);
  const sign = direction === "ascending" ? 1 : -1;
  rows.sort(([a], [b]) => a === b ? 0 : a === null ? 1 : b === null ? -1 : (a < b ? -sign : sign));
  table.tBodies[0].append(...rows.map(([, row]) => row));
  for (const th of table.tHead.rows[0].cells) th.removeAttribute("aria-sort");
  table.tHead.rows[0].cells[column].setAttribute("aria-sort", direction);
}
for (const button of $$(".sort"))
  button.addEventListener("click", () => {
    const th = button.closest("th");
    const first = th.classList.contains("n") ? "descending" : "ascending";
    const second = first === "ascending" ? "descending" : "ascending";
    sortTable(th.closest("table"), th.cellIndex, th.getAttribute("aria-sort") === first ? second : first);
  });
function filterTable(form) {
  const id = form.dataset.filters;
  const wanted = Object.fromEntries(new FormData(form));
  const words = wanted.text.toLowerCase().split(/\s+/).filter(Boolean);
  const rows = [...$("#" + id).tBodies[0].rows];
  let shown = 0;
  for (const row of rows) {
    const fits = (!wanted.kind || row.dataset.kind === wanted.kind) && (!wanted.state || row.dataset.state === wanted.state)
      && words.every((word) => row.dataset.text.includes(word));
    row.hidden = !fits;
    shown += fits;
  }
  $(`[data-count-of="${id}"]`).textContent = `${shown} of ${rows.length} synsets`;
  $(`[data-empty-of="${id}"]`).hidden = shown > 0;
}
for (const form of $$("[data-filters]")) {
  for (const kind of ["input", "change"]) form.addEventListener(kind, () => filterTable(form));
  form.addEventListener("submit", (event) => event.preventDefault());
  filterTable(form); // a browser may have kept what was typed before a reload
}

// ---- one synset in detail, at the address #name
const listOf = (names) => make("ul", { class: "chips" }, ...names.map((name) =>
  make("li", {}, name in data.synsets ? make("a", { href: "#" + name }, data.synsets[name].lemmas[0]) : name)));
const pair = (term, ...value) => [make("dt", {}, term), make("dd", {}, ...value)];

function picturesOf(name, run, result) {
  const strip = stripOf(name, run);
  if (!strip) return make("p", { class: "empty-pictures" }, "no pictures kept");
  const tiles = Array.from({ length: strip.count }, (_, i) => {
    const entry = result.entries[i];
    return make("li", {}, make("figure", { class: "tile" }, square(strip, i, `picture ${i + 1} drawn for “${data.synsets[name].lemmas[0]}”`),
      entry ? make("figcaption", {}, make("span", { class: "hidden-visually" }, entry.seed ? "seed " : "file "), entry.seed ?? entry.file) : null));
  });
  return make("ul", { class: "tiles" }, ...tiles);
}
function sawOf(result) {
  return make("ul", { class: "saw" }, ...result.saw.map(([label, probability], i) => {
    const fill = make("span", { class: "fill" });
    fill.style.width = `${100 * probability}%`;
    const inside = result.inside?.[i];
    return make("li", { class: inside ? "inside" : "" }, make("span", {}, label + (inside ? " ✓" : ""), inside ? make("span", { class: "hidden-visually" }, " (a kind of it)") : null),
      make("span", { class: "track", "aria-hidden": "true" }, fill), make("span", { class: "p" }, score(probability, 3)));
  }));
}
function numbersOf(result) {
  const others = Object.entries(result.others ?? {}).flatMap(([name, value]) => pair(`ISP, ${name}`, score(value)));
  return make("dl", {},
    ...pair("ISP", isp(result.isp), ` ${interval(result.isp_interval)}`),
    ...pair("Chance", `${score(result.floor)} (${result.classes} class${result.classes === 1 ? "" : "es"} below)`,
      result.chance === null ? "" : `; other prompts’ pictures give it ${score(result.chance)}`),
    ...pair("Known", result.test === "none" ? "by definition: every class lies below it"
      : `${result.known ? "yes" : "no"}, p ${asP(result.p)}, q ${asP(result.q)} (${{ t: "t-test over pictures", bets: "bets on pictures" }[result.test] ?? "rank among prompts"})`),
    ...pair(`SCS, N = ${result.samples}`, result.scs === null ? "none: one class below" : `${score(result.scs)} ± ${score(result.scs_stderr)} (${score(result.scs_raw)} nats), corrected ${score(result.scs_corrected)}`),
    ...pair("Entropies", `within a picture ${score(result.subtree_entropy)}, over all ${score(result.marginal_entropy)} nats`), ...others);
}
function sideOf(name, run) {
  const result = data.synsets[name].runs[run];
  const heading = data.runs.length > 1 ? make("h3", {}, data.runs[run]) : null;
  if (!result) return make("div", {}, heading, make("p", { class: "soft" }, "Not probed in this run."));
  const prompts = [...new Set(result.entries.map((entry) => entry.prompt).filter(Boolean))];
  return make("div", {}, heading,
    ...prompts.map((prompt) => make("p", { class: "soft" }, `Prompt: “${prompt}”`)),
    picturesOf(name, run, result), result.entries.length && stripOf(name, run) ? make("p", { class: "soft small" }, `Under each picture is its ${result.entries[0].seed ? "seed" : "file"}.`) : null,
    numbersOf(result),
    make("h3", {}, "What the classifier saw"), make("p", { class: "soft small" }, "Mean probability over the pictures; ✓ is a kind of the word."), sawOf(result));
}
function fillSheet(name) {
  const synset = data.synsets[name];
  const title = make("h2", { id: "sheet-title", tabindex: "-1" }, synset.lemmas[0]);
  const close = make("button", { class: "button", type: "button" }, "Close");
  close.addEventListener("click", closeSheet);
  const inTree = make("button", { class: "button", type: "button" }, "Show in the tree");
  inTree.addEventListener("click", () => showInTree(name));
  const others = synset.lemmas.slice(1);
  $(".sheet", sheet).replaceChildren(
    make("div", { class: "sheet-head" }, make("div", {}, title, make("code", {}, name)), close),
    make("p", {}, synset.gloss), others.length ? make("p", { class: "soft" }, `Also: ${others.join(", ")}`) : "",
    synset.difference === undefined ? "" : make("p", {}, `Difference in ISP: ${signed(synset.difference)}, q ${asP(synset.q)}`),
    make("div", { class: "sides" }, ...data.runs.map((_, run) => sideOf(name, run))),
    synset.parents.length ? make("h3", {}, "A kind of") : "", listOf(synset.parents),
    synset.children.length ? make("h3", {}, "Its kinds") : "", listOf(synset.children),
    $(".tree") ? inTree : "");
  return title;
}
let opener = null;
function openSheet(name) {
  const title = fillSheet(name);
  if (!sheet.open) { opener = document.activeElement; sheet.showModal(); }
  sheet.scrollTop = 0;
  title.focus();
}
function closeSheet() { if (sheet.open) sheet.close(); }
sheet.addEventListener("close", () => {
  if (synsetInAddress()) history.replaceState(null, "", location.pathname + location.search);
  opener?.focus?.({ preventScroll: true });
});
sheet.addEventListener("click", (event) => { if (event.target === sheet) closeSheet(); });
function synsetInAddress() {
  let name = location.hash.slice(1);
  try { name = decodeURIComponent(name); } catch { /* a stray % in the address is no synset */ }
  return Object.hasOwn(data.synsets, name) ? name : null;
}
function followAddress() { const name = synsetInAddress(); if (name) openSheet(name); else closeSheet(); }
document.addEventListener("click", (event) => {
  const name = event.target.closest("a[href^='#']")?.getAttribute("href").slice(1) ?? event.target.closest("[data-synset]")?.dataset.synset;
  if (!name || !Object.hasOwn(data.synsets, name) || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault(); // else the page would jump to the row of the table that carries the same address
  history.pushState(null, "", "#" + name);
  openSheet(name);
});
// The browser itself moves the focus after a change of address: ours must come after that.
addEventListener("popstate", () => setTimeout(followAddress));
followAddress();

// ---- small things
for (const button of $$("[data-copy]"))
  button.addEventListener("click", async () => {
    const source = $("#" + button.dataset.copy);
    let done = "Copied.";
    try { await navigator.clipboard.writeText(source.textContent); } catch {
      getSelection().selectAllChildren(source);
      done = "Selected: copy it with the keyboard.";
    }
    button.nextElementSibling.textContent = done;
  });
})();
