// The search page. Every text of a document, a query or an error becomes a text node: nothing is ever parsed as markup.
"use strict";

const TEXT_LENGTH = 1500; // characters of each text in a list of hits
const FULL_LENGTH = 50000; // and of one that is opened
const TITLE_LENGTH = 300;
const ID_LENGTH = 60;
const HITS = ["5", "10", "20", "50"];
const SHOWS = ["all", "moved", "one"];
const STOP_WORDS = new Set(
  "a an and are as at be by do does for from how i in is it its of on or that the their to was what when where which who why with".split(" "),
);

const element = (id) => document.getElementById(id);
const columns = [...document.querySelectorAll(".column")];
let indexes = [];
let lists = [null, null]; // hits of the two columns
let asked = 0; // so that a late answer of an earlier query is dropped

function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function shortened(text, length) {
  return text.length > length ? `${text.slice(0, length)}…` : text;
}

function folded(word) {
  const plain = word.normalize("NFKD").replace(/\p{M}/gu, "").toLowerCase();
  return plain.length > 3 && plain.endsWith("s") && !plain.endsWith("ss") ? plain.slice(0, -1) : plain;
}

function wordsOf(query) {
  const words = (query.match(/[\p{L}\p{N}\p{M}]+/gu) || []).filter((word) => !STOP_WORDS.has(word.toLowerCase()));
  return new Set(words.map(folded));
}

// Put a text into a node, its words that are in the query inside of <mark>.
function putMarked(node, text, words) {
  let end = 0;
  for (const match of text.matchAll(/[\p{L}\p{N}\p{M}]+/gu)) {
    if (!words.has(folded(match[0]))) continue;
    node.append(text.slice(end, match.index), make("mark", "", match[0]));
    end = match.index + match[0].length;
  }
  node.append(text.slice(end));
}

// The part of a long text to show: it begins at the sentence of the first word that matches.
function passage(text, words) {
  for (const match of text.matchAll(/[\p{L}\p{N}\p{M}]+/gu)) {
    if (!words.has(folded(match[0]))) continue;
    if (match.index < 220) return text;
    const sentence = text.lastIndexOf(". ", match.index);
    return "… " + text.slice(match.index - sentence < 200 ? sentence + 2 : match.index - 60);
  }
  return text;
}

async function ask(path) {
  const response = await fetch(path, { headers: { Accept: "application/json" } });
  let answer;
  try {
    answer = await response.json();
  } catch {
    throw new Error(`the server gave no answer that can be read (status ${response.status})`);
  }
  if (!response.ok) throw new Error(answer.error || `status ${response.status}`);
  return answer;
}

function searchPath(index) {
  const query = { query: element("query").value, hits: element("hits").value, max_doc_length: TEXT_LENGTH };
  return `/v1/${encodeURIComponent(index)}/search?${new URLSearchParams(query)}`;
}

function chosen() {
  const right = element("right").value;
  return right && right !== element("left").value ? [element("left").value, right] : [element("left").value];
}

// How a document moved from the left column to the right one; on the left, where it went.
function moveOf(hit, others, side) {
  const other = others.get(hit.docid);
  if (other === undefined) return { kind: "only", text: "only here" };
  const by = other - hit.rank;
  if (by === 0) return { kind: "same", text: "same rank" };
  if (side === 0) return { kind: "there", text: `→ ${other}` };
  return by > 0 ? { kind: "up", text: `▲ ${by}` } : { kind: "down", text: `▼ ${-by}` };
}

function hitNode(hit, side, words, move) {
  const node = make("li", "hit");
  node.tabIndex = -1;
  node.dataset.side = side;
  node.hit = hit;
  node.append(make("div", "rank", hit.rank));
  const body = make("div");
  const doc = hit.doc || { title: "", text: "" };
  const title = make("h3");
  title.dir = "auto";
  putMarked(title, shortened(doc.title || hit.docid, TITLE_LENGTH), words);
  const facts = make("p", "facts");
  facts.append(make("span", "", hit.score.toFixed(4)), make("code", "", shortened(hit.docid, ID_LENGTH)));
  if (move) facts.append(make("span", `move ${move.kind}`, move.text));
  body.append(title, facts);
  if (doc.text) {
    const text = make("p", "text short");
    text.dir = "auto";
    putMarked(text, passage(doc.text, words), words);
    body.append(text);
  }
  node.append(body);
  return node;
}

function ranksOf(list) {
  return new Map(list.map((hit) => [hit.docid, hit.rank]));
}

function isShown(move) {
  const show = element("show").value;
  return show === "all" || !move || (show === "one" ? move.kind === "only" : move.kind !== "same");
}

function fill(side, names, words) {
  const column = columns[side];
  column.replaceChildren();
  const list = lists[side];
  if (!list) return;
  const other = lists[1 - side] && ranksOf(lists[1 - side]);
  const heading = make("h2", "", names[side]);
  const index = indexes.find((one) => one.name === names[side]);
  if (index) heading.append(make("span", "", `${index.documents.toLocaleString()} documents`));
  const items = make("ol");
  for (const hit of list) {
    const move = other && moveOf(hit, other, side);
    if (isShown(move)) items.append(hitNode(hit, side, words, move));
  }
  column.append(heading, items);
  if (!items.children.length) column.append(make("p", "nothing", list.length ? "Nothing of this kind" : "No hits"));
}

function summarize(names, milliseconds) {
  const parts = [];
  const strong = (text) => make("b", "", text);
  if (names.length === 1) {
    parts.push(strong(`${lists[0].length} hits`), ` in ${milliseconds} ms`);
  } else {
    const other = ranksOf(lists[1]);
    const both = lists[0].filter((hit) => other.has(hit.docid));
    const same = both.filter((hit) => other.get(hit.docid) === hit.rank).length;
    const length = Math.max(lists[0].length, lists[1].length);
    parts.push(strong(`${both.length} of ${length}`), " hits are in both, ", strong(same), " of them at the same rank");
    if (both.length && lists[0][0].docid === lists[1][0].docid) parts.push("; the first hit is the same");
    parts.push(` · ${milliseconds} ms`);
  }
  element("summary").replaceChildren(...parts);
}

function showTabs(names) {
  element("tabs").hidden = names.length < 2;
  element("tabs").replaceChildren(
    ...(names.length < 2 ? [] : names).map((name, side) => {
      const tab = make("button", "", name);
      tab.type = "button";
      tab.setAttribute("role", "tab");
      tab.addEventListener("click", () => chooseTab(side));
      return tab;
    }),
  );
  chooseTab(0);
}

function chooseTab(side) {
  columns.forEach((column, number) => column.classList.toggle("chosen", number === side));
  [...element("tabs").children].forEach((tab, number) => tab.setAttribute("aria-selected", String(number === side)));
}

function show(milliseconds) {
  const names = chosen();
  const words = wordsOf(element("query").value);
  element("results").classList.toggle("two", names.length === 2);
  element("showing").hidden = names.length < 2;
  fill(0, names, words);
  fill(1, names, words);
  if (milliseconds !== undefined) {
    showTabs(names);
    summarize(names, milliseconds);
  }
  const first = document.querySelector(".hit");
  if (first) first.tabIndex = 0;
  drawLinks();
}

// Curves between the columns, from a document's rank in one to its rank in the other.
function drawLinks() {
  const links = element("links");
  links.replaceChildren();
  if (!element("results").classList.contains("two")) return;
  const area = links.getBoundingClientRect();
  if (!area.width) return;
  const right = new Map([...columns[1].querySelectorAll(".hit")].map((node) => [node.hit.docid, node]));
  const middle = (node) => {
    const place = node.getBoundingClientRect();
    return place.top - area.top + Math.min(place.height / 2, 40);
  };
  for (const node of columns[0].querySelectorAll(".hit")) {
    const other = right.get(node.hit.docid);
    if (!other) continue;
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    const [from, to, half] = [middle(node), middle(other), area.width / 2];
    path.setAttribute("d", `M4 ${from} C${half} ${from} ${half} ${to} ${area.width - 4} ${to}`);
    const by = node.hit.rank - other.hit.rank;
    path.setAttribute("class", by > 0 ? "up" : by < 0 ? "down" : "same");
    path.docid = node.hit.docid;
    links.append(path);
  }
}

// Light up a document in both columns, and the curve between.
function link(node) {
  const docid = node && lists[1] ? node.hit.docid : null;
  for (const hit of document.querySelectorAll(".hit")) hit.classList.toggle("linked", hit.hit.docid === docid);
  for (const path of element("links").children) path.classList.toggle("linked", path.docid === docid);
}

function fail(error) {
  element("error").textContent = error.message === "Failed to fetch" ? "the server does not answer" : error.message;
  element("error").hidden = false;
}

async function search(keep) {
  const query = element("query").value.trim();
  element("error").hidden = true;
  if (!keep) remember();
  element("start").hidden = Boolean(query);
  if (!query) {
    lists = [null, null];
    element("summary").replaceChildren();
    element("tabs").hidden = true;
    show();
    return;
  }
  const number = ++asked;
  const started = performance.now();
  document.body.classList.add("busy");
  try {
    const answers = await Promise.all(chosen().map((name) => ask(searchPath(name))));
    if (number !== asked) return;
    lists = [answers[0].candidates, answers.length > 1 ? answers[1].candidates : null];
    show(Math.round(performance.now() - started));
    document.title = `${query.slice(0, 60)} · effir search`;
  } catch (error) {
    if (number === asked) fail(error);
  } finally {
    if (number === asked) document.body.classList.remove("busy");
  }
}

// The whole text of a hit, or its beginning again.
async function toggle(node) {
  const text = node.querySelector(".text");
  if (!text) return;
  const words = wordsOf(element("query").value);
  let content = node.hit.doc.text;
  const opens = text.classList.contains("short");
  if (opens && content.length >= TEXT_LENGTH) {
    try {
      const name = chosen()[Number(node.dataset.side)];
      const path = `/v1/${encodeURIComponent(name)}/doc/${encodeURIComponent(node.hit.docid)}`;
      content = (await ask(path)).doc.text;
    } catch (error) {
      fail(error);
      return;
    }
  }
  const rest = content.length - FULL_LENGTH;
  text.replaceChildren();
  putMarked(text, opens ? content.slice(0, FULL_LENGTH) : passage(content, words), words);
  if (opens && rest > 0) text.append(` … and ${rest.toLocaleString()} more characters`);
  text.classList.toggle("short", !opens);
  text.classList.toggle("full", opens);
  drawLinks();
}

// The address of the page says what is shown, so that it can be sent to somebody, and gone back to.
function remember() {
  const state = { q: element("query").value, left: element("left").value, right: element("right").value };
  state.hits = element("hits").value;
  state.show = element("show").value;
  const address = `/?${new URLSearchParams(Object.entries(state).filter(([, value]) => value))}`;
  if (address !== location.pathname + location.search) history.pushState(null, "", address);
}

function recall() {
  const state = new URLSearchParams(location.search);
  const names = indexes.map((index) => index.name);
  const choose = (id, value, known, otherwise) => (element(id).value = known.includes(value) ? value : otherwise);
  element("query").value = (state.get("q") || "").slice(0, 4096);
  choose("left", state.get("left"), names, names[0]);
  choose("right", state.get("right"), ["", ...names], state.has("q") || names.length < 2 ? "" : names[1]);
  choose("hits", state.get("hits"), HITS, "10");
  choose("show", state.get("show"), SHOWS, "all");
}

function option(value, text) {
  const node = make("option", "", text);
  node.value = value;
  return node;
}

function showIndexes() {
  element("left").replaceChildren(...indexes.map((index) => option(index.name, index.name)));
  element("right").replaceChildren(option("", "nothing"), ...indexes.map((index) => option(index.name, index.name)));
  element("beside").hidden = element("showing").hidden = indexes.length < 2;
  element("filters").hidden = false;
  const most = Math.max(...indexes.map((index) => index.documents));
  element("holdings").textContent = `${most.toLocaleString()} documents, ${indexes.length} ${indexes.length > 1 ? "indexes" : "index"}`;
  element("collections").replaceChildren(
    ...indexes.map((index) => {
      const node = make("li");
      const facts = [`${index.documents.toLocaleString()} documents`, `${index.dimension} dimensions`, index.kind];
      node.append(make("strong", "", index.name), make("span", "", facts.filter(Boolean).join(" · ")));
      return node;
    }),
  );
}

function focusHit(node) {
  if (!node) return;
  for (const hit of document.querySelectorAll(".hit")) hit.tabIndex = -1;
  node.tabIndex = 0;
  node.focus({ preventScroll: true });
  node.scrollIntoView({ block: "nearest" });
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const inField = event.target.matches("input, select");
  if (event.key === "Escape" && inField) event.target.blur();
  else if (event.key === "/" && !inField) {
    element("query").focus();
    element("query").select();
  } else if (inField && !(event.target.id === "query" && event.key === "ArrowDown")) return;
  else if (!moveTo(event)) return;
  event.preventDefault();
}

// Go to another hit as a key says; return whether it says anything.
function moveTo(event) {
  const at = document.activeElement.closest(".hit");
  const down = { j: 1, ArrowDown: 1, k: -1, ArrowUp: -1 }[event.key];
  const across = { l: 1, ArrowRight: 1, h: 0, ArrowLeft: 0 }[event.key];
  if (event.key === "Enter" && at) toggle(at);
  else if (!at && down === 1) focusHit(document.querySelector(".column.chosen .hit") || document.querySelector(".hit"));
  else if (at && down) {
    const next = down > 0 ? at.nextElementSibling : at.previousElementSibling;
    if (next) focusHit(next);
    else if (down < 0) element("query").focus();
  } else if (at && across !== undefined && lists[1]) {
    chooseTab(across);
    const nodes = [...columns[across].querySelectorAll(".hit")];
    focusHit(nodes.find((node) => node.hit.docid === at.hit.docid) || nodes[0]);
  } else return false;
  return true;
}

function listen() {
  element("search").addEventListener("submit", (event) => {
    event.preventDefault();
    search();
  });
  for (const id of ["left", "right", "hits"]) element(id).addEventListener("change", () => search());
  element("show").addEventListener("change", () => {
    remember();
    show();
  });
  addEventListener("popstate", () => {
    recall();
    search(true);
  });
  document.addEventListener("keydown", onKey);
  const results = element("results");
  results.addEventListener("click", (event) => {
    const node = event.target.closest(".hit");
    if (node && String(getSelection()) === "") {
      focusHit(node);
      toggle(node);
    }
  });
  for (const name of ["mouseover", "focusin"]) {
    results.addEventListener(name, (event) => link(event.target.closest(".hit")));
  }
  results.addEventListener("mouseleave", () => link(document.activeElement.closest(".hit")));
  new ResizeObserver(drawLinks).observe(results);
}

async function begin() {
  listen();
  try {
    indexes = (await ask("/v1/indexes")).indexes;
  } catch (error) {
    fail(error);
    return;
  }
  showIndexes();
  recall();
  await search(true);
}

begin();
